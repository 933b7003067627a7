"""What all interfaces share: a conversation becomes a job, a job becomes replies, replies come in pieces.

An interface translates its request into a :class:`Job` and pieces into its own events; nothing in here knows HTTP.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nanoglm.api import Model, Until
from nanoglm.chat.constraint import Constraint, Grammar, Grammars
from nanoglm.chat.effort import effort_switches, thinking_budget
from nanoglm.chat.files import sampling_defaults
from nanoglm.chat.parser import Delta
from nanoglm.chat.reader import Reader
from nanoglm.engine import AsyncEngine, Engine, Request, SamplingParams
from nanoglm.engine.request import Logprobs
from nanoglm.errors import InputError
from nanoglm.server.metrics import Metrics

Reason = Literal["stop", "length", "tool_calls", "abort"]
MOST_TOKENS = 65_536  # of a reply whose request names no limit, as the vendor's
MOST_REPLIES = 16
NAME = re.compile(r"[\w.:/-]{1,128}")  # of a function


class NotFound(Exception):
    """What a request names is not here. Not LookupError: one of those is a mistake of ours."""


class Overloaded(Exception):
    """More requests than the server takes at once."""


class ShuttingDown(Exception):
    """The server takes no more requests, and has no more time for those that it took."""


@dataclass(frozen=True)
class Job:
    """A prompt and how to continue it.

    Attributes:
        thinking: whether the prompt ends within a thought. raw: text as it comes, no parser (a completion, not a chat).
        tools: declarations that calls are read by. several: whether more than one may come. stop: texts that end the
            reply and are not in it; they are looked for in content only, not in thought or calls. n: replies.
        xray: whether Selections are kept to be looked at.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    thinking: bool = False
    raw: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    several: bool = True
    budget: int | None = None
    grammar: Grammar | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    xray: bool = False


