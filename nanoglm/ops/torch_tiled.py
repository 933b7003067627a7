"""The default backend: plain PyTorch in tiles, O(tile) extra memory, on any device.

Shape legend: T rows of the ragged batch, N storage rows, H heads, K selected, C latent, R rope,
I index dim, J indexer heads, D hidden, E experts, W expert width, B requests.

**Each row's arithmetic is independent of its batch.** A row's result may not depend on how many
rows stand beside it, on chunking or on pages; that is what makes chunked prefill, batching,
prefix reuse and speculation change no greedy token. Four measures give it on a CPU: GEMM rows are
padded to a multiple of 16 (fp32 kernels change below 12), keys are scored in tiles that begin at
fixed positions and whose width is a multiple of 64, attention always works at the full width K, and
sigmoids are built from exp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.ops.batch import storage_rows
from nanoglm.ops.work import tally

ROW_MULTIPLE = 16  # measured: fp32 F.linear gives other bits for 1, 2, 10 and 11 rows
QUERY_TILE = 64
KEY_TILE = 1024
SEGMENT = 8 * KEY_TILE  # keys whose scores are merged at once
GROUP = 16  # neighbours of which only the best is compared first
KEY_MULTIPLE = 64
GATHER_ELEMENTS = 1 << 21  # attention gathers at most this many latent values at once
_LOWEST = torch.iinfo(torch.int64).min


def wide(x: Tensor) -> Tensor:
    """In fp32, or as it is if wider: sums and functions are never taken in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] with weight [out, in] -> [T, out]; a row's bits do not depend on T."""
    rows = x.shape[0]
    padding = -rows % ROW_MULTIPLE if x.device.type == "cpu" else 0
    if not padding:
        return F.linear(x, weight)
    return F.linear(F.pad(x, (0, 0, 0, padding)), weight)[:rows]


def headwise(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, a] with weight [H, a, b] -> [T, H, b]; a row's bits do not depend on T."""
    rows = x.shape[0]
    padding = -rows % ROW_MULTIPLE if x.device.type == "cpu" else 0
    x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)[:rows]


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). torch.sigmoid and F.silu take other code for the tail of a vector loop, so a
    value's bits would depend on where it lies; exp's do not (measured), and the rest is exact."""
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) in fp32, cast once."""
    x_wide = wide(x)
    return (x_wide * sigmoid(x_wide)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * x / sqrt(mean(x²) + eps); statistics and product in fp32, one cast."""
    x_wide = wide(x)
    x_wide = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * wide(weight)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with weight and bias in fp32, one cast."""
    return F.layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x_2i, x_2i+1) of x [T, ...] or [T, H, ...] turned by the angles of cos and sin [T, R / 2]; dims behind R
    stay."""
    turned = 2 * cos.shape[1]
    if x.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = wide(x[..., 0:turned:2]), wide(x[..., 1:turned:2])
    y = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)
    return y if turned == x.shape[-1] else torch.cat([y, x[..., turned:]], -1)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., I] -> int8 of the same shape and fp32 scales [...]: symmetric, the largest value becomes 127."""
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=1e-30) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


# ------------------------------------------------------------------------------ selection
def sort_keys(scores: Tensor, positions: Tensor) -> Tensor:
    """The total tie rule as one int64: higher score first, -0.0 = +0.0, then lower position.

    scores fp32 (wider ones are rounded to it), positions int64, broadcastable. Monotone bits of the
    score stand above the inverted position, so all keys of a row differ and any top-k is deterministic.
    """
    bits = (scores.float() + 0.0).view(torch.int32)
    monotone = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((monotone.long() + 1) << 32) - 1 - positions  # no constant of 64 bits: compilers count places in 32


