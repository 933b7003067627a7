"""Who runs in the next step, and with how many tokens.

First come, first served: running requests before waiting ones, and of the running those that decode before those whose
prompt is still being read, so that a long prompt delays nobody by more than a step. A step has a budget of tokens;
prompts are cut to it. Pages that run out are taken from the prefix tree, then from the youngest running request, which
goes back to the head of the queue with its tokens and drafts and is computed anew later: to the same end, since a row's
bits depend on nothing beside it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from nanoglm.cache import PagedCache, PrefixCache
from nanoglm.engine.request import Request


@dataclass(frozen=True)
class Work:
    """What one request does in a step: ``count`` of its tokens, of which the last ``drafts`` are to be verified."""

    request: Request
    count: int
    drafts: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the end of the request's tokens, so that the next is drawn."""
        return self.request.computed + self.count >= self.request.length


class Scheduler:
    """Queues of waiting and running requests over one cache.

    Args:
        budget: tokens of a step. most: requests that run at once.
        prefix: the tree of known prefixes, or None. meaning: what its pages mean here.
        drafting: whether a page is whole only with the MTP layer's entries.
    """

    def __init__(
        self, cache: PagedCache, prefix: PrefixCache | None, budget: int, most: int, drafting: bool = False,
        meaning: Hashable = None,
    ) -> None:  # fmt: skip
        self.cache, self.prefix, self.budget, self.most = cache, prefix, budget, most
        self.drafting, self.meaning = drafting, meaning
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their coming

    def plan(self) -> list[Work]:
        """The next step's work. Pages for it are free; :meth:`PagedCache.extend` takes them."""
        found: list[Work] = []
        left, promised, sent = self.budget, 0, False
        decoding = [r for r in self.running if r.computed + 1 >= r.length]
        reading = [r for r in self.running if r.computed + 1 < r.length]
        for request in decoding + reading:
            if request.handle is None:  # sent back for another's sake
                continue
            count = _count(request, left)
            while count and not self._room(request, count, promised):
                youngest = next((r for r in reversed(self.running) if all(r is not w.request for w in found)), request)
                self.send_back(youngest)
                sent = True  # and nobody begins now, or it would come straight back
                if youngest is request:
                    break
            if count and request.handle is not None:
                found.append(self._work(request, count))
                promised, left = promised + self.cache.needs(request.handle, count), left - count
        while left and not sent and self.waiting and len(self.running) < self.most:
            request = self.waiting[0]
            self._begin(request)
            count = _count(request, left)
            if not count or not self._room(request, count, promised):
                self.stop(request)
                break
            self.waiting.popleft()
            self.running.append(request)
            assert request.handle is not None
            found.append(self._work(request, count))
            promised, left = promised + self.cache.needs(request.handle, count), left - count
        return found

    def _work(self, request: Request, count: int) -> Work:
        return Work(request, count, max(0, request.computed + count - request.length))

    def _begin(self, request: Request) -> None:
        """Opens it in the cache, with what is known of its tokens."""
        known: list[int] = []
        if (
            self.prefix is not None and request.params.prompt_logprobs is None and request.trace is None
        ):  # need every row
            known = self.prefix.match(request.ids, self.meaning)
        request.handle = self.cache.open(known)
        request.computed = request.entries = self.cache.length(request.handle)
        if request.began is None:
            request.hit, request.began = request.computed, time.monotonic()

    def _room(self, request: Request, count: int, promised: int) -> bool:
        """Whether ``count`` tokens more fit beside ``promised`` pages; pages of prefixes that nobody uses make way."""
        assert request.handle is not None
        missing = self.cache.needs(request.handle, count) + promised - self.cache.free_pages
        return missing <= 0 or (self.prefix is not None and self.prefix.evict(missing) >= missing)

    def send_back(self, request: Request) -> None:
        """Takes all pages of a running request, which will be computed anew."""
        self.running.remove(request)
        self.stop(request)
        request.preempted += 1
        self.waiting.appendleft(request)

    def stop(self, request: Request) -> None:
        """Lets go of its pages; what is known to be whole stays in the tree."""
        if request.handle is not None:
            self.remember(request)
            self.cache.close(request.handle)
            if request.trace is not None and request.finish is None:
                request.trace.cut(0)
        request.handle, request.computed, request.entries, request.unread = None, 0, 0, []

    def remember(self, request: Request) -> None:
        """Gives the request's full pages to the tree."""
        if self.prefix is not None and request.handle is not None:
            whole = request.computed if not self.drafting else min(request.computed, request.entries + 1)
            ids = request.ids[:whole]
            self.prefix.insert(ids, self.cache.table(request.handle), self.meaning)

    def remove(self, request: Request) -> None:
        """Takes a finished or aborted request out, wherever it is."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.stop(request)


def _count(request: Request, left: int) -> int:
    """How many tokens it computes of at most ``left``: the last one and its drafts together or not at all, so that what
    is drawn does not depend on the room there was."""
    wanted = request.length - request.computed + len(request.drafts)
    return wanted if wanted <= left else min(left, request.length - 1 - request.computed)
