"""Who runs in the next step, and with how many tokens.

First come, first served: running requests before waiting ones, and of the running those that decode before those whose
prompt is still being read, so that a long prompt delays nobody by more than a step. A step has a budget of tokens;
prompts are cut to it. Pages that run out are taken from the prefix tree, then from the youngest running request, which
goes back to the head of the queue and is computed anew later: the same tokens, since a row's bits depend on nothing
beside it.
"""

from __future__ import annotations

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
        return self.request.computed + self.count == self.request.length + self.drafts


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
            if left == 0 or request.handle is None:  # the latter was sent back for another's sake
                continue
            drafts = min(len(request.drafts), left - 1) if request in decoding else 0
            count = min(request.length - request.computed + drafts, left)
            if drafts and not self._room(request, count, promised):
                count, drafts = count - drafts, 0  # a page for drafts is worth nobody's place
            while not self._room(request, count, promised):
                youngest = next((r for r in reversed(self.running) if all(r is not w.request for w in found)), request)
                self.send_back(youngest)
                sent = True  # and nobody begins now, or it would come straight back
                if youngest is request:
                    break
            if request.handle is None:
                continue
            promised += self.cache.needs(request.handle, count)
            left -= count
            found.append(Work(request, count, drafts))
        while left and not sent and self.waiting and len(self.running) < self.most:
            request = self.waiting[0]
            self._begin(request)
            count = min(request.length - request.computed, left)
            if not self._room(request, count, promised):
                self.stop(request)
                break
            self.waiting.popleft()
            self.running.append(request)
            assert request.handle is not None
            promised += self.cache.needs(request.handle, count)
            left -= count
            found.append(Work(request, count, 0))
        return found

    def _begin(self, request: Request) -> None:
        """Opens it in the cache, with what is known of its tokens."""
        known: list[int] = []
        if self.prefix is not None and request.params.prompt_logprobs is None:  # those need every row
            known = self.prefix.match(request.ids, self.meaning)
        request.handle = self.cache.open(known)
        request.computed = request.entries = self.cache.length(request.handle)
        if not request.preempted:
            request.hit = request.computed

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
        request.handle, request.computed, request.entries, request.unread = None, 0, 0, []
        request.drafts, request.draft_probs = [], []

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
