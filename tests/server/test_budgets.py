"""Budgets of thought are obeyed to the token: 1,000 requests at once, with and without drafts, schemas and tools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np
import pytest
from server.scripted import TOKENIZER, scripted_model

from nanoglm.engine import Engine
from nanoglm.server.service import Job, Reply, Service

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"c": {"type": "string", "maxLength": 4}}}}
END = TOKENIZER.encode("</think>")[0]


def jobs(service: Service, count: int) -> list[tuple[int, Job]]:
    """Drawn requests with their budgets; half of them will not stop thinking by themselves."""
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        budget = int(rng.integers(0, 40))
        kind = rng.integers(4)
        more = {} if kind < 2 else {"tools": [WEATHER], "tool_choice": "required"} if kind == 2 else {
            "schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        }  # fmt: skip
        sampling = {"temperature": float(rng.integers(0, 3)), "seed": i, "top_p": 1.0}
        if rng.random() < 0.5:
            sampling["logit_bias"] = {END: 5.0}
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


def thought(tokens: Sequence[int]) -> int:
    return next((i for i, token in enumerate(tokens) if token == END), len(tokens))


@pytest.mark.parametrize("drafts", [0, 3])
def test_no_request_thinks_one_token_too_many(drafts: int) -> None:
    model = scripted_model()
    service = Service(model, Engine(model.module, pages=400, drafts=drafts, most=64), ["tiny"], most=1000)

    async def run() -> list[tuple[int, tuple[Reply, list[int], str]]]:
        drawn = jobs(service, 500)
        found = await asyncio.gather(*(answer(service, job) for _, job in drawn))
        return [(budget, each) for (budget, _), each in zip(drawn, found, strict=True)]

    at_budget = 0
    for budget, (reply, tokens, _) in asyncio.run(run()):
        assert reply.thought <= budget, (reply.thought, budget)
        spent = min(thought(tokens), next((i for i, t in enumerate(tokens) if t == 279), 10**6))  # a call ends thought
        assert reply.thought == spent
        at_budget += reply.thought == budget
        assert reply.job.grammar is None or reply.finish in ("stop", "tool_calls")
    assert at_budget > 200  # the budget it was that ended it
    service.engine.engine.check()
