"""The indexers' loss with its gradient, for teachers whose heads share their keys, over selected keys.

Shape legend: B sequences, L rows of each, T = B * L, S = before + L keys of each, J indexer heads, I index dim,
H heads, A head dim, K selected.

Teachers' scores come from the same kernel as in the gradients of attention, a chunk of queries at a time; a second one
adds the mean of their softmaxes to p [T, K]. Then one program a query takes index scores against p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglm.ops import kl
from nanoglm.ops.triton.attention_backward import SCRATCH, add_in_order, launch_scores, lines, operand
from nanoglm.ops.triton.launch import INTERPRETED, power, tuned

TILES = {  # selected keys at once, warps, stages
    "sm_90": (64, 4, 3),
    "sm_89": (32, 4, 2),
    "gfx942": (32, 4, 2),
    "portable": (32, 4, 1),
}
TEACHER_ELEMENTS = 1 << 13  # of scores, heads by selected keys, that a program softmaxes at once


@triton.jit
def _attention_kernel(
    scores, counts, p, share,
    H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query: adds the sum of its heads' softmaxes, times share, to p."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    valid = (place < tl.load(counts + query))[None, :]
    inside = (place < K)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, H, BLOCK_H):
        heads = (first + tl.arange(0, BLOCK_H))[:, None]
        s = tl.load(scores + (query * H + heads) * K + place[None, :], mask=inside & (heads < H), other=0.0)
        s = tl.where(valid, s, -float("inf"))
        e = tl.where(valid & (heads < H), tl.exp(s - tl.max(s, 1)[:, None]), 0.0)
        total += tl.sum(e / tl.maximum(tl.sum(e, 1), 1e-30)[:, None], 0)
    at = p + query * K + place
    tl.store(at, tl.load(at, mask=place < K, other=0.0) + total * share, mask=place < K)


@triton.jit
def _index_kernel(
    q, q_row, q_head, weights, weights_row, weights_head, keys, keys_row,
    rows, counts, p, loss, d_q, d_weights, out,
    J: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, ATOMIC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One query: its loss, d_q and d_weights; adds to out [B * S, I], or writes its contributions to out [t * K, I].

    The wider side of each product comes first, as matrix units want it: [keys, heads] and [dim, heads]."""
    query = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + query)
    heads = tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    at = q + query * q_row + heads[:, None] * q_head + dim[None, :]
    queries = operand(at, (heads < J)[:, None] & (dim < WIDTH)[None, :], WIDE)
    at = weights + query * weights_row + heads * weights_head
    w = tl.load(at, mask=heads < J, other=0.0).to(tl.float32)[None, :]
    most = -float("inf")
    total = 0.0
    for first in range(0, count, BLOCK_K):
        key, _, valid = _selected(keys, keys_row, rows + query * K, first, dim, K, WIDTH, BLOCK_K, WIDE)
        dots = tl.dot(key, tl.trans(queries), input_precision="ieee")
        scores = tl.where(valid, tl.sum(tl.maximum(dots, 0.0) * w, 1), -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 0))
        total = total * tl.exp(most - highest) + tl.sum(tl.exp(scores - highest), 0)
        most = highest
    log_total = most + tl.log(total)
    sum_loss = tl.zeros((BLOCK_K,), tl.float32)
    sum_w = tl.zeros((BLOCK_K, HEADS), tl.float32)
    sum_q = tl.zeros((DIM, HEADS), tl.float32)
    for first in range(0, count, BLOCK_K):
        key, row, valid = _selected(keys, keys_row, rows + query * K, first, dim, K, WIDTH, BLOCK_K, WIDE)
        dots = tl.dot(key, tl.trans(queries), input_precision="ieee")
        log_q = tl.where(valid, tl.sum(tl.maximum(dots, 0.0) * w, 1) - log_total, 0.0)
        places = first + tl.arange(0, BLOCK_K)
        target = tl.load(p + query * K + places, mask=valid, other=0.0)
        sum_loss += tl.where(target > 0.0, target * (tl.log(tl.maximum(target, 1e-30)) - log_q), 0.0)
        d = tl.where(valid, tl.exp(log_q) - target, 0.0)[:, None]
        sum_w += tl.maximum(dots, 0.0) * d
        d_dots = tl.where(dots > 0.0, d * w, 0.0).to(key.dtype)
        sum_q = tl.dot(tl.trans(key), d_dots, sum_q, input_precision="ieee")
        d_key = tl.dot(d_dots, queries, input_precision="ieee")
        mask = valid[:, None] & (dim < WIDTH)[None, :]
        if ATOMIC:
            tl.atomic_add(out + row[:, None] * WIDTH + dim[None, :], d_key, mask=mask, sem="relaxed")
        else:
            tl.store(out + (query * K + places[:, None]) * WIDTH + dim[None, :], d_key, mask=mask)
    tl.store(loss + query, tl.sum(sum_loss, 0))
    tl.store(d_weights + query * J + heads, tl.sum(sum_w, 0), mask=heads < J)
    at = d_q + (query * J + heads[None, :]) * WIDTH + dim[:, None]
    tl.store(at, sum_q, mask=(heads < J)[None, :] & (dim < WIDTH)[:, None])