def top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest fp32 scores [T, n] under the total tie rule, best first. int64 [T, k]."""
    return sort_keys(scores, torch.arange(scores.shape[-1], device=scores.device)).topk(k).indices


def select(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int,
    borders: Sequence[int], lengths: Sequence[int], k: int,
) -> Tensor:  # fmt: skip
    """Lightning indexer scores fused with a streaming top-k (architecture spec 2.6).

    q [T, J, I], weights fp32 [T, J] (both scales folded in), keys [N, I]. Returns the Selection,
    int32 [T, k]: logical positions ascending, -1 after the valid ones.
    """
    out = torch.empty(q.shape[0], k, dtype=torch.int32, device=q.device)
    for b, length in enumerate(lengths):
        for begin in range(borders[b], borders[b + 1], QUERY_TILE):
            end = min(begin + QUERY_TILE, borders[b + 1])
            first = length - (borders[b + 1] - begin)  # logical position of row `begin`
            best = _best_keys(q[begin:end], weights[begin:end], keys, table[b], page_size, first, k)
            found = torch.where(best == _LOWEST, 1 << 32, 0xFFFFFFFF - (best & 0xFFFFFFFF))
            found = found.sort(-1).values
            out[begin:end] = torch.where(found >> 32 != 0, -1, found).int()
    return out


def _best_keys(q: Tensor, weights: Tensor, keys: Tensor, pages: Tensor, page_size: int, first: int, k: int) -> Tensor:
    """The k largest sort keys of each row of one query tile, int64 [t, k], unordered."""
    rows, heads, dim = q.shape
    padding = -rows % (ROW_MULTIPLE // math.gcd(ROW_MULTIPLE, heads))  # rows * heads GEMM rows
    q = F.pad(q.float(), (0, 0, 0, 0, 0, padding)).reshape(-1, dim)
    weights = F.pad(weights.float(), (0, 0, 0, padding))
    at = torch.arange(first, first + rows, device=q.device)[:, None]
    best = torch.full((rows, k), _LOWEST, dtype=torch.int64, device=q.device)
    stop = first + rows
    end = -(-stop // KEY_MULTIPLE) * KEY_MULTIPLE
    segment = torch.empty(rows, min(SEGMENT, end), device=q.device)
    for begin in range(0, stop, SEGMENT):
        scores = segment[:, : min(SEGMENT, end - begin)]
        for low in range(begin, begin + scores.shape[1], KEY_TILE):
            high = min(low + KEY_TILE, end)
            lookup = torch.arange(low, high, device=q.device).clamp_(max=stop - 1)
            key_tile = keys[pages[lookup // page_size].long() * page_size + lookup % page_size].float()
            pair = torch.mm(q, key_tile.T).relu_().view(rows + padding, heads, high - low)
            scores[:, low - begin : high - begin] = torch.bmm(weights[:, None], pair)[:rows, 0]
        pairs = scores.numel()
        if begin + scores.shape[1] > first + 1:  # beyond what the first row may see
            visible = torch.arange(begin, begin + scores.shape[1], device=q.device) <= at
            scores.masked_fill_(~visible, -torch.inf)
            pairs = int(visible.sum()) if tally() else 0
        if work := tally():
            work.pairs_scored += pairs
        best = _merge(best, scores, begin)
    return best


def _merge(best: Tensor, scores: Tensor, begin: int) -> Tensor:
    """The k largest of ``best`` [t, k] and of a segment's scores [t, n], which stand at positions from ``begin`` on.

    In two levels: only where the best of a group of neighbours may enter is the group looked at. Segments come in
    ascending position, so an equal score loses against what is already held.
    """
    rows, k = best.shape
    held = _scores_of(best.amin(-1, keepdim=True))  # -inf as long as there is room: such a score never enters
    group = GROUP
    while group > 1 and scores.shape[1] // group < 2 * k:
        group //= 2
    grouped = scores.view(rows, -1, group)
    peaks = grouped.amax(-1)
    least = peaks.topk(k).values.amin(-1, keepdim=True) if peaks.shape[1] >= k else held  # k keys are no worse
    row, column = ((peaks > held) & (peaks >= least)).nonzero(as_tuple=True)
    found = grouped[row, column]
    place, inside = ((found > held[row]) & (found >= least[row])).nonzero(as_tuple=True)
    if not place.numel():
        return best
    row, column = row[place], column[place] * group + inside
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(row.numel(), device=best.device) - (counts.cumsum(0) - counts)[row]
    candidates = best.new_full((rows, int(counts.max())), _LOWEST)
    candidates[row, place] = sort_keys(scores[row, column], begin + column)
    return torch.cat([best, candidates], 1).topk(k, sorted=False).values


def _scores_of(sort_key: Tensor) -> Tensor:
    """The fp32 score inside a sort key; -inf for an empty place."""
    monotone = (sort_key >> 32).int()
    scores = (monotone ^ ((monotone >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores.masked_fill(sort_key == _LOWEST, -torch.inf)


# ------------------------------------------------------------------------------ attention
def _gather(
    begin: int, end: int, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor, table: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Storage rows [t, K], their latents and ropes in fp32 or wider, and which places are empty [t, 1, K]."""
    chosen = selection[begin:end].long()
    empty = chosen < 0
    # An empty place reads the row's first selected key again: never a row outside the Selection.
    chosen = torch.where(empty, chosen[:, :1], chosen).clamp_(min=0)
    rows = storage_rows(chosen, requests[begin:end, None], table, page_size)
    return rows, wide(latent[rows]), wide(rope[rows]), empty[:, None]


