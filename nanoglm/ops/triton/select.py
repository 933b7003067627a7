"""Indexer scores and their top-k in two kernels over a bounded scratch: never T x S scores at once.

The first writes the scores of some rows against all keys, and the best score of every group of neighbours. The
second, one program a row, finds the k-th best group; what is worth looking at lies in the k best groups alone, so of
long rows it reads little. Then it bisects on the bits of the scores, which is exact, and keeps among equal scores the
lower positions: the tie rule of :func:`nanoglm.ops.torch_tiled.sort_keys`.

Shape legend: T rows, S keys, J indexer heads, I index dim, B requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglm.ops.triton.launch import INTERPRETED, power, tuned
from nanoglm.ops.work import tally_pairs

SCRATCH = 1 << 28  # elements of scores held at once, and as many places
FEW, SHORT = 64, 512  # rows up to which programs take only so many keys each: else they would not fill a card
PLACES = 1024  # scores that a program of the top-k looks at together, when there are many rows
FP8 = torch.float8_e4m3fn


class Tiles(NamedTuple):
    """columns: rows times heads that a program scores together. keys: at once. chunk: keys of one program."""

    columns: int
    keys: int
    chunk: int
    warps: int
    stages: int


TILES = {
    "sm_90": Tiles(256, 64, 32768, 4, 2),
    "sm_89": Tiles(128, 64, 4096, 4, 3),
    "gfx942": Tiles(128, 64, 4096, 4, 2),
    "portable": Tiles(64, 64, 1024, 4, 2),
}


@triton.jit(do_not_specialize=["rows", "table_width"])  # these change from step to step: one kernel for all
def _score(
    q, weights, keys, scales, table, requests, positions, scores, peaks,
    rows, width, table_width, q_row, q_head, heads, dim, key_page, scale_page,
    SCALED: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    t = first + tl.arange(0, ROWS)
    position = tl.load(positions + t, mask=t < rows, other=-1).to(tl.int32)
    request = tl.load(requests + t, mask=t < rows, other=-1).to(tl.int32)
    # Queries as columns: of one row its heads side by side, so their sum stays within a thread or its neighbours.
    column = tl.arange(0, ROWS * HEADS)
    row, head, d = first + column // HEADS, column % HEADS, tl.arange(0, DIM)
    there = (row < rows) & (head < heads)
    at = q + row.to(tl.int64)[None, :] * q_row + head[None, :] * q_head + d[:, None]
    q_IN = tl.load(at, mask=there[None, :] & (d[:, None] < dim), other=0.0)
    weight = tl.load(weights + row * heads + head, mask=there, other=0.0)
    if WIDE:
        q_IN = q_IN.to(tl.float32)
    begin = tl.program_id(1) * CHUNK
    # Rows of a tile are of one request in most cases; of several, each has its turn and the others are masked.
    for current in range(tl.load(requests + first).to(tl.int32), tl.max(request) + 1):
        mine = request == current
        stop = tl.minimum(tl.max(tl.where(mine, position, -1)) + 1, begin + CHUNK)
        pages = table + current * table_width
        next_page = tl.load(pages + begin // PAGE, mask=begin < stop, other=0)
        for low in tl.range(begin, stop, KEYS, num_stages=STAGES):
            s = low + tl.arange(0, KEYS)
            inside = (s < stop)[:, None] & (d < dim)[None, :]
            if PAGE % KEYS == 0:  # the tile lies in one page
                page, slot = next_page.to(tl.int64), low % PAGE
                next_page = tl.load(pages + (low + KEYS) // PAGE, mask=low + KEYS < stop, other=0)  # in time
                start = keys + page * key_page + slot * dim
                k_SI = tl.load(start + tl.arange(0, KEYS)[:, None] * dim + d[None, :], mask=inside, other=0.0)
                slot += tl.arange(0, KEYS)
            else:
                page, slot = tl.load(pages + s // PAGE, mask=s < stop, other=0).to(tl.int64), s % PAGE
                storage = page * key_page + slot * dim
                k_SI = tl.load(keys + storage[:, None] + d[None, :], mask=inside, other=0.0)
            if WIDE:
                k_SI = k_SI.to(tl.float32)
            pair = tl.maximum(tl.dot(k_SI, q_IN, input_precision="ieee"), 0.0) * weight[None, :]
            score = tl.sum(tl.reshape(pair, (KEYS, ROWS, HEADS)), 2)  # [S, T]
            if SCALED:
                score *= tl.load(scales + page * scale_page + slot, mask=s < stop, other=0.0)[:, None]
            score = tl.where(s[:, None] <= position[None, :], score, float("-inf"))
            mask = mine[None, :] & (s < width)[:, None]
            tl.store(scores + t.to(tl.int64)[None, :] * width + s[:, None], score, mask=mask)
            if GROUP > 1:
                best = tl.max(tl.reshape(score, (KEYS // GROUP, GROUP, ROWS)), 1)
                g = low // GROUP + tl.arange(0, KEYS // GROUP)
                place = t.to(tl.int64)[None, :] * (width // GROUP) + g[:, None]
                tl.store(peaks + place, best, mask=mine[None, :] & (g < width // GROUP)[:, None])


@triton.jit
def _ordered(score):
    """Bits of fp32 scores as int32 in the order of the scores; -0.0 is +0.0. Below the greatest int32, so that one more
    is more: a NaN may have those bits."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score == 0.0, 0, tl.minimum(bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFE))


