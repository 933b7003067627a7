"""Absorbed MLA over selected rows: gather by Selection, online softmax, split over the Selection when rows are few.

Shape legend: T rows, N storage rows, H heads, K selected, C latent, R rope, B requests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglm.ops.triton.launch import INTERPRETED, architecture, power, tuned
from nanoglm.ops.work import tally

LEAST_SPLIT = 128  # selected rows of one program, when a row's Selection is split


class Tiles(NamedTuple):
    """heads: of one program. keys: gathered at once."""

    heads: int
    keys: int
    warps: int
    stages: int


TILES = {
    "sm_90": Tiles(64, 64, 8, 2),
    "sm_89": Tiles(16, 32, 4, 2),
    "gfx942": Tiles(16, 32, 4, 1),
    "portable": Tiles(16, 16, 4, 1),
}


@triton.jit(do_not_specialize=["table_row"])  # it changes from step to step: one kernel for all
def _locate(
    selection, requests, table, rows, counts, selected, table_row, PAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    pages = table + tl.load(requests + t).to(tl.int64) * table_row
    s = tl.load(selection + t * selected + i, mask=i < selected, other=-1)
    row = tl.load(pages + s // PAGE, mask=s >= 0, other=0) * PAGE + s % PAGE
    tl.store(rows + t * selected + i, tl.where(s >= 0, row, -1), mask=i < selected)
    tl.store(counts + t, tl.sum((s >= 0).to(tl.int32)))


def rows_of(selection: Tensor, requests: Tensor, table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Storage rows int32 [T, K] of a Selection, -1 at empty places, and how many each row has, int32 [T]: attention
    then waits for one load, not for three."""
    selection, table = selection.int().contiguous(), table.int().contiguous()
    count, selected = selection.shape
    rows, counts = torch.empty_like(selection), selection.new_empty(count)
    if count:
        _locate[(count,)](
            selection, requests, table, rows, counts, selected, table.stride(0),
            PAGE=page_size, BLOCK=triton.next_power_of_2(selected),
        )  # fmt: skip
    return rows, counts


@triton.jit
def _attend(
    q_latent, q_rope, latent, rope, rows, counts, out, sums,
    scale, heads, latent_dim, rope_dim, selected, latent_row, rope_row, split_size,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    c, r, i = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, KEYS)
    in_c, in_r, in_h = c < latent_dim, r < rope_dim, h < heads
    at_c = (t * heads + h)[:, None] * latent_dim + c[None, :]
    at_r = (t * heads + h)[:, None] * rope_dim + r[None, :]
    q_HC = tl.load(q_latent + at_c, mask=in_h[:, None] & in_c[None, :], other=0.0)
    q_HR = tl.load(q_rope + at_r, mask=in_h[:, None] & in_r[None, :], other=0.0)
    if WIDE:
        q_HC, q_HR = q_HC.to(tl.float32), q_HR.to(tl.float32)
    rows += t * selected
    begin = tl.program_id(2) * split_size
    stop = tl.minimum(begin + split_size, tl.load(counts + t))  # what is not selected is never read
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    total_HK = tl.zeros((HEADS, KEYS), tl.float32)  # summed over keys at the end, not across warps each time
    out_HC = tl.zeros((HEADS, LATENT), tl.float32)
    row = tl.load(rows + begin + i, mask=begin + i < stop, other=0)
    for low in tl.range(begin, stop, KEYS, num_stages=STAGES):
        valid, at = low + i < stop, (row.to(tl.int64) if LONG else row)[:, None]
        row = tl.load(rows + low + KEYS + i, mask=low + KEYS + i < stop, other=0)  # of the next turn, in time
        c_KC = tl.load(latent + at * latent_row + c[None, :], mask=valid[:, None] & in_c[None, :], other=0.0)
        r_KR = tl.load(rope + at * rope_row + r[None, :], mask=valid[:, None] & in_r[None, :], other=0.0)
        if WIDE:
            c_KC, r_KR = c_KC.to(tl.float32), r_KR.to(tl.float32)
        scores = tl.dot(q_HC, tl.trans(c_KC), input_precision="ieee")
        scores = tl.dot(q_HR, tl.trans(r_KR), scores, input_precision="ieee")
        scores = tl.where(valid[None, :], scores * (scale * 1.4426950408889634), float("-inf"))  # exp as exp2
        new = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
        old, p = tl.exp2(most - shift), tl.exp2(scores - shift[:, None])
        total_HK = total_HK * old[:, None] + p
        out_HC = tl.dot(p.to(c_KC.dtype), c_KC, out_HC * old[:, None], input_precision="ieee")
        most = new
    total = tl.sum(total_HK, 1)
    if SPLIT:  # unnormalised, with what joining needs
        place = (t * tl.num_programs(2) + tl.program_id(2)) * heads + h
        tl.store(out + place[:, None] * latent_dim + c[None, :], out_HC, mask=in_h[:, None] & in_c[None, :])
        tl.store(sums + place * 2, most, mask=in_h)
        tl.store(sums + place * 2 + 1, total, mask=in_h)
    else:
        out_HC = out_HC / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + at_c, out_HC.to(out.dtype.element_ty), mask=in_h[:, None] & in_c[None, :])