def _tiles(rows: int, width: int) -> range:
    return range(0, rows, max(1, GATHER_ELEMENTS // width))


def sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
    table: Tensor, page_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """Absorbed MLA over the selected rows only (architecture spec 2.5).

    q_latent [T, H, C], q_rope [T, H, R], latent [N, C], rope [N, R], selection int32 [T, K].
    Returns the attended latent [T, H, C]. Softmax and sums in fp32.
    """
    out = q_latent.new_empty(q_latent.shape)
    tiles = _tiles(q_latent.shape[0], selection.shape[1] * (latent.shape[1] + rope.shape[1]))
    for begin in tiles:
        end = min(begin + tiles.step, q_latent.shape[0])
        _, c, r, empty = _gather(begin, end, latent, rope, selection, requests, table, page_size)
        weights = _softmax(wide(q_latent[begin:end]), wide(q_rope[begin:end]), c, r, empty, scale)
        out[begin:end] = torch.bmm(weights, c)
        if work := tally():
            work.rows_attended += int((~empty).sum())
    return out


def _softmax(q_latent: Tensor, q_rope: Tensor, c: Tensor, r: Tensor, empty: Tensor, scale: float) -> Tensor:
    scores = torch.bmm(q_latent, c.mT) + torch.bmm(q_rope, r.mT)
    return scores.mul_(scale).masked_fill_(empty, -torch.inf).softmax(-1)


def sparse_attention_backward(
    grad: Tensor, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor,
    requests: Tensor, table: Tensor, page_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q_latent, q_rope, latent and rope; probabilities are recomputed tile by tile."""
    d_q_latent, d_q_rope = torch.empty_like(q_latent), torch.empty_like(q_rope)
    d_latent, d_rope = torch.zeros_like(wide(latent)), torch.zeros_like(wide(rope))
    tiles = _tiles(q_latent.shape[0], selection.shape[1] * (latent.shape[1] + rope.shape[1]))
    for begin in tiles:
        end = min(begin + tiles.step, q_latent.shape[0])
        rows, c, r, empty = _gather(begin, end, latent, rope, selection, requests, table, page_size)
        ql, qr, g = (wide(x[begin:end]) for x in (q_latent, q_rope, grad))
        weights = _softmax(ql, qr, c, r, empty, scale)
        d_weights = torch.bmm(g, c.mT)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        d_q_latent[begin:end] = torch.bmm(d_scores, c)
        d_q_rope[begin:end] = torch.bmm(d_scores, r)
        d_latent.index_add_(0, rows.flatten(), (torch.bmm(d_scores.mT, ql) + torch.bmm(weights.mT, g)).flatten(0, 1))
        d_rope.index_add_(0, rows.flatten(), torch.bmm(d_scores.mT, qr).flatten(0, 1))
    return d_q_latent, d_q_rope, d_latent.to(latent.dtype), d_rope.to(rope.dtype)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Sequence[int], scale: float, selection: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Expanded causal attention within each sequence (architecture spec 2.4).

    q [T, H, a], k [S, H, a], v [S, H, b] -> [T, H, b]. A sequence's keys are ``lengths`` many, of which its rows of q
    are the last; None: as many as rows. With a Selection every causal pair is still computed and the unselected
    are masked: the cheaper way to *train* at lengths near k. Autograd is PyTorch's.
    """
    counts = [end - begin for begin, end in zip(borders, borders[1:], strict=False)]
    lengths = counts if lengths is None else list(lengths)
    if len({*zip(counts, lengths, strict=True)}) > 1:  # ragged: one sequence at a time
        parts, ends = [], list(accumulate(lengths))
        for begin, end, last, length in zip(borders, borders[1:], ends, lengths, strict=False):
            if begin < end:
                rows, keys, part = slice(begin, end), slice(last - length, last), None
                if selection is not None:
                    part = selection[rows]
                parts.append(dense_attention(q[rows], k[keys], v[keys], (0, end - begin), scale, part, (length,)))
        return torch.cat(parts)
    count, length = counts[0], lengths[0]
    q = q.unflatten(0, (-1, count)).transpose(1, 2)
    k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (k, v))
    if selection is None and count == length:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        tiles = []
        for begin in range(0, count, 256):
            rows = slice(begin, min(begin + 256, count))
            end = length - count + rows.stop  # no row of the tile sees more
            if selection is None:
                at = torch.arange(end, device=q.device)
                mask = at <= at[length - count + begin :, None]
            else:
                chosen = selection.unflatten(0, (-1, count))[:, rows].long()
                mask = torch.zeros(*chosen.shape[:2], end + 1, dtype=torch.bool, device=q.device)
                mask.scatter_(2, torch.where(chosen < 0, end, chosen), True)  # column `end` takes the empty places
                mask = mask[:, None, :, :end]
            tiles.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, :end], v[:, :, :end], mask, scale=scale))
        out = torch.cat(tiles, 2)
    return out.transpose(1, 2).flatten(0, 1)