@triton.jit
def _threshold(values, n, k, PLACES: tl.constexpr):
    """The greatest v, as ordered bits, that at least k of n > k values reach, or one between it and the next."""
    i = tl.arange(0, PLACES)
    least, most = tl.full((PLACES,), 0x7FFFFFFF, tl.int32), tl.full((PLACES,), -0x7FFFFFFF, tl.int32)
    for begin in range(0, n, PLACES):
        inside = begin + i < n
        bits = _ordered(tl.load(values + begin + i, mask=inside, other=0.0))
        least = tl.minimum(least, tl.where(inside, bits, 0x7FFFFFFF))
        most = tl.maximum(most, tl.where(inside, bits, -0x7FFFFFFF))
    low, high = tl.min(least), tl.max(most) + 1  # at least k reach low, fewer than k reach high
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        reach = tl.zeros((PLACES,), tl.int32)
        for begin in range(0, n, PLACES):
            bits = _ordered(tl.load(values + begin + i, mask=begin + i < n, other=float("-inf")))
            reach += ((bits >= middle) & (begin + i < n)).to(tl.int32)
        count = tl.sum(reach)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, middle)  # exactly k: that will do
    return low


@triton.jit
def _narrow(scores, peaks, places, n, groups, k, GROUP: tl.constexpr, PLACES: tl.constexpr):
    """Moves the scores that reach the k-th best peak to the front of the row, in order, and notes their positions.

    Those of the top k are among them. What is moved goes to a place that has been read already, never to a later one;
    barriers keep a tile's reads before its writes, and all writes before the next part reads them.
    """
    least = _threshold(peaks, groups, k, PLACES)
    i = tl.arange(0, PLACES)
    listed = 0
    for begin in range(0, groups, PLACES):
        bits = _ordered(tl.load(peaks + begin + i, mask=begin + i < groups, other=float("-inf")))
        good = ((bits >= least) & (begin + i < groups)).to(tl.int32)
        tl.debug_barrier()
        # The list of good groups replaces the peaks, as floats, which are exact below 2^24.
        tl.store(peaks + listed + tl.cumsum(good, 0) - 1, (begin + i).to(tl.float32), mask=good > 0)
        listed += tl.sum(good)
    tl.debug_barrier()
    held = 0
    for begin in range(0, listed * GROUP, PLACES):
        inside = begin + i < listed * GROUP
        group = tl.load(peaks + (begin + i) // GROUP, mask=inside, other=0.0).to(tl.int32)
        s = group * GROUP + i % GROUP
        inside &= s < n
        score = tl.load(scores + s, mask=inside, other=float("-inf"))
        good = ((_ordered(score) >= least) & inside).to(tl.int32)
        place = held + tl.cumsum(good, 0) - 1
        tl.debug_barrier()
        tl.store(scores + place, score, mask=good > 0)
        tl.store(places + place, s, mask=good > 0)
        held += tl.sum(good)
    tl.debug_barrier()
    return held


@triton.jit
def _choose(
    scores, peaks, places, positions, out, width, k,
    GROUP: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    n = tl.load(positions + t).to(tl.int32) + 1
    scores += t.to(tl.int64) * width
    places += t.to(tl.int64) * width
    out += t.to(tl.int64) * k
    i = tl.arange(0, PLACES)
    for begin in range(tl.minimum(n, k), k, PLACES):
        tl.store(out + begin + i, tl.full((PLACES,), -1, tl.int32), mask=begin + i < k)
    if n <= k:
        for begin in range(0, n, PLACES):
            tl.store(out + begin + i, begin + i, mask=begin + i < n)
    else:
        held = n
        groups = tl.cdiv(n, GROUP)
        narrowed = (groups > k) & (GROUP > 1)
        if narrowed:
            held = _narrow(scores, peaks + t.to(tl.int64) * (width // GROUP), places, n, groups, k, GROUP, PLACES)
        least = _threshold(scores, held, k, PLACES)
        above = tl.zeros((PLACES,), tl.int32)
        for begin in range(0, held, PLACES):
            bits = _ordered(tl.load(scores + begin + i, mask=begin + i < held, other=float("-inf")))
            above += ((bits > least) & (begin + i < held)).to(tl.int32)
        room = k - tl.sum(above)  # for scores equal to the least: the first of them
        equal_before, kept_before = 0, 0
        for begin in range(0, held, PLACES):
            inside = begin + i < held
            bits = _ordered(tl.load(scores + begin + i, mask=inside, other=float("-inf")))
            equal = ((bits == least) & inside).to(tl.int32)
            kept = ((bits > least) & inside) | ((equal > 0) & (equal_before + tl.cumsum(equal, 0) <= room))
            at = tl.where(narrowed, tl.load(places + begin + i, mask=inside & narrowed, other=0), begin + i)
            slot = kept_before + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(out + slot, at, mask=kept & (slot < k))  # whatever scores are, nothing beyond the row
            equal_before += tl.sum(equal)
            kept_before += tl.sum(kept.to(tl.int32))


def select(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int, borders: Sequence[int],
    lengths: Sequence[int], k: int, requests: Tensor, positions: Tensor,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.torch_tiled.select`, keys [N, I] or [pages, page_size, I], or an :func:`fp8_pool`.

    Rows are where the tensors say, requests and positions int64 [T]; the numbers in ``lengths`` only bound the grid,
    so in a captured graph they may be those of the longest requests to come.
    """
    tally_pairs(borders, lengths)
    rows, heads, dim = q.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=q.device)
    if not rows:
        return out
    scales, scaled = weights, keys.dtype == torch.uint8
    if scaled:
        q, q_scale = quantise(q)
        weights, (keys, scales) = weights * q_scale, halves(keys)
    else:
        keys = keys.flatten(0, -2).contiguous()
    key_page, scale_page = (keys.stride(0), scales.stride(0)) if scaled else (page_size * dim, 0)
    q = q if q.stride(2) == 1 else q.contiguous()
    weights, table = weights.float().contiguous(), table.int().contiguous()
    tiles = tuned(TILES, q.device)
    padded = triton.next_power_of_2(heads)
    longest = max(end - begin for begin, end in zip(borders, borders[1:], strict=False))
    together = min(max(1, tiles.columns // padded), triton.next_power_of_2(longest))
    together = max(together, -(-16 // padded))  # of columns tl.dot needs 16
    width = -(-max(lengths) // tiles.keys) * tiles.keys
    group = next((size for size in (64, 32, 16, 8) if size <= tiles.keys and width >= 4 * size * k), 1)
    step = min(rows, max(1, SCRATCH // width // together) * together)
    chunk, places, warps = (tiles.chunk, PLACES, 4) if rows > FEW else (SHORT, 4 * PLACES, 16)
    scores = torch.empty(step, width, dtype=torch.float32, device=q.device)
    peaks = torch.empty(step, width // group if group > 1 else 0, dtype=torch.float32, device=q.device)
    positions_kept = torch.empty(scores.shape if group > 1 else (0,), dtype=torch.int32, device=q.device)
    score: Any = _score
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        seen = [  # where the last row of each request within this part stands, and one more
            length - (borders[b + 1] - min(end, borders[b + 1]))
            for b, length in enumerate(lengths) if borders[b] < end and borders[b + 1] > begin
        ]  # fmt: skip
        grid, part = (triton.cdiv(end - begin, together), triton.cdiv(max(seen), chunk)), slice(begin, end)
        score[grid](
            q[part], weights[part], keys, scales, table, requests[part], positions[part], scores, peaks,
            end - begin, width, table.shape[1], q.stride(0), q.stride(1), heads, dim, key_page, scale_page,
            SCALED=scaled, PAGE=page_size, ROWS=together, HEADS=padded, DIM=power(dim, 32 if scaled else 16),
            KEYS=tiles.keys, CHUNK=chunk, GROUP=group, WIDE=INTERPRETED, STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
        _choose[(end - begin,)](
            scores, peaks, positions_kept, positions[part], out[part], width, k,
            GROUP=group, PLACES=places, num_warps=warps,
        )  # fmt: skip
    return out


# ------------------------------------------------------------------------------ FP8 keys
def fp8_pool(pages: int, page_size: int, dim: int, device: torch.device | str) -> Tensor:
    """Zeros for index keys as uint8 [pages, page_size * (I + 4)]: a page's keys in e4m3, then its fp32 scales."""
    return torch.zeros(pages, page_size * (dim + 4), dtype=torch.uint8, device=device)


def halves(pool: Tensor) -> tuple[Tensor, Tensor]:
    """Views of an :func:`fp8_pool` of pages of 64: keys e4m3 [pages, 64 I] and scales fp32 [pages, 64]."""
    return pool[:, :-256].view(FP8), pool[:, -256:].view(torch.float32)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., I] -> e4m3 of the same shape and fp32 scales [...], powers of two (architecture spec 2.6, FP8 scoring)."""
    x = x.float()
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1).clamp(min=1e-4) / 448)))
    return (x / scale[..., None]).to(FP8), scale


def append_fp8(pool: Tensor, keys: Tensor, slots: Tensor) -> None:
    """Writes index keys [T, I] at storage rows slots int64 [T] of an :func:`fp8_pool` of pages of 64."""
    values, scales = halves(pool)
    key, scale = quantise(keys)
    page, slot = slots // 64, slots % 64
    values.view(torch.uint8).unflatten(1, (64, -1))[page, slot] = key.view(torch.uint8)
    scales[page, slot] = scale
