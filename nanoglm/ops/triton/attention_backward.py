"""Gradients of sparse latent attention: a few small matrix products of each query with the rows that it selected.

Shape legend: T rows, N storage rows, H heads, K selected, C latent, R rope; t rows of a chunk.

Scores of a chunk of queries are kept, so nothing is computed twice: a fused kernel would have to take scores and
d_probabilities once for the softmax and once more for the gradients, and hold [H, C] sums that leave no registers for
the rest. Here every kernel is a plain product with few sums in registers, which fits small shared memories too:

    scores = (q_latent latent^T + q_rope rope^T) scale,  d_probabilities = grad latent^T        [t, H, K] fp32
    probabilities = softmax(scores),  d_scores = gradient of scores                             [t, H, K] in their place
    d_q = d_scores keys                                                                         [t, H, C], [t, H, R]
    d_latent += d_scores^T q_latent + probabilities^T grad,  d_rope += d_scores^T q_rope        [N, C], [N, R]

Many queries add to one storage row: with atomics, whose order differs from run to run, or if PyTorch is told to use
deterministic algorithms, by :func:`add_in_order`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglm.ops.triton.attention import rows_of
from nanoglm.ops.triton.launch import INTERPRETED, power, tuned

SCRATCH = 1 << 28  # bytes of scores and of contributions held at once
RUN = 4  # contributions to one row that are read together


class Tile(NamedTuple):
    """What one program computes, or takes at once, along each side."""

    heads: int
    keys: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of products summed over columns, over keys, and over heads (all in one program)."""

    scores: Tile
    queries: Tile
    keys: Tile


TILES = {
    "sm_90": Tiles(Tile(64, 128, 64, 8, 3), Tile(64, 64, 256, 8, 3), Tile(0, 64, 128, 4, 3)),
    "sm_89": Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(0, 64, 64, 4, 2)),
    "gfx942": Tiles(Tile(64, 64, 64, 4, 2), Tile(64, 64, 128, 4, 2), Tile(0, 64, 64, 4, 2)),
    "portable": Tiles(Tile(16, 32, 32, 4, 1), Tile(16, 32, 32, 4, 1), Tile(0, 32, 32, 4, 1)),
}


def tiles_of(x: Tensor) -> Tiles:
    """fp32 products run on ordinary cores from registers, which large tiles overflow."""
    return TILES["portable"] if x.dtype == torch.float32 else tuned(TILES, x.device)


