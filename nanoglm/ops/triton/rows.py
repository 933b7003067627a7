"""Rows by themselves: RMSNorm, RoPE and SwiGLU, each in one pass over memory; inference only.

Shape legend: T rows, D width, H heads, R rope.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglm.ops.triton.launch import on, power

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
def _rotate(x, cos, sin, y, x_row, x_head, heads, dim, pairs, half, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair, head, t = i % pairs, (i // pairs) % heads, i // pairs // heads
    first, second, turned = i < count, (i < count) & (2 * pair + 1 < dim), (i < count) & (pair < half)
    at = x + t * x_row + head * x_head + 2 * pair
    even = tl.load(at, mask=first, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=second, other=0.0).to(tl.float32)
    c = tl.load(cos + t * half + pair, mask=turned, other=1.0)
    s = tl.load(sin + t * half + pair, mask=turned, other=0.0)
    to = y + (t * heads + head) * dim + 2 * pair
    tl.store(to, (even * c - odd * s).to(y.dtype.element_ty), mask=first)
    tl.store(to + 1, (odd * c + even * s).to(y.dtype.element_ty), mask=second)


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