# ------------------------------------------------------------------------------ experts
def _by_expert(ids: Tensor, experts: int) -> list[Tensor]:
    """For each expert, the slots (row * k + choice) that chose it, ascending."""
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=experts).tolist()
    return list(flat.argsort(stable=True).split(counts))


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Routed SwiGLU experts (architecture spec 2.9, step 5 without the shared expert).

    x [T, D], ids int64 [T, k], weights fp32 [T, k], gate_up [E, 2W, D] (gate rows first),
    down [E, D, W] -> [T, D]. A row's k results are added in the order of its choices, whatever the batch.
    """
    k = ids.shape[1]
    results = x.new_empty(ids.numel(), x.shape[1])
    for expert, slots in enumerate(_by_expert(ids, gate_up.shape[0])):
        if slots.numel():
            gate, up = linear(x[slots // k], gate_up[expert]).chunk(2, -1)
            results[slots] = linear(silu(gate) * up, down[expert])
    return (wide(results.view(*ids.shape, x.shape[1])) * weights[..., None]).sum(1).to(x.dtype)


def experts_int8(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """Routed experts with int8 weights [E, 2W, D], [E, D, W] and a scale per output; x is quantised per row."""

    def product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        values, row_scale = quantise(rows)
        whole = values.double() @ weight.double().mT  # exact: int8 sums of any width stay below 2^53
        return whole.float() * row_scale[:, None] * scale

    k, results = ids.shape[1], torch.empty(ids.numel(), x.shape[1], device=x.device)
    for expert, slots in enumerate(_by_expert(ids, gate_up.shape[0])):
        if slots.numel():
            gate, up = product(x[slots // k], gate_up[expert], gate_up_scale[expert]).chunk(2, -1)
            results[slots] = product(silu(gate) * up, down[expert], down_scale[expert])
    return (results.view(*ids.shape, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)


def experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down; activations are recomputed expert by expert."""
    k = ids.shape[1]
    d_x, d_weights = torch.zeros_like(x), torch.zeros_like(weights)
    d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert, slots in enumerate(_by_expert(ids, gate_up.shape[0])):
        if not slots.numel():
            continue
        rows = slots // k
        x_rows, g_rows = x[rows], grad[rows]
        gate, up = F.linear(x_rows, gate_up[expert]).chunk(2, -1)
        open_ = sigmoid(gate)
        active = gate * open_
        hidden = active * up
        d_hidden = g_rows @ down[expert]  # before the routing weight
        d_weights.view(-1)[slots] = (d_hidden * hidden).sum(-1).to(weights.dtype)
        scaled = g_rows * weights.view(-1)[slots, None].to(x.dtype)
        d_down[expert] = scaled.mT @ hidden
        d_hidden = d_hidden * weights.view(-1)[slots, None].to(x.dtype)
        d_gate = d_hidden * up * (open_ + active * (1 - open_))
        d_both = torch.cat([d_gate, d_hidden * active], -1)
        d_gate_up[expert] = d_both.mT @ x_rows
        d_x.index_add_(0, rows, d_both @ gate_up[expert])
    return d_x, d_weights, d_gate_up, d_down


# ------------------------------------------------------------------------------ cache
def cache_append(pool: Tensor, values: Tensor, slots: Tensor) -> None:
    """Writes values [T, dim] into pool [pages, page_size, dim] at storage rows slots int64 [T]."""
    pool.flatten(0, 1).index_copy_(0, slots, values.to(pool.dtype))
