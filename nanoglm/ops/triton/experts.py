"""Routed SwiGLU experts as grouped matrix products, forward and backward.

Shape legend: T rows of the ragged batch, k choices of a row, S = T * k slots (row * k + choice), D hidden, E experts,
W expert width.

Slots are sorted by expert, and an expert's slots are cut into tiles of a fixed number of rows; a program computes one
tile of rows by one block of columns. How many tiles there are is known on the device only, so a bound of it is
launched and the programs of empty tiles end at once. Nothing is added atomically: sums over the choices of a row and
over the slots of an expert have one order, and a call repeated gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanoglm.ops.triton.launch import INTERPRETED, power, tuned


class Tile(NamedTuple):
    """Columns of a program's result and how many inputs it takes in a step, with Triton's launch options."""

    columns: int
    inner: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Kernels that take `rows` slots of an expert at a time: those that hold a gate and an up, and plain products."""

    rows: int
    pair: Tile
    single: Tile


# By mean slots per expert, the first that suffices: to read weights at full bandwidth, then to compute.
TILES: dict[str, tuple[Tiles, ...]] = {
    "sm_90": (
        Tiles(16, Tile(32, 128, 4, 3), Tile(128, 128, 4, 3)),
        Tiles(64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
        Tiles(128, Tile(128, 64, 8, 4), Tile(256, 64, 8, 4)),
    ),
    "sm_89": (
        Tiles(16, Tile(32, 64, 4, 4), Tile(64, 64, 4, 4)),
        Tiles(64, Tile(64, 32, 4, 4), Tile(128, 32, 4, 4)),
        Tiles(128, Tile(64, 32, 8, 4), Tile(128, 32, 8, 4)),
    ),
    "gfx942": (
        Tiles(16, Tile(32, 128, 4, 2), Tile(64, 128, 4, 2)),
        Tiles(64, Tile(64, 64, 4, 2), Tile(128, 64, 4, 2)),
        Tiles(128, Tile(64, 64, 4, 2), Tile(128, 64, 4, 2)),
    ),
    "portable": (
        Tiles(16, Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        Tiles(64, Tile(32, 32, 4, 3), Tile(64, 32, 4, 3)),
    ),
}
# Gradients of weights: outputs of the weight per program, and a Tile whose inner is slots. Two stages of these go to
# the slots' rows, which must be known before they can be read.
GRADIENT_TILES: dict[str, tuple[int, Tile]] = {
    "sm_90": (128, Tile(128, 64, 4, 5)),
    "sm_89": (128, Tile(64, 32, 4, 5)),
    "gfx942": (128, Tile(128, 32, 4, 2)),
    "portable": (64, Tile(64, 32, 4, 3)),
}
GROUP = 8  # tiles of rows that go through the columns together: their rows stay in L2, weights are read about once


def tiles_for(slots: int, experts: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The smallest tiles of which an expert's slots fill half of one on average, else the largest."""
    # fp32 products run without tensor cores: large tiles would only spill registers.
    table = TILES["portable"] if dtype == torch.float32 else tuned(TILES, device)
    return next((tiles for tiles in table if 2 * slots <= tiles.rows * experts), table[-1])


# ------------------------------------------------------------------------------ routing
class Plan(NamedTuple):
    """Slots sorted by expert and cut into tiles.

    order: int32 [S], slots by expert, ascending within one. borders: int32 [E + 1], where an expert's begin in order.
    tiles: int32 [3, bound], of each tile its expert, first place in order and number of slots, which may be 0.
    """

    order: Tensor
    borders: Tensor
    tiles: Tensor


@triton.jit(do_not_specialize=["slots", "bound"])  # or numbers of rows that are multiples of 16 would be compiled apart
def _plan(
    ids, order, borders, tiles, slots, bound,
    ROWS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per expert finds its slots by reading all ids twice; it needs no other's result."""
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    below = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, slots, BLOCK):
        chosen = tl.load(ids + start + at, mask=start + at < slots, other=tl.num_programs(0)).to(tl.int32)
        below += (chosen < expert).to(tl.int32)
        equal += (chosen == expert).to(tl.int32)
    begin = tl.sum(below, 0)
    end = begin + tl.sum(equal, 0)
    tl.store(borders + expert + 1, end)
    if expert == 0:
        tl.store(borders, 0)
    place = begin
    for start in range(0, slots, BLOCK):
        chosen = tl.load(ids + start + at, mask=start + at < slots, other=tl.num_programs(0)).to(tl.int32)
        mine = (chosen == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, start + at, mask=mine > 0)
        place += tl.sum(mine, 0)
    # Where an expert's tiles begin must follow from its own border, or experts would wait for one another. Each of
    # these leaves it at least as many as it needs, and together as many as the bound; those left over are empty.
    if EACH:
        first, after = begin, end
    else:
        first, after = begin // ROWS + expert, end // ROWS + expert + 1
    for start in range(first, after, BLOCK):
        tile = start + at
        row = begin + (tile - first) * ROWS
        count = tl.minimum(tl.maximum(end - row, 0), ROWS)
        tl.store(tiles + tile, expert, mask=tile < after)
        tl.store(tiles + bound + tile, row, mask=tile < after)
        tl.store(tiles + 2 * bound + tile, count, mask=tile < after)


def plan(ids: Tensor, experts: int, rows: int) -> Plan:
    """ids int64 [T, k]; tiles of up to `rows` slots. Never waits for the device."""
    slots = ids.numel()
    bound = min(slots, slots // rows + experts)
    order, borders, tiles = (
        torch.empty(shape, dtype=torch.int32, device=ids.device) for shape in ((slots,), (experts + 1,), (3, bound))
    )
    _plan[(experts,)](
        ids.contiguous(), order, borders, tiles, slots, bound,
        ROWS=rows, EACH=bound == slots, BLOCK=256 if slots <= 256 else 2048, num_warps=4,
    )  # fmt: skip
    return Plan(order, borders, tiles)


# ------------------------------------------------------------------------------ products
@triton.jit
def _place(bound, columns, GROUP: tl.constexpr):
    """This program's tile of rows and block of columns: groups of tiles, in each column after column."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(bound - first, GROUP)
    within = program - first * columns
    return first + within % size, within // size


@triton.jit
def _inside(at, size, EVEN: tl.constexpr):
    """Which places exist: all, and the compiler drops the mask, if blocks divide the size."""
    if EVEN:
        return tl.full(at.shape, 1, tl.int1)
    else:
        return at < size


@triton.jit(do_not_specialize=["bound"])
def _gate_up(
    x, order, tiles, gate_up, out, bound, choices, dim, width,
    SWIGLU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    EVEN_INNER: tl.constexpr, EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of x's rows in order -> out [S, W]; without SWIGLU gate and up themselves -> [S, 2W]."""
    tile, block = _place(bound, tl.cdiv(width, COLUMNS), GROUP)
    count = tl.load(tiles + 2 * bound + tile)
    if count == 0:
        return
    expert = tl.load(tiles + tile).to(tl.int64)
    places = tl.load(tiles + bound + tile) + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < count
    slots = tl.load(order + places, mask=live, other=0)

    inner = tl.arange(0, INNER)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    exist = _inside(columns, width, EVEN_COLUMNS)
    x_at = x + (slots // choices).to(tl.int64)[:, None] * dim + inner[None]
    gate_at = gate_up + expert * (2 * width) * dim + columns[None] * dim + inner[:, None]
    up_at = gate_up + expert * (2 * width) * dim + width * dim + columns[None] * dim + inner[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, dim, INNER):
        inside = _inside(start + inner, dim, EVEN_INNER)
        a = tl.load(x_at, mask=live[:, None] & inside[None], other=0)
        b = tl.load(gate_at, mask=inside[:, None] & exist[None], other=0)
        c = tl.load(up_at, mask=inside[:, None] & exist[None], other=0)
        if WIDE:
            a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
        gate = tl.dot(a, b, gate, input_precision="ieee")
        up = tl.dot(a, c, up, input_precision="ieee")
        x_at += INNER
        gate_at += INNER
        up_at += INNER

    mask = live[:, None] & (columns < width)[None]
    if SWIGLU:
        hidden = gate * tl.sigmoid(gate) * up
        tl.store(out + places.to(tl.int64)[:, None] * width + columns[None], hidden.to(out.dtype.element_ty), mask=mask)
    else:
        at = out + places.to(tl.int64)[:, None] * (2 * width) + columns[None]
        tl.store(at, gate.to(out.dtype.element_ty), mask=mask)
        tl.store(at + width, up.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["bound"])
def _product(
    rows, order, tiles, weight, out, bound, choices, size, outputs,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    EVEN_INNER: tl.constexpr, EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """rows [S, size] in order by their experts' weight [E, outputs, size] (TRANSPOSED: [E, size, outputs]) -> out
    [S, outputs], each at its slot. GATHER is the other way: rows [T, size] of the batch -> out in order."""
    tile, block = _place(bound, tl.cdiv(outputs, COLUMNS), GROUP)
    count = tl.load(tiles + 2 * bound + tile)
    if count == 0:
        return
    expert = tl.load(tiles + tile).to(tl.int64)
    places = tl.load(tiles + bound + tile) + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < count
    slots = tl.load(order + places, mask=live, other=0)
    read = (slots // choices if GATHER else places).to(tl.int64)
    written = (places if GATHER else slots).to(tl.int64)

    inner = tl.arange(0, INNER)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    exist = _inside(columns, outputs, EVEN_COLUMNS)
    stride, step = (1, outputs) if TRANSPOSED else (size, 1)  # to the next output, and to the next input
    a_at = rows + read[:, None] * size + inner[None]
    b_at = weight + expert * outputs * size + columns[None] * stride + inner[:, None] * step
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, INNER):
        inside = _inside(start + inner, size, EVEN_INNER)
        a = tl.load(a_at, mask=live[:, None] & inside[None], other=0)
        b = tl.load(b_at, mask=inside[:, None] & exist[None], other=0)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_at += INNER
        b_at += INNER * step
    mask = live[:, None] & (columns < outputs)[None]
    tl.store(out + written[:, None] * outputs + columns[None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine(results, weights, out, dim, K: tl.constexpr, BLOCK: tl.constexpr):
    """results [T, k, D], weights fp32 [T, k] or None (ones) -> [T, D]: a row's results added in turn, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < dim
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        result = tl.load(results + (row * K + choice) * dim + at, mask=mask, other=0).to(tl.float32)
        total += result if weights is None else result * tl.load(weights + row * K + choice)
    tl.store(out + row * dim + at, total.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------ gradients
@triton.jit
def _swiglu_gradient(d_hidden, both, order, weights, d_weights, width, BLOCK: tl.constexpr):
    """Of a place in order: d_hidden [S, W], as if the routing weight were 1, becomes hidden times that weight; both
    [S, 2W], gate and up, becomes their gradients; and the routing weight's own gradient is written to its slot."""
    place = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + place)
    weight = tl.load(weights + slot).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        gate_at, d_hidden_at = both + place * 2 * width + at, d_hidden + place * width + at
        gate = tl.load(gate_at, mask=mask, other=0).to(tl.float32)
        up = tl.load(gate_at + width, mask=mask, other=0).to(tl.float32)
        d = tl.load(d_hidden_at, mask=mask, other=0).to(tl.float32)
        opened = tl.sigmoid(gate)
        active = gate * opened
        total += d * active * up
        tl.store(d_hidden_at, (active * up * weight).to(d_hidden.dtype.element_ty), mask=mask)
        d *= weight
        tl.store(gate_at, (d * up * (opened + active * (1 - opened))).to(both.dtype.element_ty), mask=mask)
        tl.store(gate_at + width, (d * active).to(both.dtype.element_ty), mask=mask)
    tl.store(d_weights + slot, tl.sum(total, 0))


@triton.jit
def _weight_gradient(
    left, right, order, borders, out, choices, outputs, inputs,
    GATHER_LEFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [E, outputs, inputs]: left.T @ right over an expert's slots. One of left [., outputs] and right [., inputs]
    has a row per slot, in order; the other is the batch's, to be gathered."""
    blocks = tl.cdiv(inputs, COLUMNS)
    each = tl.cdiv(outputs, ROWS) * blocks
    expert = tl.program_id(0) // each
    within = tl.program_id(0) - expert * each
    rows = within // blocks * ROWS + tl.arange(0, ROWS)
    columns = within % blocks * COLUMNS + tl.arange(0, COLUMNS)
    exist_rows = _inside(rows, outputs, EVEN_ROWS)
    exist_columns = _inside(columns, inputs, EVEN_COLUMNS)
    end = tl.load(borders + expert + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.load(borders + expert), end, INNER):
        places = start + tl.arange(0, INNER)
        live = places < end
        gathered = tl.load(order + places, mask=live, other=0) // choices
        left_rows = (gathered if GATHER_LEFT else places).to(tl.int64)
        right_rows = (places if GATHER_LEFT else gathered).to(tl.int64)
        a = tl.load(left + left_rows[None] * outputs + rows[:, None], mask=exist_rows[:, None] & live[None], other=0)
        b = tl.load(
            right + right_rows[:, None] * inputs + columns[None], mask=live[:, None] & exist_columns[None], other=0
        )
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    at = out + expert.to(tl.int64) * outputs * inputs + rows[:, None] * inputs + columns[None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < outputs)[:, None] & (columns < inputs)[None])


# ------------------------------------------------------------------------------ launches
def _options(rows: int, tile: Tile, size: int, outputs: int) -> dict[str, Any]:
    """Launch options of a product of `size` inputs and `outputs` columns."""
    return {
        "ROWS": rows, "COLUMNS": tile.columns, "INNER": tile.inner, "GROUP": GROUP,
        "EVEN_INNER": size % tile.inner == 0, "EVEN_COLUMNS": outputs % tile.columns == 0, "WIDE": INTERPRETED,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _empty(like: Tensor, *shape: int) -> Tensor:
    # The interpreter's cast to bf16 cuts off where a GPU's rounds, so there results stay in fp32 until the end.
    return like.new_empty(shape, dtype=torch.float32 if INTERPRETED else like.dtype)


def _run_gate_up(x: Tensor, gate_up: Tensor, k: int, to: Plan, tiles: Tiles, swiglu: bool) -> Tensor:
    (dim, width), bound = (x.shape[1], gate_up.shape[1] // 2), to.tiles.shape[1]
    out = _empty(x, len(to.order), width if swiglu else 2 * width)
    _gate_up[(bound * triton.cdiv(width, tiles.pair.columns),)](
        x, to.order, to.tiles, gate_up, out, bound, k, dim, width,
        SWIGLU=swiglu, **_options(tiles.rows, tiles.pair, dim, width),
    )  # fmt: skip
    return out


def _run_product(
    rows: Tensor, weight: Tensor, k: int, to: Plan, tiles: Tiles, gather: bool = False, transposed: bool = False
) -> Tensor:
    outputs, bound = weight.shape[2 if transposed else 1], to.tiles.shape[1]
    out = _empty(rows, len(to.order), outputs)
    _product[(bound * triton.cdiv(outputs, tiles.single.columns),)](
        rows, to.order, to.tiles, weight, out, bound, k, rows.shape[1], outputs,
        GATHER=gather, TRANSPOSED=transposed, **_options(tiles.rows, tiles.single, rows.shape[1], outputs),
    )  # fmt: skip
    return out


def _run_combine(results: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    slots, dim = results.shape
    out = _empty(results, rows, dim)
    block = min(1024, power(dim))
    _combine[(rows, triton.cdiv(dim, block))](results, weights, out, dim, K=slots // rows, BLOCK=block, num_warps=4)
    return out


def _run_weight_gradient(left: Tensor, right: Tensor, k: int, to: Plan, gather_left: bool) -> Tensor:
    experts, outputs, inputs = len(to.borders) - 1, left.shape[1], right.shape[1]
    table = {"portable": GRADIENT_TILES["portable"]} if left.dtype == torch.float32 else GRADIENT_TILES
    rows, tile = tuned(table, left.device)
    out = _empty(left, experts, outputs, inputs)
    _weight_gradient[(experts * triton.cdiv(outputs, rows) * triton.cdiv(inputs, tile.columns),)](
        left, right, to.order, to.borders, out, k, outputs, inputs,
        GATHER_LEFT=gather_left, ROWS=rows, COLUMNS=tile.columns, INNER=tile.inner,
        EVEN_ROWS=outputs % rows == 0, EVEN_COLUMNS=inputs % tile.columns == 0, WIDE=INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Routed SwiGLU experts (architecture spec 2.9, step 5 without the shared expert).

    x [T, D], ids int64 [T, k], weights fp32 [T, k], gate_up [E, 2W, D] (gate rows first), down [E, D, W] -> [T, D].
    A row's k results are added in the order of its choices, in fp32.
    """
    if not ids.numel():
        return torch.zeros_like(x)
    x, weights, gate_up, down = (t.contiguous() for t in (x, weights, gate_up, down))
    tiles = tiles_for(ids.numel(), len(gate_up), x.dtype, x.device)
    to = plan(ids, len(gate_up), tiles.rows)
    hidden = _run_gate_up(x, gate_up, ids.shape[1], to, tiles, True)
    return _run_combine(_run_product(hidden, down, ids.shape[1], to, tiles), weights, len(x)).to(x.dtype)


def experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down, in their dtypes, from grad [T, D]; activations are recomputed."""
    if not ids.numel():
        return torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(gate_up), torch.zeros_like(down)
    grad, x, weights, gate_up, down = (t.contiguous() for t in (grad, x, weights, gate_up, down))
    k, width = ids.shape[1], down.shape[2]
    tiles = tiles_for(ids.numel(), len(gate_up), x.dtype, x.device)
    to = plan(ids, len(gate_up), tiles.rows)
    both = _run_gate_up(x, gate_up, k, to, tiles, False)
    d_hidden = _run_product(grad, down, k, to, tiles, gather=True, transposed=True)
    d_weights, block = torch.empty_like(weights), min(1024, power(width))
    _swiglu_gradient[(len(to.order),)](
        d_hidden, both, to.order, weights, d_weights, width, BLOCK=block, num_warps=4
    )  # fmt: skip
    hidden, d_both = d_hidden, both  # replaced in place
    d_down = _run_weight_gradient(grad, hidden, k, to, True)
    d_gate_up = _run_weight_gradient(d_both, x, k, to, False)
    d_x = _run_combine(_run_product(d_both, gate_up, k, to, tiles, transposed=True), None, len(x))
    return d_x.to(x.dtype), d_weights, d_gate_up.to(gate_up.dtype), d_down.to(down.dtype)


def experts_by_grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """:func:`experts` with PyTorch's grouped product between the same plan and sum; bf16 on CUDA."""
    if not ids.numel():
        return torch.zeros_like(x)
    to = plan(ids, len(gate_up), 16)
    order, ends = to.order.long(), to.borders[1:]
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.mT, offs=ends).chunk(2, -1)
    sorted_results = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    results = torch.empty_like(sorted_results).index_copy_(0, order, sorted_results)
    return _run_combine(results, weights.contiguous(), len(x)).to(x.dtype)
