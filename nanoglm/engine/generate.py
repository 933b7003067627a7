"""The slow, obvious generation loop: one request, chunked prefill, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nanoglm.cache import PAGE, PagedCache
from nanoglm.engine.record import Trace
from nanoglm.engine.sampler import sample
from nanoglm.errors import InputError
from nanoglm.model import GLM, Tape

PREFILL_CHUNK = 1024  # as fast as 2,048 or 4,096 on a CPU, with half the activations


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        max_tokens: most tokens to generate. temperature: 0 is greedy. top_k: None keeps all.
        seed: of this request's own generator. stop_ids: end generation and are not yielded.

    Raises:
        InputError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; expected a number, 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; expected at least 1")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}; expected 0 to 2**64 - 1")


def check_prompt(model: GLM, ids: Sequence[int], new_tokens: int = 0) -> None:
    """Raises InputError when ids cannot be a prompt of this model."""
    config = model.config
    if not ids:
        raise InputError("prompt is empty; expected at least one token")
    if len(ids) + new_tokens > config.max_position_embeddings:
        raise InputError(
            f"prompt has {len(ids)} tokens and {new_tokens} new ones are wanted; expected at most "
            f"max_position_embeddings ({config.max_position_embeddings}) together"
        )
    for i in ids:
        if not 0 <= i < config.vocab_size:
            raise InputError(f"prompt holds token id {i}; expected 0 to {config.vocab_size - 1}")


@torch.no_grad()
def prefill(
    model: GLM,
    cache: PagedCache,
    request: int,
    ids: Sequence[int],
    chunk: int = PREFILL_CHUNK,
    *,
    record: Trace | None = None,
    replay: Trace | None = None,
) -> torch.Tensor:
    """Runs ids through the model in chunks; returns the logits [V] after the last one."""
    device = model.lm_head.weight.device
    for begin in range(0, len(ids), chunk):
        part = list(ids[begin : begin + chunk])
        given = {} if replay is None else replay.rows(cache.length(request), part, device)
        tape = None if record is None else Tape(indexers=False)
        wanted = int(begin + chunk >= len(ids))  # rows whose hidden states are read
        output = model(
            torch.tensor(part, device=device), cache.extend([request], [len(part)]), cache, tape=tape,
            tail=None if record is not None else [wanted], **given,
        )  # fmt: skip
        if record is not None and tape is not None:
            record.append(part, output.selections, tape.experts)
    return model.logits(output.hidden[-1:])[0]


def generate(
    model: GLM,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    record: Trace | None = None,
    replay: Trace | None = None,
) -> Iterator[int]:
    """Yields the continuation's token ids one by one (checks its arguments at once, before the first).

    Args:
        record: takes every token's Selections and routes. replay: gives them.

    Raises:
        InputError: an empty or too long prompt, ids outside the vocabulary, or, on the way, tokens that
            are not those of the replayed trace.
    """
    check_prompt(model, prompt, params.max_tokens)
    return _generate(model, list(prompt), params, record, replay)


def _generate(
    model: GLM, prompt: list[int], params: SamplingParams, record: Trace | None, replay: Trace | None
) -> Iterator[int]:
    weight = model.lm_head.weight
    pages = -(-(len(prompt) + params.max_tokens) // PAGE)
    cache = PagedCache(model.config, pages, dtype=weight.dtype, device=weight.device)
    request = cache.open()
    generator = torch.Generator().manual_seed(params.seed)
    logits = prefill(model, cache, request, prompt, record=record, replay=replay)
    for count in range(1, params.max_tokens + 1):
        token = sample(logits, params.temperature, params.top_k, generator)
        if token in params.stop_ids:
            return
        yield token
        if count < params.max_tokens:
            logits = prefill(model, cache, request, [token], record=record, replay=replay)
