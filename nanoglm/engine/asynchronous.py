"""The engine for asyncio: steps run in a thread of their own, tokens come as they are decided.

>>> engine = AsyncEngine(Engine(model, pages=64))
>>> async for token in engine.generate([1, 2, 3], SamplingParams(max_tokens=5)):
...     print(token)

Whoever stops listening ends the request: leaving the loop, or being cancelled, gives its pages back before the next
step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from nanoglm.engine.engine import Engine
from nanoglm.engine.params import SamplingParams
from nanoglm.engine.request import Request
from nanoglm.errors import InputError


class AsyncEngine:
    """Many listeners over one engine, which nobody else steps. For one event loop.

    A request may be added while a step runs (a queue's append is one operation); all else waits until it is over.

    Args:
        observe: called on the loop behind every step.
    """

    def __init__(self, engine: Engine, observe: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self._observe = observe
        self._thread = ThreadPoolExecutor(1, "engine")
        self._news: dict[Request, asyncio.Queue[tuple[list[int], bool] | Exception]] = {}  # tokens, whether the last
        self._gone: list[Request] = []  # whose listener left
        self._running: asyncio.Task[None] | None = None

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None, record: bool = False) -> Request:
        """Queues a request, to be listened to once, by :meth:`tokens`, or ended, by :meth:`abort`.

        Raises:
            InputError: as ``Engine.add`` does.
        """
        request = self.engine.add(prompt, params, record)
        self._news[request] = asyncio.Queue()
        self._go()
        return request

    def abort(self, request: Request) -> None:
        """Ends a request before the next step. Nothing happens if it has ended, or nobody listens any more."""
        if self._news.pop(request, None) is not None and request.finish is None:
            self._gone.append(request)
            self._go()  # a step may be long over

    async def tokens(self, request: Request) -> AsyncGenerator[list[int], None]:
        """Yields what each step gave it, the last one perhaps nothing.

        Raises:
            InputError: its mask let nothing follow.
        """
        news, ended = self._news[request], False
        try:
            while not ended:
                found = await news.get()
                if isinstance(found, Exception):
                    raise found
                tokens, ended = found  # not request.finish: a step that runs meanwhile may have set it
                yield tokens
        finally:
            self.abort(request)
        if request.error is not None:
            raise InputError(request.error)

    async def generate(self, prompt: Sequence[int], params: SamplingParams | None = None) -> AsyncIterator[int]:
        """Yields the continuation's tokens one by one.

        Raises:
            InputError: what cannot be a request; or its mask let nothing follow.
        """
        request = self.add(prompt, params)
        try:
            async for tokens in self.tokens(request):
                for token in tokens:
                    yield token
        finally:
            self.abort(request)  # in case this was left before the first step: nothing else would then

    def close(self) -> None:
        """Lets go of the thread, once the step that runs is over."""
        self._thread.shutdown(wait=True)

    def _go(self) -> None:
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

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
                self._observe()
        except Exception as error:  # of the model: every listener hears of it
            for news in self._news.values():
                news.put_nowait(error)
        finally:
            self._running = None