@dataclass(frozen=True)
class Piece:
    """What one step of the engine added to a reply. The last one has a reason."""

    index: int
    deltas: tuple[Delta, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish: Reason | None = None


@dataclass
class Reply:
    """One continuation on its way.

    Attributes:
        tokens: handed out so far, of which ``thought`` are reasoning. times: of its coming and of every step that gave
            it tokens, on the monotonic clock. finish: why it ended. stopped_by: the stop text that did.
    """

    index: int
    job: Job
    request: Request
    tokens: int = 0
    thought: int = 0
    times: list[float] = field(default_factory=lambda: [time.monotonic()])
    finish: Reason | None = None
    stopped_by: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a job."""

    prompt: int
    completion: int
    cached: int
    reasoning: int
    accepted: int
    rejected: int

    @staticmethod
    def of(replies: Sequence[Reply]) -> Usage:
        accepted = sum(sum(reply.request.kept[: reply.tokens]) for reply in replies)
        drafted = sum(sum(reply.request.drafted) for reply in replies)
        return Usage(
            sum(len(job.prompt) for job in {id(reply.job): reply.job for reply in replies}.values()),
            sum(reply.tokens for reply in replies),
            max(reply.request.hit for reply in replies), sum(reply.thought for reply in replies), accepted,
            max(0, drafted - accepted),
        )  # fmt: skip


class Service:
    """A model, an engine that stays, and what is known of requests.

    Args:
        names: under which the model is asked for, the first is its own. most: requests at once, running and waiting.
        timeout: seconds that a request may take; None for any. context: most tokens of prompt and reply, if fewer than
            the model and the cache take.
    """

    def __init__(
        self, model: Model, engine: Engine, names: Sequence[str], *, most: int = 256, timeout: float | None = None,
        context: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.names, self.timeout, self._most = model, tuple(names), timeout, most
        self.metrics = Metrics(self.names[0], engine)
        self.engine = AsyncEngine(engine, self.metrics.step)
        # The last page is the engine's: a request must always be able to go on alone.
        self.context = min(model.config.max_position_embeddings, engine.cache.pages * 64, context or 2**62)
        self.tokenizer = model.tokenizer
        self.grammars = Grammars(self.tokenizer, model.config.vocab_size, model.config.eos_token_id)
        self._defaults: dict[str, Any] = sampling_defaults(model.directory)
        self.created = int(time.time())
        self._busy = 0  # replies that have started and not ended
        self._live: set[asyncio.Queue[Piece | Exception]] = set()
        self._draining = False
        self._think = self.tokenizer.encode("<think>")

    # ---------------------------------------------------------------- jobs
    def check_name(self, name: str | None) -> None:
        """Raises NotFound for a model that is not served; a suffix such as [1m] asks for the context there is."""
        if name is not None and name not in self.names and name.removesuffix("[1m]") not in self.names:
            raise NotFound(f"model {name!r} is not served here; expected one of {', '.join(self.names)}")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tool_choice: Any = "auto",
        several: bool = True,
        schema: Mapping[str, Any] | None = None,
        effort: str | None = None,
        thinking: Mapping[str, Any] | None = None,
        switches: Mapping[str, Any] | None = None,
        budget: int | None = None,
        max_tokens: int | None = None,
        clamp: bool = False,
        sampling: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Job:
        """A conversation as a job. Long texts and large schemas take time: not for the event loop's thread.

        Args:
            tool_choice: none, auto, required, or the name of a function in an object as OpenAI has it.
            several: whether a reply may hold more than one call. schema: of the reply's text.
            clamp: take fewer tokens than ``max_tokens`` where there is no room for so many, instead of refusing.
            effort, thinking, switches, budget: how hard to think (``chat.effort``). sampling: of ``SamplingParams``.
            options: of :class:`Job`.

        Raises:
            InputError: whatever cannot be used, in a sentence.
        """
        functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
        forced = _forced(tool_choice, functions)
        if tool_choice == "none":
            tools, functions = None, []
        prompt = self.prompt(messages, tools, effort=effort, thinking=thinking, switches=switches)
        if clamp and max_tokens is not None:
            max_tokens = max(1, min(max_tokens, self.context - len(prompt)))
        grammar = None
        if forced is not None:
            grammar = self.grammars.calls(forced, several)
        elif schema is not None:
            grammar = self.grammars.calls(functions, several, schema) if functions else self.grammars.json(schema)
        if grammar is not None:
            _ = grammar.least  # found here and not where everybody waits
        return Job(
            tuple(prompt), self.params(len(prompt), max_tokens, sampling or {}), self.within_thought(prompt),
            tools=tuple(functions), several=several, budget=thinking_budget(thinking, budget), grammar=grammar,
            **options,
        )  # fmt: skip

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, *,
        effort: str | None = None, thinking: Mapping[str, Any] | None = None,
        switches: Mapping[str, Any] | None = None, add_generation_prompt: bool = True,
    ) -> list[int]:  # fmt: skip
        """A conversation's ids."""
        if not messages:
            raise InputError("messages is empty; expected at least one")
        found = effort_switches(effort, thinking, switches)
        return self.model.template.encode(
            self.tokenizer, messages, list(tools) if tools else None, add_generation_prompt=add_generation_prompt,
            **found,
        )  # fmt: skip

    def within_thought(self, prompt: Sequence[int]) -> bool:
        """Whether a rendered prompt ends in an open thought; the request's switches may say otherwise and be wrong."""
        return list(prompt[-len(self._think) :]) == self._think

    def params(self, prompt: int, max_tokens: int | None, sampling: Mapping[str, Any]) -> SamplingParams:
        """Sampling; the checkpoint's own where the request says nothing."""
        room = self.context - prompt
        if room < 1 or (max_tokens or 0) > room:
            wanted = f" and {max_tokens} new ones are wanted" if max_tokens else ""
            raise InputError(
                f"prompt has {prompt} tokens{wanted}; expected at most {self.context} together, the model's context "
                "length here"
            )
        given = self._defaults | {k: v for k, v in sampling.items() if v is not None}
        if given.get("top_k", 0) in (0, -1):  # vLLM's words for all
            given.pop("top_k", None)
        return SamplingParams(
            max_tokens=min(room, MOST_TOKENS) if max_tokens is None else max_tokens,
            stop_ids=self.model.config.eos_token_id,
            **given,
        )  # fmt: skip

    # ---------------------------------------------------------------- replies
    def start(self, job: Job) -> list[Reply]:
        """Queues a job's replies: see :meth:`start_all`."""
        return self.start_all([job])

    def start_all(self, jobs: Sequence[Job]) -> list[Reply]:
        """Queues the replies of several jobs, numbered through.

        Raises:
            InputError: what the engine refuses; nothing is queued then. Overloaded: too many requests.
            ShuttingDown: no more are taken.
        """
        if self._draining:
            raise ShuttingDown
        if not all(1 <= job.n <= MOST_REPLIES for job in jobs):
            raise InputError(f"n is {jobs[0].n}; expected 1 to {MOST_REPLIES}")
        each = [job for job in jobs for _ in range(job.n)]
        if len(each) > self._most:
            raise InputError(f"request asks for {len(each)} replies; expected at most {self._most}")
        if self._busy + len(each) > self._most:
            raise Overloaded(f"server has {self._busy} requests; expected at most {self._most}, try again later")
        requests: list[Request] = []
        try:
            for i, job in enumerate(each):
                seed = (job.params.seed + i % job.n) % 2**64
                params = replace(job.params, seed=seed, mask=self._mask(job))
                requests.append(self.engine.add(job.prompt, params, record=job.xray))
        except Exception:
            for request in requests:
                self.engine.abort(request)
            raise
        self._busy += len(each)
        return [Reply(i, job, request) for i, (job, request) in enumerate(zip(each, requests, strict=True))]

    def _mask(self, job: Job) -> Constraint | None:
        if job.grammar is None and (job.budget is None or not job.thinking):
            return None
        names = self.grammars.names(job.tools) if job.tools and job.grammar is None else None
        return Constraint(
            self.grammars, job.params.max_tokens, thinking=job.thinking, budget=job.budget, grammar=job.grammar,
            names=names,
        )  # fmt: skip

    async def pieces(self, replies: Sequence[Reply]) -> AsyncGenerator[Piece, None]:
        """What comes of replies that were started, as it comes. Leaving ends them; so does the time limit.

        Whoever starts replies asks for the first piece at once, before anything else is awaited: a generator that never
        ran cleans nothing up.

        Raises:
            InputError: a mask let nothing follow. TimeoutError: it took too long.
        """
        news: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._live.add(news)
        tasks = [asyncio.create_task(self._listen(reply, news)) for reply in replies]
        left, deadline = len(replies), None if self.timeout is None else time.monotonic() + self.timeout
        try:
            while left:
                seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
                found = await asyncio.wait_for(news.get(), seconds)
                if isinstance(found, Exception):
                    raise found
                left -= found.finish is not None
                yield found
        finally:
            self._busy -= len(replies)
            self._live.discard(news)
            for reply, task in zip(replies, tasks, strict=True):
                task.cancel()
                self.engine.abort(reply.request)  # as its task does when it is cancelled, but for one that never began
                self.metrics.finished(reply.request, reply.tokens, reply.finish or "abort", reply.times)

    def drain(self) -> None:
        """No request more; those that run go on."""
        self._draining = True

    def end(self) -> None:
        """Those that still run end now, each with an error that says so."""
        for news in self._live:
            news.put_nowait(ShuttingDown())

    async def _listen(self, reply: Reply, news: asyncio.Queue[Piece | Exception]) -> None:
        try:
            async with aclosing(self._pieces(reply)) as pieces:
                async for piece in pieces:
                    news.put_nowait(piece)
        except Exception as error:  # for whoever waits for the pieces
            news.put_nowait(error)

    async def _pieces(self, reply: Reply) -> AsyncGenerator[Piece, None]:
        """Text is decoded, parsed and searched for stop texts token by token, and handed on step by step."""
        job, request = reply.job, reply.request
        until, markup = Until(job.stop), None if job.grammar is None else self.grammars.markup
        reader = Reader(self.tokenizer, job.thinking, job.tools, raw=job.raw, markup=markup)

        def over() -> bool:
            return until.found is not None or (not job.several and reader.calls > 0)

        async with aclosing(self.engine.tokens(request)) as steps:
            async for tokens in steps:
                deltas, begin = list[Delta](), reply.tokens
                for token in tokens:
                    deltas += _until(reader.push(token), until)
                    reply.tokens, reply.thought = reply.tokens + 1, reader.thought
                    if over():
                        break
                if tokens:
                    reply.times.append(time.monotonic())
                    seen = slice(begin, reply.tokens)
                    given = tuple(request.outputs[seen]), tuple(request.logprobs[seen])
                    yield Piece(reply.index, _merged(deltas), *given)
                if over():
                    break
        deltas = _until(reader.finish(request.finish == "stop"), until)
        reply.thought = reader.thought
        if rest := until.flush():
            deltas.append(Delta("content", rest))
        length = request.finish == "length" and not over()
        reply.stopped_by = until.found
        reply.finish = "tool_calls" if reader.calls else "length" if length else "stop"
        yield Piece(reply.index, _merged(deltas), (), (), reply.finish)


def _merged(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """Neighbours of one kind as one, but for calls: each is another."""
    found = list[Delta]()
    for delta in deltas:
        last = found[-1] if found else None
        if last is not None and delta.kind != "call" and (last.kind, last.index) == (delta.kind, delta.index):
            found[-1] = replace(last, text=last.text + delta.text)
        else:
            found.append(delta)
    return tuple(found)


def _until(deltas: Sequence[Delta], until: Until) -> list[Delta]:
    """The deltas up to the stop text, which is looked for in content. What is held back of content never stays behind
    what comes after it: a call or a thought makes certain that it is no stop text."""
    found = list[Delta]()
    for delta in deltas:
        if until.found is not None:
            break
        if delta.kind == "content":
            delta = replace(delta, text=until.push(delta.text))
        elif held := until.flush():
            found.append(Delta("content", held))
        if delta.text:
            found.append(delta)
    return found


def _function(tool: Any, where: str) -> Mapping[str, Any]:
    """A declaration without its wrapper."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"{where} is {tool!r}; expected a function with a name of letters, digits and ._:/-")
    if not isinstance(inner.get("parameters") or {}, Mapping):
        raise InputError(f"{where}.parameters is {inner['parameters']!r}; expected a JSON schema")
    return inner


def _forced(choice: Any, functions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The functions of which one must be called; None if the model decides."""
    if choice in (None, "none", "auto"):
        return None
    if choice == "required":
        found, wanted = list(functions), "any"
    else:
        inner = choice.get("function", choice) if isinstance(choice, Mapping) else None
        wanted = inner.get("name", "") if isinstance(inner, Mapping) else ""
        if not wanted or not isinstance(wanted, str):
            raise InputError(f"tool_choice is {choice!r}; expected none, auto, required or a function's name")
        found = [function for function in functions if function["name"] == wanted]
    if not found:
        raise InputError(f"tool_choice asks for {wanted!r}; expected tools to have it")
    return found
