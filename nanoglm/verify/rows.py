"""Row: one comparison of the receipt."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LIMIT = 1e-5  # fp32: relative to the largest expected value, or to 1 if that is smaller


class Row(NamedTuple):
    """A value that may not exceed its limit. NaN exceeds every limit."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit


def error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected value where that is above 1."""
    if found.shape != expected.shape:
        return float("nan")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def differing(found: Tensor, expected: Tensor) -> float:
    """How many elements are not equal (bit for bit, but -0.0 = 0.0)."""
    return float((found != expected).sum()) if found.shape == expected.shape else float("nan")
