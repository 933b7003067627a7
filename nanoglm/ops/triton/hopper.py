"""Sparse attention at GLM-5.2's shape for Hopper (sm_90), in Gluon, Triton's language of explicit layouts.

The same algorithm as :mod:`nanoglm.ops.triton.attention`, which serves every other card and shape. Two things it cannot
ask for there: that the next keys are on their way while these are worked on, with room for two tiles only; and that the
two groups of warps share the scores of 64 heads instead of both computing all of them.

Shape legend: T rows, N storage rows, H heads, K selected, C latent, R rope.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before Triton 3.7
HEADS, LATENT, ROPE = 64, 512, 64


def serves(q_latent: Tensor, rope: Tensor) -> bool:
    """Whether the shape is the kernel's."""
    fits = q_latent.shape[1] % HEADS == 0 and q_latent.shape[2] == LATENT and rope.shape[1] == ROPE
    return fits and q_latent.dtype in (torch.bfloat16, torch.float16)


@gluon.jit
def _fetch(latent, rope, at_latent, at_rope, c_KC, r_KR, latent_row, rope_row):
    """Sends for the rows at_latent (and at_rope: the same in another layout) of a tile."""
    wide: gl.constexpr = at_latent.type.layout.parent
    narrow: gl.constexpr = at_rope.type.layout.parent
    c = gl.arange(0, c_KC.shape[1], gl.SliceLayout(0, wide))
    r = gl.arange(0, r_KR.shape[1], gl.SliceLayout(0, narrow))
    async_copy.async_copy_global_to_shared(c_KC, latent + (at_latent * latent_row)[:, None] + c[None, :])
    async_copy.async_copy_global_to_shared(r_KR, rope + (at_rope * rope_row)[:, None] + r[None, :])


@gluon.jit
def attend(
    q_latent, q_rope, latent, rope, rows, counts, out, sums,
    scale, heads, selected, latent_row, rope_row, split_size,
    HEADS: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr, KEYS: gl.constexpr,
    SPLIT: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, KEYS // 2, 16])
    by_latent: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, LATENT // 2, 16])
    dtype: gl.constexpr = q_latent.dtype.element_ty
    t = gl.program_id(0).to(gl.int64)
    first = gl.program_id(1) * HEADS
    q_HC = gl.allocate_shared_memory(dtype, [HEADS, LATENT], shared)
    q_HR = gl.allocate_shared_memory(dtype, [HEADS, ROPE], shared)
    c_2KC = gl.allocate_shared_memory(dtype, [2, KEYS, LATENT], shared)
    r_2KR = gl.allocate_shared_memory(dtype, [2, KEYS, ROPE], shared)
    h = t * heads + first
    _fetch(
        q_latent + h * LATENT, q_rope + h * ROPE, gl.arange(0, HEADS, gl.SliceLayout(1, wide)),
        gl.arange(0, HEADS, gl.SliceLayout(1, narrow)), q_HC, q_HR, LATENT, ROPE,
    )  # fmt: skip

    rows += t * selected
    begin = gl.program_id(2) * split_size
    stop = gl.minimum(begin + split_size, gl.load(counts + t))
    i_wide = gl.arange(0, KEYS, gl.SliceLayout(1, wide))
    i_narrow = gl.arange(0, KEYS, gl.SliceLayout(1, narrow))
    last = gl.maximum(stop - 1, 0)  # behind it a tile repeats the last row: nothing that is not selected is read
    there = begin < stop
    at_wide = gl.load(rows + gl.minimum(begin + i_wide, last), mask=there, other=0)
    at_narrow = gl.load(rows + gl.minimum(begin + i_narrow, last), mask=there, other=0)
    if LONG:
        at_wide, at_narrow = at_wide.to(gl.int64), at_narrow.to(gl.int64)
    if there:
        _fetch(latent, rope, at_wide, at_narrow, c_2KC.index(0), r_2KR.index(0), latent_row, rope_row)
    async_copy.commit_group()
    at_wide = gl.load(rows + gl.minimum(begin + KEYS + i_wide, last), mask=there, other=0)
    at_narrow = gl.load(rows + gl.minimum(begin + KEYS + i_narrow, last), mask=there, other=0)

    most = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, by_key))
    total_HK = gl.zeros([HEADS, KEYS], gl.float32, by_key)  # summed over keys at the end
    out_HC = gl.zeros([HEADS, LATENT], gl.float32, by_latent)
    place = gl.arange(0, KEYS, gl.SliceLayout(0, by_key))
    turn = 0
    for low in range(begin, stop, KEYS):
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()  # this tile is there for all, and nobody reads the other one any more
        if low + KEYS < stop:
            if LONG:
                _fetch(
                    latent, rope, at_wide.to(gl.int64), at_narrow.to(gl.int64), c_2KC.index(1 - turn),
                    r_2KR.index(1 - turn), latent_row, rope_row,
                )  # fmt: skip
            else:
                _fetch(
                    latent, rope, at_wide, at_narrow, c_2KC.index(1 - turn), r_2KR.index(1 - turn), latent_row, rope_row
                )
        async_copy.commit_group()
        at_wide = gl.load(rows + gl.minimum(low + 2 * KEYS + i_wide, last))
        at_narrow = gl.load(rows + gl.minimum(low + 2 * KEYS + i_narrow, last))
        c_KC, r_KR = c_2KC.index(turn), r_2KR.index(turn)
        scores = gl.zeros([HEADS, KEYS], gl.float32, by_key)
        scores = warpgroup_mma(q_HC, c_KC.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_HR, r_KR.permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where((low + place < stop)[None, :], scores * (scale * 1.4426950408889634), float("-inf"))
        new = gl.maximum(most, gl.max(scores, 1))
        old, p = gl.exp2(most - new), gl.exp2(scores - new[:, None])
        total_HK = total_HK * old[:, None] + p
        most = new
        out_HC = out_HC * gl.convert_layout(old, gl.SliceLayout(1, by_latent))[:, None]
        p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, by_latent, 2))
        out_HC = warpgroup_mma(p, c_KC, out_HC, is_async=True)
        out_HC = warpgroup_mma_wait(0, deps=[out_HC])
        turn = 1 - turn
    async_copy.wait_group(0)

    total = gl.sum(total_HK, 1)
    h_out = first + gl.arange(0, HEADS, gl.SliceLayout(1, by_latent))
    c = gl.arange(0, LATENT, gl.SliceLayout(0, by_latent))
    if SPLIT:
        at = (t * gl.num_programs(2) + gl.program_id(2)) * heads
        gl.store(out + (at + h_out)[:, None] * LATENT + c[None, :], out_HC)
        h_sums = at + first + gl.arange(0, HEADS, gl.SliceLayout(1, by_key))
        gl.store(sums + h_sums * 2, most)
        gl.store(sums + h_sums * 2 + 1, total)
    else:
        share = gl.convert_layout(1.0 / gl.where(total > 0, total, 1.0), gl.SliceLayout(1, by_latent))
        gl.store(out + (t * heads + h_out)[:, None] * LATENT + c[None, :], (out_HC * share[:, None]).to(dtype))