# ------------------------------------------------------------------------------ scores
@triton.jit
def operand(pointers, mask, WIDE: tl.constexpr):
    """One side of a product, 0 outside the mask."""
    x = tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _scores_kernel(
    q_latent, q_latent_row, q_latent_head, q_rope, q_rope_row, q_rope_head,
    grad, grad_row, grad_head, latent, latent_row, rope, rope_row,
    rows, counts, scores, d_probabilities, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    GRAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One query, block of heads and block of selected keys, in programs of that nesting, keys innermost."""
    blocks = tl.cdiv(K, BLOCK_K)
    across = blocks * tl.cdiv(H, BLOCK_H)
    query = (tl.program_id(0) // across).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_K
    if first < tl.load(counts + query):
        heads = tl.program_id(0) % across // blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        held = (heads < H)[:, None]
        places = first + tl.arange(0, BLOCK_K)
        row = tl.load(rows + query * K + places, mask=places < K, other=-1).to(tl.int64)
        chosen = (row >= 0)[:, None]
        s = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
        d = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
        for c in range(0, C, BLOCK_C):
            column = (c + tl.arange(0, BLOCK_C))[None, :]
            key = operand(latent + row[:, None] * latent_row + column, chosen & (column < C), WIDE)
            at = q_latent + query * q_latent_row + heads[:, None] * q_latent_head + column
            s = tl.dot(operand(at, held & (column < C), WIDE), tl.trans(key), s, input_precision="ieee")
            if GRAD:
                at = grad + query * grad_row + heads[:, None] * grad_head + column
                d = tl.dot(operand(at, held & (column < C), WIDE), tl.trans(key), d, input_precision="ieee")
        for c in range(0, R, BLOCK_R):
            column = (c + tl.arange(0, BLOCK_R))[None, :]
            key = operand(rope + row[:, None] * rope_row + column, chosen & (column < R), WIDE)
            at = q_rope + query * q_rope_row + heads[:, None] * q_rope_head + column
            s = tl.dot(operand(at, held & (column < R), WIDE), tl.trans(key), s, input_precision="ieee")
        out = (query * H + heads[:, None]) * K + places[None, :]
        kept = held & (places < K)[None, :]
        tl.store(scores + out, s * scale, mask=kept)
        if GRAD:
            tl.store(d_probabilities + out, d, mask=kept)


@triton.jit
def _softmax_kernel(
    scores, d_probabilities, probabilities, d_scores, counts, scale,
    H: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query and head. What it writes lies over what it read, STEP elements from one head to the next: nothing is
    written before sums over all that was read are known. Places past the valid ones become 0."""
    line = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    valid = place < tl.load(counts + line // H)
    s = tl.load(scores + line * K + place, mask=place < K, other=0.0)
    d = tl.load(d_probabilities + line * K + place, mask=place < K, other=0.0)
    s = tl.where(valid, s, -float("inf"))
    d = tl.where(valid, d, 0.0)
    p = tl.where(valid, tl.exp(s - tl.max(s, 0)), 0.0)
    p = p / tl.sum(p, 0)
    d = p * (d - tl.sum(p * d, 0)) * scale
    tl.store(probabilities + line * STEP + place, p.to(probabilities.dtype.element_ty), mask=place < K)
    tl.store(d_scores + line * STEP + place, d.to(d_scores.dtype.element_ty), mask=place < K)


# ------------------------------------------------------------------------------ gradients
@triton.jit
def _query_kernel(
    d_scores, keys, keys_row, rows, counts, d_q, d_q_row, d_q_head,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """d_q [t, H, W] of keys [N, W]: one query, block of heads and block of columns, columns innermost."""
    blocks = tl.cdiv(W, BLOCK_W)
    across = blocks * tl.cdiv(H, BLOCK_H)
    query = (tl.program_id(0) // across).to(tl.int64)
    heads = (tl.program_id(0) % across // blocks * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    column = (tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    for first in range(0, tl.load(counts + query), BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        row = tl.load(rows + query * K + places, mask=places < K, other=-1).to(tl.int64)[:, None]
        key = operand(keys + row * keys_row + column, (row >= 0) & (column < W), WIDE)
        at = d_scores + (query * H + heads) * STEP + places[None, :]
        d = operand(at, (heads < H) & (places < K)[None, :], WIDE)
        total = tl.dot(d, key, total, input_precision="ieee")
    at = d_q + query * d_q_row + heads * d_q_head + column
    tl.store(at, total.to(d_q.dtype.element_ty), mask=(heads < H) & (column < W))


@triton.jit
def _key_kernel(
    d_scores, q, q_row, q_head, probabilities, grad, grad_row, grad_head,
    rows, counts, out, out_row,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    GRAD: tl.constexpr, ATOMIC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One query and block of columns: adds to out [N, W] fp32, or writes its contributions to out [t * K, W]."""
    blocks = tl.cdiv(W, BLOCK_W)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    heads = tl.arange(0, HEADS)[:, None]
    column = (tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    held = (heads < H) & (column < W)
    query_values = operand(q + query * q_row + heads * q_head + column, held, WIDE)
    if GRAD:
        grad_values = operand(grad + query * grad_row + heads * grad_head + column, held, WIDE)
    for first in range(0, tl.load(counts + query), BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        at = (query * H + heads) * STEP + places[None, :]
        inside = (heads < H) & (places < K)[None, :]
        total = tl.dot(tl.trans(operand(d_scores + at, inside, WIDE)), query_values, input_precision="ieee")
        if GRAD:
            p = tl.trans(operand(probabilities + at, inside, WIDE))
            total = tl.dot(p, grad_values, total, input_precision="ieee")
        row = tl.load(rows + query * K + places, mask=places < K, other=-1).to(tl.int64)[:, None]
        mask = (row >= 0) & (column < W)
        if ATOMIC:
            tl.atomic_add(out + row * out_row + column, total, mask=mask, sem="relaxed")
        else:
            tl.store(out + (query * K + places[:, None]) * out_row + column, total, mask=mask)


@triton.jit
def _add_runs_kernel(
    order, rows, values, values_row, target, target_row, count,
    W: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The program at the first place of a run of equal rows (sorted, empty ones of -1 first) adds up all of it."""
    place = tl.program_id(0)
    row = tl.load(rows + place).to(tl.int64)
    before = tl.load(rows + place - 1, mask=place > 0, other=-1)
    if row > before:
        column = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        found = RUN
        while found == RUN:
            places = place + tl.arange(0, RUN)
            same = tl.load(rows + places, mask=places < count, other=-1) == row
            at = tl.load(order + places, mask=same, other=0)
            mask = same[:, None] & (column < W)[None, :]
            total += tl.sum(tl.load(values + at[:, None] * values_row + column[None, :], mask=mask, other=0.0), 0)
            found = tl.sum(same.to(tl.int32), 0)
            place += RUN
        at = target + row * target_row + column
        tl.store(at, tl.load(at, mask=column < W, other=0.0) + total, mask=column < W)


# ------------------------------------------------------------------------------ launches
def lines(x: Tensor) -> Tensor:
    """x with the values of a row side by side, as kernels read them; mostly x itself."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_scores(
    q_latent: Tensor, q_rope: Tensor | None, grad: Tensor | None, latent: Tensor, rope: Tensor | None, rows: Tensor,
    counts: Tensor, scale: float, scores: Tensor, d_probabilities: Tensor | None,
) -> None:  # fmt: skip
    """Writes scores, and d_probabilities if there is a grad, fp32 [t, H, K], but not past ``counts``."""
    (count, heads, c), r, k = q_latent.shape, 0 if rope is None else rope.shape[1], rows.shape[1]
    tile = tiles_of(latent).scores
    block_h, block_k = min(power(heads), tile.heads), min(power(k), tile.keys)
    q_rope, grad = q_latent if q_rope is None else q_rope, q_latent if grad is None else grad
    rope = latent if rope is None else rope
    _scores_kernel[(count * triton.cdiv(heads, block_h) * triton.cdiv(k, block_k),)](
        q_latent, *q_latent.stride()[:2], q_rope, *q_rope.stride()[:2], grad, *grad.stride()[:2],
        latent, latent.stride(0), rope, rope.stride(0), rows, counts, scores,
        scores if d_probabilities is None else d_probabilities, scale, heads, c, r, k,
        block_h, block_k, min(power(c), tile.columns), min(power(r), tile.columns),
        d_probabilities is not None, INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def add_in_order(rows: Tensor, values: Tensor, *targets: Tensor) -> None:
    """Adds values fp32 [n, W] to rows int [n] of targets fp32 [N, W] (several: their columns side by side), of equal
    rows the first first: without atomics, so with the same bits every time. Nothing where rows are -1."""
    ordered, order = rows.sort(stable=True)
    for target in targets:
        part, values = values[:, : target.shape[1]], values[:, target.shape[1] :]
        _add_runs_kernel[(len(rows),)](
            order, ordered, part, part.stride(0), target, target.stride(0), len(rows),
            target.shape[1], power(target.shape[1]), RUN,
        )  # fmt: skip


def sparse_attention_backward(
    grad: Tensor, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor,
    requests: Tensor, table: Tensor, page_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q_latent [T, H, C], q_rope [T, H, R], latent [N, C] and rope [N, R], each in its own dtype.

    Args:
        grad: [T, H, C]. selection: int32 [T, K]. requests: int64 [T]. table: int32 [B, P].
    """
    grad, q_latent, q_rope, latent, rope = (lines(x) for x in (grad, q_latent, q_rope, latent, rope))
    (count, heads, c), r, k = q_latent.shape, q_rope.shape[2], selection.shape[1]
    grads_q = torch.empty_like(q_latent), torch.empty_like(q_rope)
    grads_k = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (latent, rope)]
    ordered = torch.are_deterministic_algorithms_enabled()
    step = min(count, max(1, SCRATCH // (4 * k * max(2 * heads, c + r if ordered else 0))))
    scratch = q_latent.new_empty(2, step, heads, k, dtype=torch.float32)
    contributions = scratch.new_empty(step * k if ordered else 0, c + r)
    probabilities, d_scores = scratch.view(q_latent.dtype)  # in the place of scores and of their gradients
    latents, ropes = contributions.split([c, r], 1) if ordered else grads_k
    all_rows, all_counts = rows_of(selection, requests, table, page_size)
    for begin in range(0, count, max(step, 1)):
        part = slice(begin, min(begin + step, count))
        rows, counts = all_rows[part], all_counts[part]
        launch_scores(q_latent[part], q_rope[part], grad[part], latent, rope, rows, counts, scale, *scratch)
        _softmax_kernel[(len(rows) * heads,)](
            *scratch, probabilities, d_scores, counts, scale, heads, k, d_scores.shape[-1], power(k)
        )
        _query_gradients(d_scores, latent, rows, counts, grads_q[0][part])
        _query_gradients(d_scores, rope, rows, counts, grads_q[1][part])
        _key_gradients(d_scores, q_latent[part], probabilities, grad[part], rows, counts, latents, not ordered)
        _key_gradients(d_scores, q_rope[part], probabilities, None, rows, counts, ropes, not ordered)
        if ordered:
            add_in_order(rows.flatten(), contributions[: rows.numel()], *grads_k)
    return *grads_q, grads_k[0].to(latent.dtype), grads_k[1].to(rope.dtype)


def _query_gradients(d_scores: Tensor, keys: Tensor, rows: Tensor, counts: Tensor, d_q: Tensor) -> None:
    (count, heads, wide), k, tile = d_q.shape, rows.shape[1], tiles_of(keys).queries
    block_h, block_w = min(power(heads), tile.heads), min(power(wide), tile.columns)
    _query_kernel[(count * triton.cdiv(heads, block_h) * triton.cdiv(wide, block_w),)](
        d_scores, keys, keys.stride(0), rows, counts, d_q, *d_q.stride()[:2], heads, wide, k, d_scores.shape[-1],
        block_h, min(power(k), tile.keys), block_w, INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _key_gradients(
    d_scores: Tensor, q: Tensor, probabilities: Tensor, grad: Tensor | None, rows: Tensor, counts: Tensor, out: Tensor,
    atomic: bool,
) -> None:  # fmt: skip
    (count, heads, wide), k, tile = q.shape, rows.shape[1], tiles_of(q).keys
    block_w = min(power(wide), max(16, tile.columns * 64 // max(64, power(heads))))  # many heads leave room for fewer
    other = q if grad is None else grad
    _key_kernel[(count * triton.cdiv(wide, block_w),)](
        d_scores, q, *q.stride()[:2], probabilities, other, *other.stride()[:2], rows, counts, out, out.stride(0),
        heads, wide, k, d_scores.shape[-1], power(heads), min(power(k), tile.keys), block_w,
        grad is not None, atomic, INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
