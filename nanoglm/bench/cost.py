"""The cost model of a prefill: T = N L c + N_idx L²/2 c_i, and the same with + N_idx L c_p.

N layers do everything that is linear in the length (sparse attention included, once it is longer than k), of them
N_idx also score every visible pair. c is seconds per token and layer, c_i seconds per pair. The third constant is for
what an indexer does per token, its projections and keys: it matters where prompts are short.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanoglm.config import GLMConfig


class Point(NamedTuple):
    """One measured prefill."""

    config: GLMConfig
    length: int
    seconds: float


def work(config: GLMConfig, length: int, terms: int = 2) -> tuple[float, ...]:
    """N L, N_idx L²/2 and, of three terms, N_idx L. The last layer is not counted: of a prompt it works at the last
    token alone."""
    layers = config.num_hidden_layers - 1
    indexers = sum(i < layers for i in config.full_layers)
    return (layers * length, indexers * length**2 / 2, indexers * length)[:terms]


def fit(points: list[Point], terms: int = 2) -> tuple[float, ...]:
    """c, c_i and, of three terms, c_p: least squares of the relative error, so that short prompts count as much as
    long ones."""
    matrix = torch.tensor([work(p.config, p.length, terms) for p in points], dtype=torch.float64)
    matrix = matrix / torch.tensor([p.seconds for p in points], dtype=torch.float64)[:, None]
    scale = matrix.amax(0)  # the columns differ by many orders
    found = torch.linalg.lstsq(matrix / scale, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0] / scale
    return tuple(found.tolist())


def predict(constants: tuple[float, ...], config: GLMConfig, length: int) -> float:
    """Seconds."""
    return sum(c * n for c, n in zip(constants, work(config, length, len(constants)), strict=True))
