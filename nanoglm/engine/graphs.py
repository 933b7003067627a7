"""Decoding steps as captured graphs (CUDA, HIP): a step is one launch instead of a thousand.

A graph repeats the same launches on the same memory. So ids, positions and page tables lie in tensors of its own, which
a step fills; what kernels take as plain numbers must not change from step to step: how many requests, how many rows of
each, and a bound on the pages they hold. For each such shape there is a graph, captured when it has come often enough
to pay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoglm.cache import PagedCache
from nanoglm.model import GLM
from nanoglm.ops import Batch
from nanoglm.ops.work import tally

MOST_ROWS = 64  # of a step; beyond that launches are not what takes the time
MOST_OF_ONE = 8  # of a request: a token and its drafts; parts of prompts come in too many sizes


OFTEN = 4  # steps of a shape before it is captured, which takes as long as some of them
MOST_GRAPHS = 64


class Captured(NamedTuple):
    """A graph, its inputs, which must live as long as it does, and its hidden states [T, D]."""

    ids: Tensor
    positions: Tensor
    requests: Tensor
    table: Tensor
    replay: Callable[[], None]
    hidden: Tensor


class Graphs:
    """The graphs of one model over one cache."""

    def __init__(self, model: GLM, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.captured: dict[tuple[int, int, int], Captured] = {}
        self.came: Counter[tuple[int, int, int]] = Counter()
        self.capturing = False  # whether the last step captured one: its time says nothing
        self.pool: Any = None  # their memory: they never run at once

    def run(self, ids: Tensor, batch: Batch) -> Tensor | None:
        """Hidden states [T, D] of a pass over ids int64 [T]; None if it is no step for a graph: requests with unlike
        numbers of rows, many rows, or what has not come often yet."""
        self.capturing = False
        requests, rows = len(batch.lengths), len(ids)
        count = rows // requests
        if (
            rows > MOST_ROWS
            or count > MOST_OF_ONE
            or tally()
            or any(b != i * count for i, b in enumerate(batch.borders))
        ):
            return None
        pages = 1 << max(4, (batch.table.shape[1] - 1).bit_length())
        key = requests, count, pages
        self.came[key] += 1
        with torch.cuda.device(ids.device):
            if key not in self.captured:
                if self.came[key] < OFTEN or len(self.captured) == MOST_GRAPHS:
                    return None
                self.capturing = True
                self.captured[key] = self._capture(ids, batch, pages)
            graph = self.captured[key]
            graph.ids.copy_(ids)
            graph.positions.copy_(batch.positions)
            graph.table[:, : batch.table.shape[1]].copy_(batch.table)
            graph.replay()
            return graph.hidden.clone()

    def _capture(self, ids: Tensor, batch: Batch, pages: int) -> Captured:
        ids, positions, requests = ids.clone(), batch.positions.clone(), batch.requests.clone()
        table = batch.table.new_zeros(len(batch.lengths), pages)
        table[:, : batch.table.shape[1]] = batch.table
        bound = (pages * batch.page_size,) * len(batch.lengths)

        def run() -> Tensor:  # a Batch of its own each time: it remembers what it has computed
            fixed = Batch(batch.borders, bound, positions, requests, table, batch.page_size)
            return self.model(ids, fixed, self.cache, keep_selections=False).hidden

        side = torch.cuda.Stream()  # what libraries set up on first use must not be captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = run()
        return Captured(ids, positions, requests, table, graph.replay, hidden)
