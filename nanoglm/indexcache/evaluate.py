"""The loss under many schedules at once.

Schedules that begin alike do the same work up to where they part, so they are run as a tree of prefixes: breadth first,
one layer after the other, and while a layer's weights are in memory everything that needs it passes through. A model
that lies on a disk is then read once for all candidates together; a candidate that flips layer l of a committed
pattern costs the layers from l on.

Shape legend: T tokens, D width, K selected, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.errors import InputError
from nanoglm.indexcache.calibration import Calibration
from nanoglm.indexcache.stack import Stack, run
from nanoglm.train.data import IGNORE, Sample

HEAD_ROWS = 1024  # whose logits are held at once
BATCH_TOKENS = 8192  # of one pass through a layer


class Score(NamedTuple):
    """What one schedule gave, by sequence, fp64 [S]."""

    loss: Tensor  # nats a scored token
    right: Tensor  # share of the scored tokens that were the likeliest one


class _State(NamedTuple):
    x_TD: Tensor
    selection: Tensor | None


class Evaluator:
    """Runs schedules over a calibration set.

    Args:
        budget: bytes that states between two layers may take, those that are kept included.
        batch_tokens: of one pass through a layer.
        restart: whether states of a committed pattern are kept (see :meth:`scores`), if half of the budget holds them.

    Attributes:
        layer_tokens: tokens that passed through a layer so far, the unit of what a search costs.
    """

    def __init__(
        self,
        stack: Stack,
        data: Calibration,
        *,
        budget: int = 1 << 30,
        batch_tokens: int = BATCH_TOKENS,
        restart: bool = True,
    ) -> None:
        self.stack, self.data, self.budget = stack, data, budget
        self.batches, self.layer_tokens = data.sample.split(batch_tokens), 0
        whole = len(stack.pattern) * len(data.sample.ids) * stack.width
        self.restart = restart and whole <= budget // 2
        least = 2 * max(len(part.ids) for part in self.batches) * stack.width
        if least > budget:
            raise InputError(f"memory is {budget:,} bytes; expected at least {least:,} for the states of one batch")
        self._kept: dict[str, list[_State]] = {}  # of prefixes of the committed pattern, by batch

    @torch.no_grad()
    def scores(self, patterns: Iterable[str], committed: str | None = None) -> dict[str, Score]:
        """The scores under each pattern.

        Args:
            committed: a pattern from which these and later ones part late: states of its prefixes are kept if these
                patterns need them.

        Raises:
            InputError: a pattern of another length, that begins with S, or with F where there is no indexer; a sequence
                in which nothing is scored.
        """
        wanted = sorted(set(patterns))
        for pattern in wanted:
            check(pattern, self.stack.pattern)
        committed = committed if self.restart else None
        self._kept = {p: s for p, s in self._kept.items() if committed is not None and committed.startswith(p)}
        largest = max(len(part.ids) for part in self.batches)
        most = max(1, self._room() // (2 * largest * self.stack.width))  # a tree is nowhere wider than it has leaves
        found: dict[str, Score] = {}
        for begin in range(0, len(wanted), most):  # in order, neighbours share most
            found |= self._tree(wanted[begin : begin + most], committed)
        return found

    def _room(self) -> int:
        return self.budget // 2 if self.restart else self.budget

    def _tree(self, patterns: Sequence[str], committed: str | None) -> dict[str, Score]:
        """All batches, as many at once as there is room for."""
        known = {p: max((k for k in self._kept if p.startswith(k)), key=len, default="") for p in patterns}
        depths = range(1, len(self.stack.pattern) + 1)
        levels = [sorted({p[:depth] for p in patterns if len(known[p]) < depth}) for depth in depths]
        token = 2 * max(len(level) for level in levels) * self.stack.width
        fresh: dict[str, list[_State]] = {}
        parts: dict[str, list[Score]] = {pattern: [] for pattern in patterns}
        begin = 0
        while begin < len(self.batches):
            end, held = begin + 1, token * len(self.batches[begin].ids)
            while end < len(self.batches) and (held := held + token * len(self.batches[end].ids)) <= self._room():
                end += 1
            roots = {k: self._kept[k][begin:end] for k in {*known.values()} if k}
            for prefix, states in self._grow(levels, roots, self.batches[begin:end]):
                if prefix in parts:
                    parts[prefix] += [
                        judge(self.stack, b, s.x_TD) for b, s in zip(self.batches[begin:end], states, strict=True)
                    ]
                elif committed is not None and committed.startswith(prefix):
                    fresh.setdefault(prefix, []).extend(states)
            begin = end
        self._kept |= fresh
        return {p: Score(*(torch.cat(values) for values in zip(*scores, strict=True))) for p, scores in parts.items()}

    def _grow(
        self, levels: Sequence[Sequence[str]], roots: dict[str, list[_State]], batches: Sequence[Sample]
    ) -> Iterator[tuple[str, list[_State]]]:
        """Every prefix with its states, layer by layer; none is held longer than the next layer needs it."""
        begun = [self.stack.begin(part.ids, part.batch) for part in batches]
        steps, states = [step for _, step in begun], {"": [_State(x_TD, None) for x_TD, _ in begun]}
        del begun  # or the embeddings would stay to the end
        for depth, level in enumerate(levels):
            states = {p: s for p, s in states.items() if len(p) == depth}
            states |= {p: s for p, s in roots.items() if len(p) == depth}
            layer = self.stack.layer(depth) if level else None
            for prefix in level:
                assert layer is not None
                made: list[_State] = []
                for step, state in zip(steps, states[prefix[:-1]], strict=True):
                    made.append(_State(*run(layer, state.x_TD, step, state.selection if prefix[-1] == "S" else None)))
                    self.layer_tokens += len(state.x_TD)
                states[prefix] = made
                yield prefix, made


def judge(stack: Stack, part: Sample, x_TD: Tensor) -> Score:
    """Each sequence from the states behind the last layer. Raises InputError if nothing in one is scored."""
    rows = (part.targets != IGNORE).nonzero()[:, 0]
    owners = part.batch.requests[rows]
    counts = torch.bincount(owners, minlength=len(part.counts))
    if not counts.all():
        raise InputError("calibration has a sequence in which nothing is scored; expected a target in each")
    losses, hits = [], []
    for some in rows.split(HEAD_ROWS):
        logits, targets = stack.logits(x_TD[some]).float(), part.targets[some]
        losses.append(F.cross_entropy(logits, targets, reduction="none").double())
        hits.append((logits.argmax(-1) == targets).double())
    zero = torch.zeros(len(counts), dtype=torch.float64, device=rows.device)
    return Score(*((zero.index_add(0, owners, torch.cat(values)) / counts).cpu() for values in (losses, hits)))


def check(pattern: str, own: str) -> None:
    """Raises InputError unless a model whose pattern is ``own`` can run as ``pattern``."""
    lacks = [i for i, (new, old) in enumerate(zip(pattern, own, strict=False)) if new == "F" and old != "F"]
    if len(pattern) != len(own) or not pattern.startswith("F") or set(pattern) - set("FS") or lacks:
        raise InputError(
            f"pattern is {pattern!r}; expected {len(own)} letters F and S, the first one F, and F only where the "
            f"model's own {own} has it"
        )
