"""The slow, obvious generation loop: one request, chunked prefill, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nanoglm.cache import PAGE, PagedCache
from nanoglm.engine.params import SamplingParams
from nanoglm.engine.record import Trace
from nanoglm.engine.request import check_prompt
from nanoglm.engine.sampler import sample
from nanoglm.model import GLM, Tape

PREFILL_CHUNK = 2048  # 5 % faster than 1,024 on two cores; 4,096 gains nothing for twice the activations


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
            tail=None if record is not None else [wanted], keep_selections=record is not None, **given,
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
    logits, outputs = prefill(model, cache, request, prompt, record=record, replay=replay), list[int]()
    for count in range(1, params.max_tokens + 1):
        token = sample(logits, params, generator, prompt, outputs)
        if token in params.stop_ids:
            return
        outputs.append(token)
        yield token
        if count < params.max_tokens:
            logits = prefill(model, cache, request, [token], record=record, replay=replay)
