"""Counting work: how many pairs were scored and how many rows attended.

Sparse attention is a claim about multiply-adds, so the ops count what they do while they do it.
The tally observes; it changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Work:
    """Sums over all ops run inside one :func:`count_work` block."""

    # Visible (query, key) pairs that the lightning indexers scored. A tile also computes what reaches past
    # the diagonal, under 128 keys a query, and throws it away uncounted.
    pairs_scored: int = 0
    rows_attended: int = 0  # latent rows that attention read, over all queries and layers


_tally: ContextVar[Work | None] = ContextVar("nanoglm_work", default=None)


@contextmanager
def count_work() -> Iterator[Work]:
    """``with count_work() as work: ...`` then read ``work.pairs_scored``."""
    work = Work()
    token = _tally.set(work)
    try:
        yield work
    finally:
        _tally.reset(token)


def tally() -> Work | None:
    """The running tally, or None when nobody counts."""
    return _tally.get()


def tally_pairs(borders: Sequence[int], lengths: Sequence[int]) -> None:
    """Counts the visible pairs of a batch, if somebody counts."""
    if work := tally():
        for b, length in enumerate(lengths):
            rows = borders[b + 1] - borders[b]
            work.pairs_scored += rows * length - rows * (rows - 1) // 2
