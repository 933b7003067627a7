"""Listeners of the asynchronous engine: their tokens are the plain loop's, and who leaves gives its pages back."""

from __future__ import annotations

import asyncio
import random
import resource
import time

import pytest
import torch
from engine.test_engine import alone, build, prompt

from nanoglm.engine import AsyncEngine, Engine, SamplingParams
from nanoglm.errors import InputError


def test_listeners_get_what_each_gets_alone() -> None:
    async def listen(engine: AsyncEngine, seed: int) -> list[int]:
        await asyncio.sleep(seed / 100)
        return [token async for token in engine.generate(prompt(40, seed), SamplingParams(20))]

    async def all_of_them() -> list[list[int]]:
        engine = AsyncEngine(Engine(build(), pages=12, budget=30, drafts=2))
        found = await asyncio.gather(*(listen(engine, seed) for seed in range(6)))
        engine.engine.check()
        return found

    for seed, tokens in enumerate(asyncio.run(all_of_them())):
        assert tokens == alone(tuple(prompt(40, seed)), SamplingParams(20))


def test_the_last_tokens_reach_a_slow_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that ends the request is under way, and has ended it, while the listener is at the tokens before."""

    async def listen() -> list[int]:
        engine = AsyncEngine(Engine(build(), pages=8))
        step = engine.engine.step

        def late() -> object:
            found = step()
            time.sleep(0.1)
            return found

        monkeypatch.setattr(engine.engine, "step", late)
        tokens = []
        async for token in engine.generate(prompt(9), SamplingParams(4)):
            tokens.append(token)
            await asyncio.sleep(0.05)
        return tokens

    assert asyncio.run(listen()) == alone(tuple(prompt(9)), SamplingParams(4))


def test_who_leaves_ends_the_request() -> None:
    async def leave() -> None:
        engine = AsyncEngine(Engine(build(), pages=8, prefix=False))
        listening = engine.generate(prompt(30), SamplingParams(90))
        assert [await anext(listening) for _ in range(3)] == alone(tuple(prompt(30)), SamplingParams(90))[:3]
        await listening.aclose()
        other = [token async for token in engine.generate(prompt(9), SamplingParams(5))]
        assert other == alone(tuple(prompt(9)), SamplingParams(5))
        while engine.engine.busy:
            await asyncio.sleep(0.01)
        assert engine.engine.cache.free_pages == 8

    asyncio.run(leave())


def test_errors_reach_the_listener() -> None:
    async def nothing_may_follow() -> None:
        engine = AsyncEngine(Engine(build(), pages=8))
        params = SamplingParams(5, mask=lambda outputs: torch.zeros(320, dtype=torch.bool) if outputs else None)
        tokens = []
        with pytest.raises(InputError, match="mask allows no token behind 1 generated ones"):
            async for token in engine.generate([1, 2], params):
                tokens.append(token)
        assert len(tokens) == 1
        with pytest.raises(InputError, match="prompt is empty"):
            await anext(engine.generate([]))

    asyncio.run(nothing_may_follow())


@pytest.mark.slow
def test_a_thousand_requests_with_aborts_leave_memory_flat() -> None:
    async def one(engine: AsyncEngine, seed: int, limit: asyncio.Semaphore) -> None:
        draw = random.Random(seed)
        async with limit:
            until = draw.choice([0, 1, 5, 100])
            listening = engine.generate(prompt(draw.randint(1, 150), seed % 7), SamplingParams(draw.randint(1, 20)))
            count = 0
            async for _ in listening:
                if (count := count + 1) > until:
                    break
            await listening.aclose()

    async def many(engine: AsyncEngine, seeds: range) -> None:
        limit = asyncio.Semaphore(8)
        await asyncio.gather(*(one(engine, seed, limit) for seed in seeds))
        while engine.engine.busy:
            await asyncio.sleep(0.01)
        engine.engine.check()

    async def run() -> None:
        engine = AsyncEngine(Engine(build(), pages=24, budget=64, drafts=2))
        await many(engine, range(100))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await many(engine, range(100, 1000))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
        assert engine.engine.cache.free_pages + len(engine.engine.prefix or ()) == 24

    asyncio.run(run())
