"""Samples of the long-context tasks for training: short ones whose positions are those of long ones.

What a short sequence cannot show by itself is put there in three ways. Positions are skipped (PoSE, arXiv
2309.10400): a sequence is cut in pieces and each stands a drawn distance behind the one before, so that rotations by
all distances up to a million occur. Facts crowd: ``multikey`` leaves no noise between them, only statements of other
keys. And a share is plain text, so that filler is not trivial. The shortest sequences are pairs and questions alone,
for there the circuit forms that recall needs: know the token before, then match. Its first half is asked for as such,
by targets on the statements; the second comes only when there is something to match (docs/log.md).

Source: training spec 5.2, 5.3.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from nanoglm.errors import InputError
from nanoglm.tasks import ASK, KEYS, MOST, TEXT, VALUES, Task, draw
from nanoglm.train.data import IGNORE, Sample, Tokens

SHORT = 128  # below: pairs and questions alone
SHORTEST = 16  # up to here: no chains
MIX: dict[Task | None, float] = {"recall": 0.6, "multikey": 0.15, "needle": 0.15, None: 0.1}  # None: plain text
PIECES = 8  # of a sequence, at most
REACH = 1 << 20  # the largest distance


def skipped(length: int, rng: np.random.Generator, whole: np.ndarray) -> np.ndarray:
    """Ascending positions of a sequence's rows, int64 [length]: 1 to 8 pieces with gaps, of every order of magnitude,
    that are a million at most together.

    Args:
        whole: rows at which no piece begins, since they are known by the row before.
    """
    begins = np.setdiff1d(np.arange(1, length), whole)
    gaps = min(int(rng.integers(PIECES)), len(begins))
    steps = np.ones(length, np.int64)
    steps[0] = 0
    if gaps:
        drawn = np.exp(rng.uniform(0, np.log((REACH - length) / gaps), gaps))
        steps[rng.choice(begins, gaps, replace=False)] += drawn.astype(np.int64)
    return steps.cumsum()


def pairs(facts: int, questions: int, rng: np.random.Generator) -> np.ndarray:
    """Keys with their values side by side, the bar, and some of them again: int64 [2 (facts + questions) + 1].

    A key may be asked again, so that no answer follows from those that were given to other keys.
    Each sequence takes its words from a drawn number of keys and values, few or many alike often, so that some are as
    frequent as in a language: circuits form on those and serve the rest.
    """
    stated = _stated(facts, rng)
    return np.concatenate([stated.flatten(), [ASK], stated[rng.integers(facts, size=questions)].flatten()])


def chains(facts: int, questions: int, rng: np.random.Generator) -> np.ndarray:
    """As ``pairs``, but half of the keys stand before an earlier key instead, and are asked for its value; each is
    asked once, or the second time its answer could be read off the first."""
    stated = _stated(facts, rng)
    answers, hops = stated.copy(), np.ones(facts, np.int64)
    for i in (rng.random(facts) < 0.5).nonzero()[0]:
        if len(before := (hops[:i] < MOST).nonzero()[0]):
            other = rng.choice(before)
            stated[i, 1], answers[i, 1], hops[i] = stated[other, 0], answers[other, 1], hops[other] + 1
    return np.concatenate([stated.flatten(), [ASK], answers[rng.permutation(facts)[:questions]].flatten()])


def _stated(facts: int, rng: np.random.Generator) -> np.ndarray:
    """Keys, all others, with values: int64 [facts, 2]."""
    words = int(np.exp(rng.uniform(np.log(facts), np.log(len(KEYS)))))
    return np.stack([rng.permutation(words)[:facts] + KEYS.start, rng.integers(words, size=facts) + VALUES.start], 1)


def chained(ids: np.ndarray) -> dict[int, int]:
    """Of ``multihop``: the rows at which a statement names another key, and the value to which that one leads.

    Asked for as such: where each link knows its value as soon as it stands, hops are recall again and again.
    """
    values: dict[int, int] = {}
    links: dict[int, int] = {}
    for row, (key, other) in enumerate(pairwise(ids.tolist()), 1):
        if key not in KEYS or key in values:  # a key that comes again is a question, or another one's statement
            continue
        if other in KEYS:
            links[row] = values[other]
        values[key] = links.get(row, other)
    return links


class Recall:
    """A source of task samples; its state is how many it drew.

    Args:
        text: bytes, for text and for needles' filler.
        skip: positions; False, a control, leaves them as they are.
        hops: share of chains of several hops; the other tasks keep their proportions.
    """

    def __init__(self, text: Tokens, seed: int = 0, skip: bool = True, hops: float = 0.0) -> None:
        self.text, self.seed, self.skip, self.drawn = text, seed, skip, 0
        self.mix = {task: share * (1 - hops) for task, share in MIX.items()} | ({"multihop": hops} if hops else {})

    def take(self, length: int, count: int) -> Sample:
        """The next ``count`` sequences of ``length`` tokens. Raises InputError if that is odd or below 8."""
        if length < 8 or length % 2:
            raise InputError(f"length is {length}; expected an even number, at least 8")
        rng = np.random.default_rng((self.seed, self.drawn))
        self.drawn += 1
        rows = [self._row(length, rng) for _ in range(count)]
        ids, targets, positions = (torch.from_numpy(np.concatenate(part)) for part in zip(*rows, strict=True))
        return Sample(ids, targets, (length,) * count, positions)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]

    def _row(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, targets and positions."""
        task = list(self.mix)[int(rng.choice(len(self.mix), p=list(self.mix.values())))]
        if task is None:
            window = self._window(length + 1, rng)
            return window[:-1], window[1:], self._positions(length, rng, np.empty(0, np.int64))
        if length < SHORT:
            hops = task == "multihop" and length > SHORTEST
            bar = (length + 2) // 4 * 2 if hops else length // 8 * 2  # one question a fact, or three
            ids = (chains if hops else pairs)(bar // 2, (length - bar) // 2, rng)
            targets = np.full(length, IGNORE)
            targets[1:bar] = ids[: bar - 1]  # the token before
            links = chained(ids[:bar])
            targets[list(links)] = list(links.values())
            targets[bar + 1 :: 2] = ids[bar + 2 :: 2]
            return ids[:-1], targets, self._positions(length, rng, np.r_[1:bar:2, bar + 2 : length : 2])
        most = length // (16 if task == "multihop" else 8)
        facts = int(rng.integers(length // 64, most + 1))
        example = draw(task, length, rng, facts=facts, text=self._window(length, rng) if task == "needle" else None)
        whole = example.sources
        if task == "multihop":
            links = chained(example.ids)
            example.targets[list(links)] = list(links.values())
            whole = np.r_[whole, list(links)]
        return example.ids, example.targets, self._positions(length, rng, whole)

    def _positions(self, length: int, rng: np.random.Generator, whole: np.ndarray) -> np.ndarray:
        return skipped(length, rng, whole) if self.skip else np.arange(length)

    def _window(self, length: int, rng: np.random.Generator) -> np.ndarray:
        if len(self.text) < length:
            raise InputError(f"text holds {len(self.text)} tokens; expected at least {length}")
        found = self.text.read(int(rng.integers(len(self.text) - length + 1)), length).astype(np.int64)
        if found.max() >= TEXT:
            raise InputError(f"text holds id {found.max()}; expected bytes, below {TEXT}")
        return found
