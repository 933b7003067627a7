"""What several tests of ops draw."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from nanoglm.cache import PAGE
from nanoglm.ops import Batch


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
