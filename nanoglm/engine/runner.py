"""The model's part of a step: one pass over all rows, then the MTP layer's.

Shape legend: T rows of the step, N rows asked for, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nanoglm.cache import PagedCache
from nanoglm.engine.graphs import Graphs, Recorder, Tensors
from nanoglm.engine.request import Request
from nanoglm.engine.scheduler import Work
from nanoglm.engine.speculative import propose
from nanoglm.model import GLM, Tape
from nanoglm.model.step import Pass
from nanoglm.ops import Batch, captures


class Runner:
    """Runs a model over a cache.

    Args:
        drafting: whether the MTP layer's entries are kept, which drafts need.
    """

    def __init__(self, model: GLM, cache: PagedCache, drafting: bool) -> None:
        self.model, self.cache, self.drafting = model, cache, drafting
        self.device = model.lm_head.weight.device
        self.graphs = Graphs(Recorder() if captures(model.lm_head.weight) else None)
        self.pairs = 0  # (query, key) that one decoder layer saw

    def run(self, works: Sequence[Work]) -> tuple[Tensor, list[Tensor | None]]:
        """Computes each work's tokens.

        Returns:
            Hidden states [T, D] of all rows (without ``drafting`` perhaps only of those asked for); and the logits
            [N, V] of each work's rows: of a prompt whose logprobs are wanted all, else those that the next token is
            drawn behind.
        """
        self.graphs.capturing = False
        ids: list[int] = []
        for work in works:
            begin, n = work.request.computed, work.count
            ids += work.request.span(begin, begin + n)
            self.pairs += n * begin + n * (n + 1) // 2
        counts = [work.count for work in works]
        batch = self.cache.extend([_handle(work) for work in works], counts)
        asked = [asked_rows(work) for work in works]
        recorded = any(work.request.trace is not None for work in works)
        tape = Tape(indexers=False) if recorded else None
        tail = None if self.drafting or recorded else asked
        packed = torch.tensor(ids, device=self.device)
        if asked == counts and not recorded:
            (hidden,) = self.graphs.run("step", self._step, batch, packed)
        else:
            output = self.model(packed, batch, self.cache, tape=tape, tail=tail, keep_selections=recorded)
            hidden = output.hidden
            if tape is not None:
                _record(works, ids, output.selections, tape.experts)
        rows = hidden
        if tail is None:
            parts = hidden.split(counts)
            rows = torch.cat([part[len(part) - n :] for part, n in zip(parts, asked, strict=True)])
        logits = self.model.logits(rows).split(asked) if len(rows) else [rows] * len(works)
        return hidden, [part if n else None for part, n in zip(logits, asked, strict=True)]

    def _step(self, batch: Batch, ids_T: Tensor) -> Tensors:
        return (self.model(ids_T, batch, self.cache, keep_selections=False).hidden,)

    def keep(self, works: Sequence[Work], hidden_TD: Tensor, begins: Sequence[int]) -> None:
        """Keeps the hidden states of the rows that count, for the MTP layer.

        Args:
            begins: of each work, the position of its first row in this step.
        """
        parts = hidden_TD.split([work.count for work in works])
        for work, part, begin in zip(works, parts, begins, strict=True):
            if work.request.computed > begin:
                work.request.unread.append(part[: work.request.computed - begin])

    def draft(self, requests: Sequence[Request], depths: Mapping[Request, int]) -> None:
        """Writes the MTP layer's entries of all rows kept, and proposes drafts to each request that decodes.

        The chain starts from the last row: its Selection serves all drafts, and no draft's own key is ever read
        (architecture spec 3.3).

        Args:
            depths: how many drafts a request is to get that has just got a token; none if left out.
        """
        requests = [request for request in requests if request.unread]
        if not requests:
            return
        following = [i for request in requests for i in request.span(request.entries + 1, request.computed + 1)]
        counts = [request.computed - request.entries for request in requests]
        hidden_TD = torch.cat([rows for request in requests for rows in request.unread])
        batch = self.cache.last([_handle(request) for request in requests], counts)
        tokens = torch.tensor(following, device=self.device)
        m_TD, selection = self.graphs.run("entries", self._entries, batch, tokens, hidden_TD)
        for request in requests:
            request.entries, request.unread = request.computed, []
        # Behind the last draft there is room for a token.
        wanted = [min(depths.get(request, 0), request.left - 1) for request in requests]
        going = [(request, n) for request, n in zip(requests, wanted, strict=True) if n > 0]
        if not going:
            return
        ends = [end - 1 for end, n in zip(batch.borders[1:], wanted, strict=True) if n > 0]
        rows = torch.tensor(ends, device=self.device)
        m_TD, selection = m_TD[rows], selection[rows]
        batch = self.cache.last([_handle(request) for request, _ in going], [1] * len(going))
        for place in range(max(wanted)):
            if place:
                tokens = torch.tensor([(r.drafts or r.outputs)[-1] for r, _ in going], device=self.device)
                turned = replace(batch, rope_positions=batch.positions + place - 1)
                (m_TD,) = self.graphs.run("draft", self._further, turned, tokens, m_TD, selection)
            for (request, n), logits_V in zip(going, self.model.logits(m_TD), strict=True):
                if len(request.drafts) == place < n:  # less where a mask let nothing follow
                    propose(request, logits_V)

    def _entries(self, batch: Batch, following_T: Tensor, hidden_TD: Tensor) -> Tensors:
        """The MTP layer's step 0: m and its Selection."""
        step = Pass(batch, self.model.rotary(batch.turns), self.cache)
        m_TD, selection = self.model.draft(following_T, hidden_TD, step)
        assert selection is not None
        return m_TD, selection

    def _further(self, batch: Batch, tokens_T: Tensor, m_TD: Tensor, selection: Tensor) -> Tensors:
        """A later step's m. Each is the next of the one before, which the batch is turned for: a graph serves all."""
        step = Pass(batch, self.model.rotary(batch.turns), self.cache)
        return self.model.draft(tokens_T, m_TD, step, depth=1, selection=selection)[:1]


def _record(
    works: Sequence[Work], ids: Sequence[int], selections: Sequence[Tensor | None], routes: Mapping[int, Tensor]
) -> None:  # fmt: skip
    """Adds each recorded request's rows to its trace."""
    begin = 0
    for work in works:
        rows = slice(begin, begin + work.count)
        begin += work.count
        if work.request.trace is not None:
            chosen = [None if selection is None else selection[rows] for selection in selections]
            work.request.trace.append(ids[rows], chosen, {layer: experts[rows] for layer, experts in routes.items()})


def asked_rows(work: Work) -> int:
    """Of how many of its last rows the logits are read."""
    if reads_prompt(work):
        return work.count
    return work.drafts + 1 if work.samples else 0


def reads_prompt(work: Work) -> bool:
    """Whether logprobs of its prompt are wanted and among its rows."""
    return work.request.params.prompt_logprobs is not None and work.request.computed < len(work.request.prompt)


def _handle(work: Work | Request) -> int:
    handle = (work.request if isinstance(work, Work) else work).handle
    assert handle is not None
    return handle
