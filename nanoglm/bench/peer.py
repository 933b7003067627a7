"""One engine in a process of its own: ``python -m nanoglm.bench.peer ENGINE LENGTH TOKENS`` prints one JSON line.

Both engines run the same shape in bf16, every layer with its indexer of 8 heads, at random weights, and are measured
in the same way: seconds of a prefill after a warm-up of 64 tokens, milliseconds of each token decoded after it,
the most memory the process held.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from nanoglm.bench.shapes import Subject, bench_nano, random_ids
from nanoglm.memory import peak_memory

WARM = 64


def main(engine: str, length: int, tokens: int) -> None:
    """Prints prefill_s, decode_ms and peak_gb."""
    ids = random_ids(bench_nano(8), length)
    restart, feed = {"nanoglm": _nanoglm, "transformers": _transformers}[engine](length + tokens)
    feed(ids[:WARM])
    restart()
    seconds = []
    for part in [ids, *([i] for i in ids[:tokens])]:
        began = time.perf_counter()
        feed(part)
        seconds.append(time.perf_counter() - began)
    figures = {"seconds": seconds[0], "decode_ms": median(seconds[1:]) * 1e3, "peak_gb": peak_memory()}
    print(json.dumps(figures))


def _nanoglm(room: int) -> tuple[Callable[[], object], Callable[[list[int]], object]]:
    subject = Subject(bench_nano(8), room)
    return subject.reset, subject.feed


def _transformers(room: int) -> tuple[Callable[[], object], Callable[[list[int]], object]]:
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    raw: dict[str, Any] = bench_nano(8).to_dict() | {"attn_implementation": "sdpa"}
    model: Any = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**raw)).eval()
    model = model.to(torch.bfloat16)
    cache: dict[str, object] = {"past_key_values": None}

    @torch.inference_mode()
    def feed(ids: list[int]) -> None:
        output = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1, **cache)
        cache["past_key_values"] = output.past_key_values

    return lambda: cache.update(past_key_values=None), feed


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
