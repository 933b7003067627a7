"""The engine: many requests over one model, a step at a time.

>>> engine = Engine(model, pages=64)
>>> request = engine.add([1, 2, 3], SamplingParams(max_tokens=5))
>>> while engine.busy:
...     for request, tokens in engine.step():
...         print(request.number, tokens, request.finish)

A request's tokens do not depend on what else runs, on the budget, on hits in the prefix cache, on being sent back or,
if it is greedy, on drafts: rows are independent of each other bit by bit (docs/architecture.md), and all else is the
request's own. Sampled tokens do depend on how many drafts there are, and on nothing else than that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from nanoglm.cache import PAGE, PagedCache, PrefixCache
from nanoglm.engine.depth import Depth
from nanoglm.engine.params import SamplingParams
from nanoglm.engine.record import Trace
from nanoglm.engine.request import Logprobs, Request, check_prompt
from nanoglm.engine.runner import Runner, reads_prompt
from nanoglm.engine.scheduler import Scheduler, Work
from nanoglm.engine.speculative import verify
from nanoglm.errors import InputError
from nanoglm.model import GLM

MOST_DRAFTS = 7  # of GLM-5.2's ablation (serving spec 4.5)
LATE = 512  # rows of which the MTP layer's entries are written at once where nothing is drafted


class Engine:
    """Continuous batching over a paged cache. Not for several threads; see ``AsyncEngine``.

    Args:
        model: the weights. pages: of 64 tokens, that the cache holds.
        budget: tokens of a step. most: requests that run at once.
        drafts: of a chain, that the MTP layer proposes; 0 for none, auto for as many as pay, up to 7, step by step.
        prefix: whether pages are kept for requests that begin alike. index_dtype: of index keys, see ``PagedCache``.

    Raises:
        InputError: a number out of range, or drafts of a model without an MTP layer.
    """

    def __init__(
        self, model: GLM, *, pages: int, budget: int = 1024, most: int = 64, drafts: int | Literal["auto"] = 0,
        prefix: bool = True, index_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.depth = Depth(MOST_DRAFTS) if drafts == "auto" else None
        self.most_drafts = MOST_DRAFTS if drafts == "auto" else drafts
        least = self.most_drafts + 1  # a chain is verified in one step
        limits = ("drafts", self.most_drafts, 0), ("pages", pages, 1), ("budget", budget, least), ("most", most, 1)
        for name, value, least in limits:
            if value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        if self.most_drafts:
            _ = model.mtp  # refuses with a sentence
        self.model, weight = model, model.lm_head.weight
        self.cache = PagedCache(model.config, pages, dtype=weight.dtype, index_dtype=index_dtype, device=weight.device)
        drafting = self.most_drafts > 0
        meaning = (model.config.pattern, weight.dtype, index_dtype, drafting)
        self.prefix = PrefixCache(self.cache) if prefix else None
        self.scheduler = Scheduler(self.cache, self.prefix, budget, most, drafting, meaning)
        self.runner = Runner(model, self.cache, drafting)
        self._numbers = 0
        self.computed = 0  # tokens of the last step

    # ---------------------------------------------------------------- requests
    def add(self, prompt: Sequence[int], params: SamplingParams | None = None, record: bool = False) -> Request:
        """Queues a request.

        Args:
            record: keep its Selections and routes, in ``Request.trace``; no page is taken from the prefix cache then.

        Raises:
            InputError: the prompt is empty, holds what is no token, or can never fit with what it may generate; or the
                params name what is no token.
        """
        params = params or SamplingParams()
        check_prompt(self.model, prompt, params.max_tokens)
        wanted, pages = len(prompt) + params.max_tokens, self.cache.pages
        if -(-wanted // PAGE) > pages:
            raise InputError(
                f"request has {len(prompt)} tokens and wants {params.max_tokens} new ones; expected at most "
                f"{pages * PAGE} together, what the cache of {pages} pages holds"
            )
        vocabulary = self.model.config.vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids)):
            for i in ids:
                if not 0 <= i < vocabulary:
                    raise InputError(f"{name} names token id {i}; expected 0 to {vocabulary - 1}")
        request = Request(self._numbers, tuple(prompt), params, trace=Trace(self.model.config) if record else None)
        if self.depth is not None and params.temperature > 0:
            request.depth = Depth(self.most_drafts)
        self._numbers += 1
        self.scheduler.waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is, between two steps; its pages are free. Nothing happens if it has ended."""
        if request.finish is None:
            request.finish = "abort"
            self.scheduler.remove(request)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def generate(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Iterator[int]:
        """Yields one request's tokens as they come; the others that wait or run go on with it."""
        request = self.add(prompt, params)
        try:
            while request.finish is None:
                for other, tokens in self.step():
                    if other is request:
                        yield from tokens
        finally:
            self.abort(request)

    # ---------------------------------------------------------------- steps
    @torch.no_grad()
    def step(self) -> list[tuple[Request, list[int]]]:
        """Runs one step; returns each request that got tokens, or ended, with its new tokens."""
        works = self.scheduler.plan()
        self.computed = sum(work.count for work in works)
        if not works:
            return []
        begins, began = [work.request.computed for work in works], time.perf_counter()
        hidden, logits = self.runner.run(works)
        found = []
        for work, rows in zip(works, logits, strict=True):
            before, samples = len(work.request.outputs), work.samples  # before it moves on
            self._take(work, rows)
            if samples:
                found.append((work.request, work.request.outputs[before:]))
        if self.most_drafts:
            self._draft(works, hidden, begins, [request for request, _ in found], time.perf_counter() - began)
        for work in works:
            if work.request.finish is not None:
                self.scheduler.remove(work.request)
            elif (work.request.computed - 1) % PAGE < work.count:  # behind a full page stands a token now
                self.scheduler.remember(work.request)
        return found

    def _draft(
        self, works: Sequence[Work], hidden: Tensor, begins: Sequence[int], sampled: Sequence[Request], verifying: float
    ) -> None:  # fmt: skip
        """The MTP layer's part of a step, to the depth that pays.

        Args:
            sampled: who got a token, and so a chain; nobody else, or chunks and being sent back would change what is
                drawn. verifying: seconds that the rest of the step took.
        """
        began, requests = time.perf_counter(), [work.request for work in works]
        self.runner.keep(works, hidden, begins)
        going = sum(request.finish is None for request in requests)
        common = self.most_drafts if self.depth is None else self.depth.choose(going)
        depths = {r: common if r.depth is None else r.depth.choose(1) for r in sampled if not r.finish}
        # Where nothing is drafted, entries wait until there are many to write at once.
        late = [
            r for r in requests if r.computed - r.entries >= LATE or (r.finish is not None and self.prefix is not None)
        ]
        self.runner.draft([r for r in requests if depths.get(r) or r in late], depths)
        alike = all(r.depth is None and len(r.outputs) > 1 for r in requests)
        if self.depth is not None and alike and (common or not late) and not self.runner.graphs.capturing:
            verified = max(work.drafts for work in works)
            self.depth.took(going, verified, verifying, common, time.perf_counter() - began)

    def _take(self, work: Work, rows: Tensor | None) -> None:
        """Counts what is computed, and appends what follows."""
        request, samples = work.request, work.samples
        held = request.computed + work.count
        if rows is not None and reads_prompt(work):
            _prompt_logprobs(request, rows)
        request.computed = min(held, request.length)
        if samples:
            assert rows is not None
            rows = rows[len(rows) - work.drafts - 1 :]
            try:
                following = verify(request, rows)
                if (depth := request.depth or self.depth) is not None:
                    depth.accepted(work.drafts, len(following) - 1)
            except InputError as error:  # the request's own mask; the others go on
                following, request.finish, request.error = [], "abort", str(error)
            for place, (token, row) in enumerate(zip(following, rows, strict=False), 1):
                if not request.append(token) and request.finish == "stop":
                    break
                request.kept.append(place < len(following))
                if request.params.logprobs is not None:
                    request.logprobs.append(logprobs(row, token, request.params.logprobs))
                if request.finish is not None:
                    break
            request.drafts, request.draft_probs = [], []
            # All but the last token, which is new, or behind which nothing will come.
            request.computed = min(held, request.length - 1)
        assert request.handle is not None
        self.cache.rollback(request.handle, held - request.computed)
        if request.trace is not None:
            request.trace.cut(request.computed)

    def check(self) -> None:
        """Asserts that the cache's books are in order: every page has the holders that it says.

        Raises:
            AssertionError: with what is wrong.
        """
        handles = [r.handle for r in self.scheduler.running if r.handle is not None]
        (PrefixCache(self.cache) if self.prefix is None else self.prefix).check(handles)
        for request in self.scheduler.running:
            assert request.handle is not None and self.cache.length(request.handle) == request.computed
        assert all(request.handle is None for request in self.scheduler.waiting)


def logprobs(logits_V: Tensor, token: int, top: int) -> Logprobs:
    """Of a token, and of the ``top`` likeliest."""
    values_V = logits_V.float().log_softmax(-1)
    best = values_V.topk(min(top, len(values_V)))
    return Logprobs(token, float(values_V[token]), dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _prompt_logprobs(request: Request, rows: Tensor) -> None:
    """Of the prompt's tokens that these rows, which begin at ``computed``, predict."""
    top = request.params.prompt_logprobs
    assert top is not None
    for place, row in enumerate(rows, request.computed + 1):
        # Not again those of a pass before it was sent back.
        if len(request.prompt_logprobs) + 1 == place < len(request.prompt):
            request.prompt_logprobs.append(logprobs(row, request.prompt[place], top))
