"""The engine for asyncio: steps run in a thread of their own, tokens come as they are decided.

>>> engine = AsyncEngine(Engine(model, pages=64))
>>> async for token in engine.generate([1, 2, 3], SamplingParams(max_tokens=5)):
...     print(token)

Whoever stops listening ends the request: leaving the loop, or being cancelled, gives its pages back before the next
step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from nanoglm.engine.engine import Engine
from nanoglm.engine.params import SamplingParams
from nanoglm.engine.request import Request
from nanoglm.errors import InputError


class AsyncEngine:
    """Many listeners over one engine, which nobody else steps. For one event loop.

    A request may be added while a step runs (a queue's append is one operation); all else waits until it is over.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, "engine")
        self._news: dict[Request, asyncio.Queue[tuple[list[int], bool] | Exception]] = {}  # tokens, whether the last
        self._gone: list[Request] = []  # whose listener left
        self._running: asyncio.Task[None] | None = None

    async def generate(self, prompt: Sequence[int], params: SamplingParams | None = None) -> AsyncIterator[int]:
        """Yields the continuation's tokens.

        Raises:
            InputError: what cannot be a request; or its mask let nothing follow.
        """
        request = self.engine.add(prompt, params)
        news = self._news[request] = asyncio.Queue()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        ended = False
        try:
            while not ended:
                found = await news.get()
                if isinstance(found, Exception):
                    raise found
                tokens, ended = found  # not request.finish: a step that runs meanwhile may have set it
                for token in tokens:
                    yield token
        finally:
            del self._news[request]
            if request.finish is None:
                self._gone.append(request)
        if request.error is not None:
            raise InputError(request.error)

    async def _run(self) -> None:
        """Steps while somebody waits for something."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self._gone:
                    self.engine.abort(self._gone.pop())
                if not self.engine.busy:
                    break
                for request, tokens in await loop.run_in_executor(self._thread, self.engine.step):
                    if request in self._news:
                        self._news[request].put_nowait((tokens, request.finish is not None))
        except Exception as error:  # of the model: every listener hears of it
            for news in self._news.values():
                news.put_nowait(error)
        finally:
            self._running = None
