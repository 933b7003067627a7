"""``nanoglm bench prefill --peer transformers``: both engines at one shape, each run a process of its own."""

from __future__ import annotations

import os
from importlib.util import find_spec
from statistics import median

from nanoglm.bench.ops import products
from nanoglm.bench.prefill import gemm_bounds, product_rate, shape
from nanoglm.bench.result import Result, Row
from nanoglm.bench.shapes import Subject, bench_nano
from nanoglm.bench.timing import Progress, Sample, apart, check_lengths, check_rounds, interleave
from nanoglm.errors import InputError

MEMORY = {"default": {}, "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}}  # torch's own switch
ENGINES = ("nanoglm", "transformers")


def versus(
    lengths: tuple[int, ...] = (4096, 8192), rounds: int = 3, tokens: int = 8, engines: tuple[str, ...] = ENGINES,
    progress: Progress = lambda what, share: None,
) -> Result:  # fmt: skip
    """Prefill, decoding and memory of both, with default memory and with huge pages, processes in turns.

    Raises:
        InputError: too few rounds, lengths out of range, or the peer is not installed or ends with an error.
    """
    check_rounds(rounds)
    check_lengths(lengths, 64)
    if "transformers" in engines and find_spec("transformers") is None:
        raise InputError("peer is transformers, which is not installed; expected pip install 'nanoglm[verify]'")
    runs: dict[tuple[int, str, str], list[Row]] = {}
    keys = [(length, memory, engine) for length in lengths for memory in MEMORY for engine in engines]
    for turn in range(rounds):
        for i, key in enumerate(keys):
            length, memory, engine = key
            progress(f"{engine}, {length:,} tokens, {memory}", (turn + i / len(keys)) / rounds)
            runs.setdefault(key, []).append(_run(engine, length, tokens, MEMORY[memory]))
    result = Result("peer", rounds, shape(bench_nano(8), "bf16", None) | {"layers": "all-Full"})
    subject, cases = Subject(bench_nano(8), 64), {case.name: case for case in products(1, result.notes)}
    timed = interleave({name: case.run for name, case in cases.items()}, rounds, progress)
    rate = product_rate("bf16", cases, {name: sample.median for name, sample in timed.items()})
    result.rows["peer"] = table = []
    for (length, memory, engine), found in runs.items():
        prefill = Sample.of([row["seconds"] for row in found])
        peaks = [row["peak_gb"] for row in found if row["peak_gb"] is not None]
        bound = sum(gemm_bounds(subject, length, rate, rate).values())
        ours = Sample.of([row["seconds"] for row in runs[length, memory, engines[0]]]).median
        table.append({
            "engine": engine, "memory": memory, "length": length, "seconds": prefill.median, "low": prefill.low,
            "high": prefill.high, "decode_ms": median(row["decode_ms"] for row in found),
            "peak_gb": median(peaks) if peaks else None, "times": prefill.median / ours, "most": prefill.median / bound,
        })  # fmt: skip
    return result


def _run(engine: str, length: int, tokens: int, extra: dict[str, str]) -> Row:
    clean = {name: value for name, value in os.environ.items() if name not in MEMORY["huge pages"]}
    environment = clean | {"HF_HUB_OFFLINE": "1"} | extra
    return apart("nanoglm.bench.peer", engine, str(length), str(tokens), environment=environment)
