"""``nanoglm bench train``: one step of sparse training, masking what is not selected or gathering what is.

Each measurement is a process of its own, in turns: ``python -m nanoglm.bench.step FORM SHAPE LENGTH`` does a short
step, then forward and backward of one sequence with next-token loss and the indexers' KL, and prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import torch

from nanoglm.bench.prefill import shape
from nanoglm.bench.result import Result, Row
from nanoglm.bench.shapes import bench_nano, random_ids, with_pattern
from nanoglm.bench.timing import Progress, Sample, apart, check_lengths, check_rounds
from nanoglm.config import GLMConfig
from nanoglm.memory import peak_memory
from nanoglm.model import GLM, Attention
from nanoglm.train.data import Sample as Tokens
from nanoglm.train.objective import backward
from nanoglm.train.recipe import Recipe, long

FORMS: tuple[Attention, ...] = ("masked", "sparse")


def config_of(name: str) -> GLMConfig:
    """bench-nano with IndexShare, or a preset."""
    return with_pattern(bench_nano(), "IndexShare") if name == "bench-nano" else GLMConfig.preset(name)


def bench_train(
    lengths: tuple[int, ...] = (8192,), shape_name: str = "bench-nano", rounds: int = 3,
    progress: Progress = lambda what, share: None,
) -> Result:  # fmt: skip
    """Seconds and memory of a step in both forms, fp32.

    Raises:
        InputError: too few rounds, lengths out of range, no such shape, or a process ended with an error.
    """
    check_rounds(rounds)
    check_lengths(lengths)
    config = config_of(shape_name)
    runs: dict[tuple[int, str], list[Row]] = {}
    keys = [(length, form) for length in lengths for form in FORMS]
    for turn in range(rounds):
        for i, (length, form) in enumerate(keys):
            progress(f"{form}, {length:,} tokens", (turn + i / len(keys)) / rounds)
            runs.setdefault((length, form), []).append(apart("nanoglm.bench.step", form, shape_name, str(length)))
    result = Result("train", rounds, shape(config, "fp32", None) | {"layers": config.pattern})
    result.rows["step"] = [_row(runs, length, form) for length, form in keys]
    return result


def _row(runs: dict[tuple[int, str], list[Row]], length: int, form: str) -> Row:
    seconds = Sample.of([row["seconds"] for row in runs[length, form]])
    masked = Sample.of([row["seconds"] for row in runs[length, "masked"]])
    peaks = [row["peak_gb"] for row in runs[length, form] if row["peak_gb"] is not None]
    return {
        "form": form, "length": length, "seconds": seconds.median, "low": seconds.low, "high": seconds.high,
        "rate": length / seconds.median, "peak_gb": max(peaks) if peaks else None,
        "speed_up": masked.median / seconds.median,
    }  # fmt: skip


def main(form: str, name: str, length: int) -> None:
    """Prints seconds and peak_gb."""
    attention = {str(known): known for known in FORMS}[form]
    config = config_of(name)
    model = GLM(config).initialise(0)
    for tokens in (64, length):
        stage = replace(long(1.0, tokens), attention=attention)
        recipe = Recipe(steps=1, tokens=tokens, stages=(stage,))
        ids = torch.tensor(random_ids(config, tokens + 1))[None]
        began = time.perf_counter()
        backward(model, Tokens.of(ids), recipe, 0)
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_gb": peak_memory()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
