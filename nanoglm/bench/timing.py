"""Timing in turns, in a process apart, and the seconds spent in each op."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

from nanoglm import ops
from nanoglm.errors import InputError

Progress = Callable[[str, float], None]  # called with what runs and the share done, 0 to 1


class Sample(NamedTuple):
    """Median, fastest and slowest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Sample:
        return cls(median(values), min(values), max(values))


def check_rounds(rounds: int) -> None:
    """A median of fewer than three says nothing. Raises InputError."""
    if rounds < 3:
        raise InputError(f"rounds is {rounds}; expected at least 3, for figures are medians")


def check_lengths(lengths: tuple[int, ...], least: int = 1) -> None:
    """Raises InputError."""
    for length in lengths:
        if not least <= length <= 1 << 20:
            raise InputError(f"length is {length}; expected {least} to {1 << 20} tokens")


def interleave(
    cases: Mapping[str, Callable[[], object]], rounds: int, progress: Progress = lambda what, share: None
) -> dict[str, Sample]:
    """Seconds of one call of each case. A round calls every case; every second round runs backwards.

    What is fast is called several times in its turn, for about 20 ms.
    """
    repeats, seconds = {}, {name: list[float]() for name in cases}
    for name, run in cases.items():
        run()  # the first call loads code and takes memory
        repeats[name] = max(1, math.ceil(0.02 / seconds_of(run)))
    for turn in range(rounds):
        for i, name in enumerate(list(cases)[:: -1 if turn % 2 else 1]):
            progress(name, (turn + i / len(cases)) / rounds)
            seconds[name].append(seconds_of(cases[name], repeats[name]))
    return {name: Sample.of(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], object], repeats: int = 1) -> float:
    """Of one call, the mean of so many."""
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


class Parts(NamedTuple):
    """Seconds of a pass by part; ``rest`` is all but scoring with top-k and sparse attention."""

    total: float
    indexer: float
    attention: float

    @property
    def rest(self) -> float:
        return self.total - self.indexer - self.attention


def parts_of(run: Callable[[], object]) -> Parts:
    """Runs it once and says how long it took and what of that the two ops did."""
    with _watched("select") as indexer, _watched("sparse_attention") as attention:
        total = seconds_of(run)
    return Parts(total, sum(indexer), sum(attention))


def apart(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object that a module prints last, run in a process of its own.

    Raises:
        InputError: it ended with an error.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        what = " ".join(arguments)
        raise InputError(f"{what} ended with {done.returncode}: {said[-1] if said else 'no word'}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


@contextmanager
def _watched(name: str) -> Iterator[list[float]]:
    """Within: the seconds of each call of that op. The model looks the op up on every call."""
    seconds: list[float] = []
    run = getattr(ops, name)

    def watched(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = run(*arguments)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(ops, name, watched)
    try:
        yield seconds
    finally:
        setattr(ops, name, run)
