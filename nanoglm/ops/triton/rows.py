"""Rows by themselves: RMSNorm, RoPE and SwiGLU, each in one pass over memory, and what a cache keeps of a token, from
its projection to its place; inference only.

Shape legend: T rows, D width, H heads, C latent, R rope, I index dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglm.ops.triton.launch import on, power
from nanoglm.ops.triton.select import halves

BLOCK = 1024


@triton.jit
def _rms_norm(x, weight, y, x_row, dim, eps, DIM: tl.constexpr):
    t, d = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    values = tl.load(x + t * x_row + d, mask=d < dim, other=0.0).to(tl.float32)
    scaled = values * tl.rsqrt(tl.sum(values * values) / dim + eps)
    scaled *= tl.load(weight + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(y + t * dim + d, scaled.to(y.dtype.element_ty), mask=d < dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], rows D or more apart -> contiguous [T, D]; sums and product in fp32, one cast."""
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        kernel: Any = _rms_norm
        with on(x):
            kernel[(x.shape[0],)](x, weight, y, x.stride(0), x.shape[1], eps, DIM=power(x.shape[1]), num_warps=4)
    return y


@triton.jit
def _turn(even, odd, cos, sin, at, inside):
    """Pairs turned, where inside; others as they are."""
    c = tl.load(cos + at, mask=inside, other=1.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    return tl.where(inside, even * c - odd * s, even), tl.where(inside, odd * c + even * s, odd)


@triton.jit
def _rotate(x, cos, sin, y, x_row, x_head, heads, dim, pairs, half, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair, head, t = i % pairs, (i // pairs) % heads, i // pairs // heads
    first, second, turned = i < count, (i < count) & (2 * pair + 1 < dim), (i < count) & (pair < half)
    at = x + t * x_row + head * x_head + 2 * pair
    even = tl.load(at, mask=first, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=second, other=0.0).to(tl.float32)
    even, odd = _turn(even, odd, cos, sin, t * half + pair, turned)
    to = y + (t * heads + head) * dim + 2 * pair
    tl.store(to, even.to(y.dtype.element_ty), mask=first)
    tl.store(to + 1, odd.to(y.dtype.element_ty), mask=second)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, reuse: bool = False) -> Tensor:
    """x [T, I] or [T, H, I] with cos and sin fp32 [T, R / 2] -> contiguous, of x's shape; dims behind R stay. reuse: x
    may become the result."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x if reuse and x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads, head_step = (1, 0) if x.ndim == 2 else (x.shape[1], x.stride(1))
    pairs = (x.shape[-1] + 1) // 2
    if count := x.shape[0] * heads * pairs:
        kernel: Any = _rotate
        with on(x):
            kernel[(triton.cdiv(count, BLOCK),)](
                x, cos.contiguous(), sin.contiguous(), y, x.stride(0), head_step, heads, x.shape[-1], pairs,
                cos.shape[1], count, BLOCK=BLOCK,
            )  # fmt: skip
    return y


@triton.jit
def _swiglu(gate, up, y, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=i < count)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both contiguous and of one shape; in fp32, one cast."""
    y = torch.empty_like(gate)
    if count := gate.numel():
        with on(gate):
            _swiglu[(triton.cdiv(count, BLOCK),)](gate, up, y, count, BLOCK=BLOCK)
    return y


# ------------------------------------------------------------------------------ into the cache
@triton.jit
def _write_latent(
    pool, kv, weight, cos, sin, slots, kv_row, latent, half, eps,
    LATENT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d, pair = tl.arange(0, LATENT), tl.arange(0, HALF)
    row, to = kv + t * kv_row, pool + tl.load(slots + t) * (latent + 2 * half)
    values = tl.load(row + d, mask=d < latent, other=0.0).to(tl.float32)
    scaled = values * tl.rsqrt(tl.sum(values * values) / latent + eps)
    scaled *= tl.load(weight + d, mask=d < latent, other=0.0).to(tl.float32)
    tl.store(to + d, scaled.to(pool.dtype.element_ty), mask=d < latent)
    even = tl.load(row + latent + 2 * pair, mask=pair < half, other=0.0).to(tl.float32)
    odd = tl.load(row + latent + 2 * pair + 1, mask=pair < half, other=0.0).to(tl.float32)
    even, odd = _turn(even, odd, cos, sin, t * half + pair, pair < half)
    tl.store(to + latent + 2 * pair, even.to(pool.dtype.element_ty), mask=pair < half)
    tl.store(to + latent + 2 * pair + 1, odd.to(pool.dtype.element_ty), mask=pair < half)


def write_latent(
    pool: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:  # fmt: skip
    """As :func:`nanoglm.ops.write_latent`, all of one dtype."""
    assert pool.is_contiguous()
    kv = kv if kv.stride(1) == 1 else kv.contiguous()
    latent, half = weight.shape[0], (kv.shape[1] - weight.shape[0]) // 2
    if kv.shape[0]:
        kernel: Any = _write_latent
        with on(kv):
            kernel[(kv.shape[0],)](
                pool, kv, weight, cos.contiguous(), sin.contiguous(), slots.contiguous(), kv.stride(0), latent, half,
                eps, LATENT=power(latent), HALF=power(half), num_warps=4,
            )  # fmt: skip


@triton.jit
def _write_index_keys(
    pool, scales, keys, weight, bias, cos, sin, slots, key_row, pool_page, scale_page, page_size, dim, half, eps,
    SCALED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    at = 2 * tl.arange(0, PAIRS)  # of a pair's first value
    first, second = at < dim, at + 1 < dim
    even = tl.load(keys + t * key_row + at, mask=first, other=0.0).to(tl.float32)
    odd = tl.load(keys + t * key_row + at + 1, mask=second, other=0.0).to(tl.float32)
    mean = tl.sum(even + odd) / dim
    even, odd = tl.where(first, even - mean, 0.0), tl.where(second, odd - mean, 0.0)
    scale = tl.rsqrt(tl.sum(even * even + odd * odd) / dim + eps)
    even = even * scale * tl.load(weight + at, mask=first, other=0.0).to(tl.float32)
    even += tl.load(bias + at, mask=first, other=0.0).to(tl.float32)
    odd = odd * scale * tl.load(weight + at + 1, mask=second, other=0.0).to(tl.float32)
    odd += tl.load(bias + at + 1, mask=second, other=0.0).to(tl.float32)
    # Rounded between norm and rotation, and after it, as where each is a kernel.
    even, odd = even.to(keys.dtype.element_ty).to(tl.float32), odd.to(keys.dtype.element_ty).to(tl.float32)
    even, odd = _turn(even, odd, cos, sin, t * half + at // 2, at // 2 < half)
    even, odd = even.to(keys.dtype.element_ty).to(tl.float32), odd.to(keys.dtype.element_ty).to(tl.float32)
    slot = tl.load(slots + t)
    page, place = slot // page_size, slot % page_size
    if SCALED:  # by a power of two: the exponent of most / 448, and one more unless that is one itself
        most = tl.math.div_rn(tl.maximum(tl.max(tl.maximum(tl.abs(even), tl.abs(odd))), 1e-4), 448.0)
        bits = ((most.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) << 23
        scale = bits.to(tl.float32, bitcast=True)
        even, odd = even / scale, odd / scale
        tl.store(scales + page * scale_page + place, scale)
    to = pool + page * pool_page + place * dim + at
    tl.store(to, even.to(pool.dtype.element_ty), mask=first)
    tl.store(to + 1, odd.to(pool.dtype.element_ty), mask=second)


def write_index_keys(
    pool: Tensor, keys: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:
    """As :func:`nanoglm.ops.write_index_keys`; a pool [pages, page_size, I] of the keys' dtype, or one for FP8."""
    assert pool.is_contiguous()
    keys = keys if keys.stride(1) == 1 else keys.contiguous()
    (count, dim), scaled = keys.shape, pool.dtype == torch.uint8
    values, scales = halves(pool) if scaled else (pool, cos)
    if count:
        kernel: Any = _write_index_keys
        with on(keys):
            kernel[(count,)](
                values, scales, keys, weight, bias, cos.contiguous(), sin.contiguous(), slots.contiguous(),
                keys.stride(0), values.stride(0), scales.stride(0), 64 if scaled else pool.shape[1], dim, cos.shape[1],
                eps, SCALED=scaled, PAIRS=power(dim) // 2, num_warps=1,
            )  # fmt: skip
