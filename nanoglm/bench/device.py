"""Timing by a GPU's own clock, and its memory; on a CPU the process's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from nanoglm.bench.timing import Sample, seconds_of

Run = Callable[[], Any]


def timed(run: Run, rounds: int, least: float = 4.0, graph: bool = True) -> Sample:
    """Seconds of one call: median, fastest, slowest of the rounds, by the device's own clock.

    Calls are replayed as a graph unless told otherwise, so that launches by Python are not what is measured.
    """
    for _ in range(2):
        run()
    call = captured(run) if graph else run
    repeats = max(1, round(least / max(elapsed(call, 1), 1e-3)))
    return Sample.of([elapsed(call, repeats) / repeats / 1e3 for _ in range(rounds)])


def captured(run: Run) -> Run:
    """A replay of the call, which must not wait for the device in between."""
    if not torch.cuda.is_available():
        return run
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def elapsed(run: Run, repeats: int) -> float:
    """Milliseconds on the device, if there is one."""
    if not torch.cuda.is_available():
        return seconds_of(run, repeats) * repeats * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """The most memory that tensors took since then."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def free() -> None:
    """Gives back what tensors no longer need."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