@triton.jit
def _join(parts, sums, out, heads, latent_dim, splits, SPLITS: tl.constexpr, LATENT: tl.constexpr):
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, c = tl.arange(0, SPLITS), tl.arange(0, LATENT)
    place = (t * splits + split) * heads + h
    most = tl.load(sums + place * 2, mask=split < splits, other=float("-inf"))
    total = tl.load(sums + place * 2 + 1, mask=split < splits, other=0.0)
    weight = tl.exp2(most - tl.maximum(tl.max(most), -1e30))
    mask = (split < splits)[:, None] & (c < latent_dim)[None, :]
    part = tl.load(parts + place[:, None] * latent_dim + c[None, :], mask=mask, other=0.0)
    total = tl.sum(total * weight)
    joined = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + (t * heads + h) * latent_dim + c, joined.to(out.dtype.element_ty), mask=c < latent_dim)


def sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor, table: Tensor,
    page_size: int, scale: float, places: Tensor | None = None, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.torch_tiled.sparse_attention`: [T, H, C] and [T, H, R] against [N, C] and [N, R].

    Args:
        places, counts: from :func:`rows_of`, if they are known.
    """
    if work := tally():
        work.rows_attended += int((selection >= 0).sum())
    q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
    latent, rope = (x if x.stride(1) == 1 else x.contiguous() for x in (latent, rope))
    out = torch.empty_like(q_latent)
    rows, heads, latent_dim = q_latent.shape
    if not rows:
        return out
    tiles, selected = tuned(TILES, q_latent.device), selection.shape[1]
    block = min(tiles.heads, power(heads))
    splits = splits_of(rows * triton.cdiv(heads, block), selected, q_latent.device)
    size = triton.cdiv(triton.cdiv(selected, splits), tiles.keys) * tiles.keys
    splits = triton.cdiv(selected, size)
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(rows, splits, heads, latent_dim, dtype=torch.float32, device=out.device)
        sums = torch.empty(rows, splits, heads, 2, dtype=torch.float32, device=out.device)
    if places is None or counts is None:
        places, counts = rows_of(selection, requests, table, page_size)
    grid = rows, triton.cdiv(heads, block), splits
    split, long = splits > 1, len(latent) * max(latent.stride(0), rope.stride(0)) >= 1 << 31
    if special := _hopper(q_latent, rope):
        special.attend[grid](
            q_latent, q_rope, latent, rope, places, counts, parts, sums,
            scale, heads, selected, latent.stride(0), rope.stride(0), size,
            HEADS=block, LATENT=latent_dim, ROPE=rope.shape[1], KEYS=tiles.keys, SPLIT=split, LONG=long, num_warps=8,
        )  # fmt: skip
    else:
        attend: Any = _attend
        attend[grid](
            q_latent, q_rope, latent, rope, places, counts, parts, sums,
            scale, heads, latent_dim, rope.shape[1], selected, latent.stride(0), rope.stride(0), size,
            HEADS=block, LATENT=power(latent_dim), ROPE=power(rope.shape[1]), KEYS=tiles.keys,
            SPLIT=split, LONG=long, WIDE=INTERPRETED, STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    if splits > 1:
        _join[(rows, heads)](
            parts, sums, out, heads, latent_dim, splits,
            SPLITS=triton.next_power_of_2(splits), LATENT=power(latent_dim),
        )  # fmt: skip
    return out


def _hopper(q_latent: Tensor, rope: Tensor) -> Any:
    """The kernel made for this card and shape, if it is one."""
    if not (q_latent.is_cuda and architecture(q_latent.device) == "sm_90"):
        return None
    try:
        from nanoglm.ops.triton import hopper
    except ImportError:  # a Triton without Gluon
        return None
    return hopper if hopper.serves(q_latent, rope) else None


def splits_of(programs: int, selected: int, device: torch.device) -> int:
    """Into how many parts a Selection is cut so that programs fill the card."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(cores // max(programs, 1), selected // LEAST_SPLIT))
