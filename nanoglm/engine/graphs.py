"""Passes of a few rows as captured graphs (CUDA, HIP): a pass is one launch instead of a thousand.

A graph repeats the same launches on the same memory. So positions, page tables and all other inputs lie in tensors of
its own, which a pass fills; what kernels take as plain numbers must not change from pass to pass: how many requests,
how many rows of each, and a bound on the pages they hold. For each such shape there is a graph, captured when it has
come often enough to pay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoglm.ops import Batch
from nanoglm.ops.work import tally

MOST_ROWS = 64  # of a pass; beyond that launches are not what takes the time
MOST_OF_ONE = 8  # of a request: a token and its drafts; parts of prompts come in too many sizes
OFTEN = 4  # passes of a shape before it is captured, which takes as long as some of them
MOST_GRAPHS = 64  # of a function

Tensors = tuple[Tensor, ...]
# Turns a call into one that repeats it on the same memory, and the results, which that fills anew.
Capture = Callable[[Callable[[], Tensors]], tuple[Callable[[], None], Tensors]]


class Captured(NamedTuple):
    """A graph, its inputs, which must live as long as it does, and its results."""

    batch: Batch
    inputs: Tensors
    replay: Callable[[], None]
    results: Tensors


class Graphs:
    """Graphs of functions of a batch. Without ``capture`` there are none, and functions are called.

    Attributes:
        captured: by name, requests, rows of each and bound on their pages.
        capturing: whether one was captured since this was last set to False: then times say nothing.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = capture
        self.captured: dict[tuple[str, int, int, int], Captured] = {}
        self.came: Counter[tuple[str, int, int, int]] = Counter()
        self.capturing = False

    def run(self, name: str, function: Callable[..., Tensors], batch: Batch, *inputs: Tensor) -> Tensors:
        """``function(batch, *inputs)``, replayed if it is a pass for a graph: not of requests with unlike numbers of
        rows, of many rows, or of a shape that has not come often yet.

        Args:
            name: of the function. inputs: [T, ...], a row each; all else that it reads must be the same every time.
        """
        if self.capture is None:
            return function(batch, *inputs)
        with torch.cuda.device_of(batch.positions):
            graph = self._graph(name, function, batch, inputs)
            if graph is None:
                return function(batch, *inputs)
            own, given = ((b.positions, b.turns, b.table) for b in (graph.batch, batch))
            for fixed, value in zip((*own, *graph.inputs), (*given, *inputs), strict=True):
                fixed[..., : value.shape[-1]].copy_(value)  # tables may have fewer pages
            graph.replay()
            return tuple(result.clone() for result in graph.results)

    def _graph(self, name: str, function: Callable[..., Tensors], batch: Batch, inputs: Tensors) -> Captured | None:
        requests, rows = len(batch.lengths), len(batch.positions)
        count = rows // requests
        alike = all(border == i * count for i, border in enumerate(batch.borders))
        if rows > MOST_ROWS or count > MOST_OF_ONE or not alike or tally():
            return None
        key = name, requests, count, 1 << max(4, (batch.table.shape[1] - 1).bit_length())
        self.came[key] += 1
        room = sum(other[0] == name for other in self.captured) < MOST_GRAPHS
        if key not in self.captured and self.came[key] >= OFTEN and room:
            self.capturing = True
            self.captured[key] = self._capture(function, batch, inputs, key[-1])
        return self.captured.get(key)

    def _capture(self, function: Callable[..., Tensors], batch: Batch, inputs: Tensors, pages: int) -> Captured:
        assert self.capture is not None
        table = batch.table.new_zeros(len(batch.lengths), pages)
        table[:, : batch.table.shape[1]] = batch.table
        fixed = Batch(
            batch.borders, (pages * batch.page_size,) * len(batch.lengths), batch.positions.clone(),
            batch.requests.clone(), table, batch.page_size, batch.turns.clone(),
        )  # fmt: skip
        own = tuple(x.clone() for x in inputs)
        # A Batch remembers what it has computed: each call has its own.
        replay, results = self.capture(lambda: function(replace(fixed), *own))
        return Captured(fixed, own, replay, results)


class Recorder:
    """Captures on a GPU. All graphs share their memory: they never run at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        side = torch.cuda.Stream()  # what libraries set up on first use must not be captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = call()
        return graph.replay, results
