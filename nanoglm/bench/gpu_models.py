"""What ``nanoglm bench gpu`` does with whole models: layers of GLM-5.2's widths, a million tokens, training.

Each takes rounds, a number that divides lengths, and a device, and returns the rows of its table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import nanoglm
from nanoglm.bench.cost import work
from nanoglm.bench.device import elapsed, free, peak_gb, reset_peak
from nanoglm.bench.result import Row
from nanoglm.bench.shapes import PATTERNS, Subject, bench_nano, random_ids, with_pattern
from nanoglm.bench.timing import Sample
from nanoglm.cache import PAGE
from nanoglm.config import GLMConfig
from nanoglm.engine.memory import Memory, needed
from nanoglm.model import GLM, Attention
from nanoglm.train.data import Sample as Tokens
from nanoglm.train.data import Tokens as Text
from nanoglm.train.objective import backward
from nanoglm.train.precision import low_copy
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, long
from nanoglm.train.trainer import Keep, train

CHUNK = 8192  # rows of a prefill's pass


def stack(rounds: int, shrink: int, device: str) -> list[Row]:
    """A prefill of 200K tokens through four layers of GLM-5.2's widths (32 experts a layer), both patterns in turns."""
    real = GLMConfig.preset(
        "glm-5.2", num_hidden_layers=4, first_k_dense_replace=0, n_routed_experts=32, vocab_size=4096,
        num_nextn_predict_layers=0, eos_token_id=[1], pad_token_id=0,
    )  # fmt: skip
    config = real if shrink == 1 else bench_nano()
    length = 204_800 // shrink // PAGE * PAGE
    subjects = {p: Subject(with_pattern(config, p), length, device=device) for p in PATTERNS}
    ids = random_ids(config, length)
    seconds: dict[str, list[float]] = {p: [] for p in PATTERNS}
    for turn in range(max(3, rounds // 2) + 1):  # the first is to warm
        for pattern in PATTERNS[:: -1 if turn % 2 else 1]:
            spent = _prefill(subjects[pattern], ids)
            if turn:
                seconds[pattern].append(spent)
    found: list[Row] = []
    for pattern in PATTERNS:
        median, low, high = Sample.of(seconds[pattern])
        found.append({"length": length, "pattern": pattern, "seconds": median, "low": low, "high": high})
    found[1]["speed_up"] = Sample.of([a / b for a, b in zip(*seconds.values(), strict=True)]).median
    scored = [work(subjects[p].config, length)[1] for p in PATTERNS]  # of the last layer one row is wanted
    found[1]["limit"] = scored[0] / scored[1]
    return found


def _prefill(subject: Subject, ids: list[int]) -> float:
    """Seconds."""
    subject.reset()
    return elapsed(lambda: subject.feed(ids, CHUNK), 1) / 1e3


def million(rounds: int, shrink: int, device: str) -> list[Row]:
    """One prefill of a million tokens of bench-nano with IndexShare, then 64 tokens decoded, in memory that is printed
    beforehand."""
    config, length = with_pattern(bench_nano(), "IndexShare"), (1 << 20) // shrink
    subject = Subject(config, length + PAGE, device=device)
    memory = foretold(subject)
    held = subject.cache.bytes_per_token * length + sum(p.nbytes for p in subject.model.parameters())
    ids = random_ids(config, length)
    subject.feed(ids[: 2 * CHUNK], CHUNK)
    subject.feed([7])  # kernels are compiled when they are first needed
    reset_peak()
    seconds = _prefill(subject, ids)
    decoding = elapsed(partial(subject.feed, [7]), 64) / 1e3
    return [{
        "length": length, "seconds": seconds, "rate": length / seconds, "decoded": 64, "decode_seconds": decoding,
        "decode_rate": 64 / decoding, "peak_gb": peak_gb(),
        "held_gb": held / 1e9, "foretold_gb": memory.total / 1e9,
    }]  # fmt: skip


def foretold(subject: Subject) -> Memory:
    """What a prefill that fills the cache will take, which it also prints."""
    memory = needed(subject.model, subject.cache.pages, CHUNK, 1)
    parts = {
        "weights": memory.weights, "cache": memory.cache, "scoring": memory.scratch,
        f"activations of {CHUNK:,} rows": memory.activations, "together": memory.total,
    }  # fmt: skip
    said = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in parts.items())
    print(f"{memory.tokens:,} tokens will take: {said}", file=sys.stderr, flush=True)
    return memory


def training(rounds: int, shrink: int, device: str) -> list[Row]:
    """Forward and backward of the preset mini in bf16, one sequence a step: dense attention without indexers; and under
    Selections with the indexers' KL, what is not selected masked, or not read."""
    table: list[Row] = []
    forms: tuple[tuple[Attention, int], ...] = (
        ("masked", 8192), ("sparse", 8192), ("dense", 32_768), ("sparse", 32_768), ("dense", 131_072),
        ("sparse", 131_072),
    )  # fmt: skip
    for form, length in forms:
        length //= shrink
        with torch.device(device):
            model = low_copy(GLM(GLMConfig.preset("mini")).initialise(0))
        stage = dense(1.0, length) if form == "dense" else replace(long(1.0, length), attention=form)
        recipe = Recipe(steps=1, tokens=length, stages=(stage,), mtp_depths=1)
        ids = torch.tensor(random_ids(model.config, length + 1), device=device)[None]
        run = partial(backward, model, Tokens.of(ids), recipe, 0)
        try:
            run()
            reset_peak()
            spent = Sample.of([elapsed(run, 1) / 1e3 for _ in range(3)])
        except torch.OutOfMemoryError:
            table.append({"form": f"{form}: more memory than the card has", "length": length})
        else:
            table.append({
                "form": form, "length": length, "seconds": spent.median, "low": spent.low, "high": spent.high,
                "rate": length / spent.median, "peak_gb": peak_gb(),
            })  # fmt: skip
        del model, run
        free()
    return table


def curve(rounds: int, shrink: int, device: str) -> list[Row]:
    """The preset mini trained in bf16 on this package's own source, byte by byte: dense, then indexers, then sparse."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(nanoglm.__file__).parent.rglob("*.py")))
    text = Text.of(np.frombuffer(source.encode(), np.uint8).astype(np.uint16))
    length = 2048 // shrink
    recipe = Recipe(
        "mini", steps=max(8, 320 // shrink), tokens=16 * length, dtype="bfloat16", rate=4e-3,
        stages=(dense(0.6, length), indexer_warmup(0.1, length), long(0.3, 4 * length)),
    )  # fmt: skip
    with torch.device(device):
        model = GLM(GLMConfig.preset("mini")).initialise(0)
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        train(model, text, recipe, Keep(log=log, log_every=max(1, recipe.steps // 20), quiet=True))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line | {"rate": recipe.tokens * (line["step"] + 1) / line["seconds"]} for line in lines]
