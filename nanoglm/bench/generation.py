"""``nanoglm bench engine --peer transformers``: greedy generation of both from one checkpoint and the same prompts.

Each run is a process of its own: ``python -m nanoglm.bench.generation ENGINE FOLDER PROMPT TOKENS`` prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from nanoglm.api import Model, load
from nanoglm.bench.engine import own_text
from nanoglm.bench.result import Result, Row
from nanoglm.bench.timing import Progress, Sample, apart, check_lengths, check_rounds
from nanoglm.cache import PAGE
from nanoglm.engine import Engine, SamplingParams
from nanoglm.errors import InputError

WARM = 64
DRAFTS: dict[str, int | Literal["auto"]] = {"nanoglm": "auto", "nanoglm without drafts": 0}
ENGINES = (*DRAFTS, "transformers")


def bench_generation(
    model: Model, folder: Path, lengths: tuple[int, ...] = (1024, 4096, 8192), tokens: int = 64, rounds: int = 3,
    engines: tuple[str, ...] = ENGINES, progress: Progress = lambda what, share: None,
) -> Result:  # fmt: skip
    """Rows by length and engine, in fp32; each prompt is what the model itself says.

    Args:
        folder: the checkpoint that ``model`` was loaded from.

    Raises:
        InputError: too few rounds, lengths out of range, or the peer is not installed or ends with an error.
    """
    check_rounds(rounds)
    check_lengths(lengths, WARM)
    if "transformers" in engines and find_spec("transformers") is None:
        raise InputError("peer is transformers, which is not installed; expected pip install 'nanoglm[verify]'")
    progress("the prompt", 0.0)
    ids = own_text(model, max(lengths))
    runs: dict[tuple[int, str], list[Row]] = {}
    keys = [(length, engine) for length in lengths for engine in engines]
    with tempfile.TemporaryDirectory() as scratch:
        for length in lengths:
            Path(scratch, str(length)).write_text(json.dumps(ids[:length]))
        for turn in range(rounds):
            for i, (length, engine) in enumerate(keys[:: -1 if turn % 2 else 1]):
                progress(f"{engine}, {length:,} tokens", (turn + i / len(keys)) / rounds)
                file = Path(scratch, str(length))
                found = apart("nanoglm.bench.generation", engine, str(folder), str(file), str(tokens))
                runs.setdefault((length, engine), []).append(found)
    result = Result("generate", rounds, {"tokens": tokens, "dtype": "fp32", "threads": torch.get_num_threads()})
    result.rows["generate"] = [_row(model, ids[:length], runs, length, engine) for length, engine in keys]
    return result


def _row(model: Model, prompt: list[int], runs: dict[tuple[int, str], list[Row]], length: int, engine: str) -> Row:
    ours, theirs = runs[length, ENGINES[0]], runs[length, engine]
    rate = Sample.of([len(row["ids"]) / row["seconds"] for row in theirs])
    times = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    alike, gap, said = len(ours[0]["ids"]), None, [row["ids"] for row in (ours[0], theirs[0])]
    if differ := [i for i, (a, b) in enumerate(zip(*said, strict=True)) if a != b]:
        alike = differ[0]
        best = model.logits([[*prompt, *said[0][:alike]]])[0][-1].topk(2).values
        gap = float(best[0] - best[1])
    return {
        "engine": engine, "length": length, "first": median(row["first"] for row in theirs),
        "between": 1e3 * median((row["seconds"] - row["first"]) / (len(row["ids"]) - 1) for row in theirs),
        "rate": rate.median, "low": rate.low, "high": rate.high, "times": median(times), "alike": alike, "gap": gap,
    }  # fmt: skip


def main(engine: str, folder: str, prompt: str, tokens: int) -> None:
    """Prints seconds in all, seconds to the first token, and the tokens."""
    ids = json.loads(Path(prompt).read_text())
    run = _transformers(folder) if engine == "transformers" else _nanoglm(folder, engine)
    run(ids[:WARM], 4, lambda: None)
    came: list[float] = []
    began = time.perf_counter()
    found = run(ids, tokens, lambda: came.append(time.perf_counter() - began))
    print(json.dumps({"seconds": time.perf_counter() - began, "first": came[0], "ids": found}))


Run = Callable[[list[int], int, Callable[[], object]], list[int]]  # prompt, tokens, told of what comes -> tokens


def _nanoglm(folder: str, engine: str) -> Run:
    model = load(folder)

    def run(ids: list[int], tokens: int, tell: Callable[[], object]) -> list[int]:
        pages = -(-(len(ids) + tokens) // PAGE)
        loop = Engine(model.module, pages=pages, drafts=DRAFTS[engine], prefix=False)
        found = []
        for token in loop.generate(ids, SamplingParams(tokens)):
            tell()
            found.append(token)
        return found

    return run


def _transformers(folder: str) -> Run:
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(ids: list[int], tokens: int, tell: Callable[[], object]) -> list[int]:
        class Listener(transformers.generation.streamers.BaseStreamer):
            calls = 0

            def put(self, value: object) -> None:
                self.calls += 1
                if self.calls > 1:  # the first is the prompt
                    tell()

            def end(self) -> None:
                pass

        given = torch.tensor([ids])
        found = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, streamer=Listener(),
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        generated: list[int] = found[0, len(ids) :].tolist()
        return generated

    return run


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