@triton.jit
def _selected(
    keys, keys_row, rows, first, dim,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The keys at a block of selected places, their rows, and which are valid."""
    places = first + tl.arange(0, BLOCK_K)
    row = tl.load(rows + places, mask=places < K, other=-1).to(tl.int64)
    valid = row >= 0
    return (
        operand(keys + row[:, None] * keys_row + dim[None, :], valid[:, None] & (dim < WIDTH)[None, :], WIDE),
        row,
        valid,
    )


def indexer_kl(
    q: Tensor, weights: Tensor, keys: Tensor, queries: Sequence[Tensor], teacher_keys: Sequence[Tensor], length: int,
    before: int, scale: float, selection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`nanoglm.ops.kl.indexer_kl`, which also serves what has no kernel: no Selection, keys of each head, or
    dtypes that differ.

    Returns:
        The sum [] and its gradients by q [T, J, I], weights [T, J] and keys [B * S, I], fp32.
    """
    pairs = [(q, keys), *zip(queries, teacher_keys, strict=True)]
    if selection is None or any(x.dtype != y.dtype or y.ndim == 3 for x, y in pairs):
        return kl.indexer_kl(q, weights, keys, queries, teacher_keys, length, before, scale, selection)
    (count, heads, dim), k, ordered = q.shape, selection.shape[1], torch.are_deterministic_algorithms_enabled()
    sequence = torch.arange(count, dtype=torch.int32, device=q.device) // length
    rows = torch.where(selection >= 0, selection + sequence[:, None] * (before + length), -1)
    counts = (selection >= 0).sum(1, dtype=torch.int32)
    p = _attention(queries, teacher_keys, rows, counts, scale)
    q, keys = lines(q), lines(keys)
    loss, d_weights, d_q = p.new_empty(count), p.new_empty(weights.shape), p.new_empty(q.shape)
    d_keys = p.new_zeros(keys.shape)
    step = max(1, min(count, SCRATCH // (4 * k * dim))) if ordered else max(1, count)
    contributions = p.new_empty(step * k if ordered else 0, dim)
    block_k, warps, stages = TILES["portable"] if q.dtype == torch.float32 else tuned(TILES, q.device)
    for begin in range(0, count, step):
        part = slice(begin, min(begin + step, count))
        size = part.stop - begin
        _index_kernel[(size,)](
            q[part], *q.stride()[:2], weights[part], *weights.stride(), keys, keys.stride(0), rows[part], counts[part],
            p[part], loss[part], d_q[part], d_weights[part], contributions if ordered else d_keys,
            heads, dim, k, power(heads), power(dim), min(power(k), block_k), not ordered, INTERPRETED,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if ordered:
            add_in_order(rows[part].flatten(), contributions[: size * k], d_keys)
    return loss.sum(), d_q, d_weights, d_keys


def _attention(
    queries: Sequence[Tensor], teacher_keys: Sequence[Tensor], rows: Tensor, counts: Tensor, scale: float
) -> Tensor:
    """Mean over teachers and heads of their attention to the selected keys: fp32 [T, K]."""
    (count, k), block = rows.shape, power(rows.shape[1])
    p = torch.zeros(count, k, dtype=torch.float32, device=rows.device)
    for query, key in zip(queries, teacher_keys, strict=True):
        query, key, heads = lines(query), lines(key), query.shape[1]
        step = max(1, min(count, SCRATCH // (4 * k * heads)))
        scores = p.new_empty(step, heads, k)
        block_h = max(1, min(triton.next_power_of_2(heads), TEACHER_ELEMENTS // block))
        for begin in range(0, count, step):
            part = slice(begin, min(begin + step, count))
            launch_scores(query[part], None, None, key, None, rows[part], counts[part], scale, scores, None)
            _attention_kernel[(part.stop - begin,)](
                scores, counts[part], p[part], 1 / (heads * len(queries)), heads, k, block_h, block, num_warps=8
            )
    return p
