"""What several tests of ops draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from torch import Tensor

from nanoglm.cache import PAGE
from nanoglm.ops import Batch, reference
from nanoglm.ops.batch import storage_rows


@st.composite
def batches(draw: st.DrawFn, longest: int = 150) -> tuple[Batch, int]:
    """A contiguous or a paged ragged batch (``longest`` tokens cached at most), and its storage rows."""
    counts = draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    if draw(st.booleans()):
        return Batch.contiguous(counts), sum(counts)
    before = [draw(st.integers(0, longest)) for _ in counts]
    lengths = [b + c for b, c in zip(before, counts, strict=True)]
    wide = max(-(-n // PAGE) for n in lengths)
    pages = torch.randperm(wide * len(counts) + 2)[: wide * len(counts)]  # shuffled, with holes
    table = pages.view(len(counts), wide).int()
    return Batch.build(counts, lengths, table, PAGE), (wide * len(counts) + 2) * PAGE


def draw_keys(kind: str, rows: int, heads: int, dim: int, batch: Batch, storage: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, weights, keys of one nature of scores."""
    q, weights, keys = torch.randn(rows, heads, dim), torch.randn(rows, heads), torch.randn(storage, dim)
    if kind == "ties":  # small integers: sums are exact, many scores are equal, most of those zero
        q, weights, keys = q.round(), weights.round(), keys.round()
    if kind in ("equal", "rising"):
        q, weights = q.abs().round() + 1, weights.abs().round() + 1
        keys = torch.ones(storage, dim)
    if kind == "rising":  # by logical position, up to 255 and from 0 again
        for request, length in enumerate(batch.lengths):
            at = torch.arange(length)
            slots = storage_rows(at, torch.full_like(at, request), batch.table, batch.page_size)
            keys[slots] = (at[:, None] + 1).float().expand(-1, dim) % 256  # exact in bf16
    return q, weights, keys


def equal_but_at_the_boundary(found: Tensor, expected: Tensor, q: Tensor, weights: Tensor, keys: Tensor, batch: Batch):
    """Rows differ only in keys whose scores are a rounding apart."""
    for row in (found != expected).any(-1).nonzero().flatten().tolist():
        a, b = ({int(s) for s in chosen[row] if s >= 0} for chosen in (found, expected))
        visible = reference._visible_rows(row, batch)
        pairs = (q[row] @ keys[visible].T).relu()
        scores = weights[row] @ pairs
        gap = abs(min(scores[list(a - b)]) - min(scores[list(b - a)]))
        assert len(a) == len(b) and gap < 1e-5 * (weights[row].abs() @ pairs).max()  # heads may cancel


def draw_selection(positions: list[int], k: int) -> Tensor:
    """Drawn positions of what rows that stand there see, int32 [T, k], ascending, -1 behind them; every second row as
    many as it can, the others often fewer."""
    chosen = torch.full((len(positions), k), -1, dtype=torch.int32)
    for row, position in enumerate(positions):
        some = torch.randperm(position + 1)[: k if row % 2 else torch.randint(1, k + 1, ())].sort().values
        chosen[row, : len(some)] = some.int()
    return chosen


def apart(found: Tensor, expected: Tensor) -> float:
    """By the norm, against that of what is expected."""
    difference = (found.cpu().double() - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-3))


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Within: PyTorch's own switch."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
