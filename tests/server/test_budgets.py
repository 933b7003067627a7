"""Budgets of thought are obeyed to the token: 1,000 requests at once, with and without drafts, schemas and tools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from server.scripted import TOKENIZER, scripted_model

from nanoglm.engine import Engine
from nanoglm.server.service import Job, Reply, Service

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"c": {"type": "string", "maxLength": 4}}}}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
END, CALL, THINK = (TOKENIZER.encode(text)[0] for text in ("</think>", "<tool_call>", "<think>"))


def jobs(service: Service, count: int) -> list[tuple[int, Job]]:
    """Drawn requests with their budgets; half of them will not stop thinking by themselves."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        budget = int(rng.integers(0, 40))
        more: dict[str, Any] = [
            {"tools": [WEATHER]}, {}, {"tools": [WEATHER], "tool_choice": "required"}, {"schema": NUMBER},
        ][rng.integers(4)]  # fmt: skip
        sampling = {"temperature": float(rng.integers(0, 3)), "seed": i, "top_p": 1.0}
        if rng.random() < 0.7:
            sampling["logit_bias"] = {END: 3.0, CALL: 3.0, THINK: 3.0}
        limit = {"budget": budget} if rng.random() < 0.5 else {"thinking": {"type": "enabled", "budget_tokens": budget}}
        messages = [{"role": "user", "content": f"Question {i}?"}]
        found.append((budget, service.chat(messages, max_tokens=budget + 250, sampling=sampling, **more, **limit)))
    return found


async def answer(service: Service, job: Job) -> tuple[Reply, list[int], str]:
    replies = service.start(job)
    tokens, content = list[int](), ""
    async with aclosing(service.pieces(replies)) as pieces:
        async for piece in pieces:
            tokens += piece.tokens
            content += "".join(delta.text for delta in piece.deltas if delta.kind == "content")
            if job.grammar is None and len(tokens) > job.params.max_tokens - 200:
                break  # the rest of such a reply is of no interest
    return replies[0], tokens, content


def thought(tokens: Sequence[int], calls: bool) -> int:
    """Tokens before what ends the first thought."""
    ends = (END, CALL) if calls else (END,)
    return next((i for i, token in enumerate(tokens) if token in ends), len(tokens))


@pytest.mark.parametrize("drafts", [0, 3])
def test_no_request_thinks_one_token_too_many(drafts: int) -> None:
    model = scripted_model()
    service = Service(model, Engine(model.module, pages=400, drafts=drafts, most=64), ["tiny"], most=1000)

    async def run() -> list[tuple[int, tuple[Reply, list[int], str]]]:
        drawn = jobs(service, 500)
        found = await asyncio.gather(*(answer(service, job) for _, job in drawn))
        return [(budget, each) for (budget, _), each in zip(drawn, found, strict=True)]

    at_budget = within = 0
    for budget, (reply, tokens, _) in asyncio.run(run()):
        spent = thought(tokens, bool(reply.job.tools))
        assert spent <= budget, (spent, budget)
        assert reply.thought <= spent  # some markup says nothing
        assert reply.thought == spent or any(token >= 256 for token in tokens[:spent])
        at_budget += reply.thought == budget
        within += reply.thought < len(tokens) and tokens[reply.thought] == CALL
        assert reply.job.grammar is None or reply.finish in ("stop", "tool_calls")
    assert at_budget > 200 and within > 20  # it was the budget that ended thought, or a call
    service.engine.engine.check()
