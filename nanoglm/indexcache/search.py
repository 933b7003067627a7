"""Search for the indexers that a model can do without.

Every pattern is judged by the loss itself. What was evaluated is remembered by pattern, in memory and in a file: a
method asks for patterns as if nothing were known, so one that was interrupted goes on where it stopped, and methods
that meet share what they found.

    greedy      flips the layer whose flip costs least, again and again; one run gives every retention level (3.2)
    swap        from the greedy pattern, exchanges one F for one S as long as that lowers the loss
    beam        as greedy, with several patterns at a time
    exhaustive  every pattern with so many indexers: the true optimum
    uniform     every r-th layer, by its three definitions
    random      patterns drawn
    similarity  by likeness of attention outputs, overlap by likeness of Selections: dynamic programs over a local
                measure, for comparison; the loss does not choose

Source: indexcache spec 3.2 to 3.5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nanoglm.errors import InputError
from nanoglm.indexcache.calibration import Calibration
from nanoglm.indexcache.evaluate import Evaluator, Score
from nanoglm.indexcache.pattern import UNIFORM, flipped, subsets, uniform, with_full

Method = Literal["greedy", "swap", "beam", "exhaustive", "uniform", "random", "similarity", "overlap"]
METHODS: tuple[Method, ...] = get_args(Method)
BEAM = 3
MOST = 100_000  # patterns that exhaustive takes on


@dataclass(frozen=True)
class Row:
    """A pattern that a method arrived at.

    Attributes:
        loss: mean over the sequences. difference, error: from the model's own pattern, paired by sequence, and its
            standard error. right: share of scored tokens that are the likeliest one, by group of sequences.
    """

    method: str
    pattern: str
    full: int
    loss: float
    difference: float
    error: float
    right: dict[str, float]


class Search:
    """Methods over one model and one calibration set.

    Args:
        file: where scores are kept, JSON lines. known: what it holds already, see :func:`read_scores`.
        data: all sequences, where several processes share them; the evaluator then has this one's.
        gather: of a tensor [S] of this process's sequences, that of all processes'. writes: whether this one does.
        together: patterns evaluated between two writings: a kill loses them, a model on a disk is read once for them.
        progress: called with the number of patterns evaluated.

    Attributes:
        evaluated: how many patterns were run, not remembered.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        file: Path | None = None,
        *,
        known: dict[str, Score] | None = None,
        data: Calibration | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        writes: bool = True,
        together: int = 32,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.evaluator, self.file, self.progress = evaluator, file, progress
        self.gather = gather or (lambda values: values)
        self.own = evaluator.stack.pattern
        self.data = data or evaluator.data
        self.writes, self.together, self.evaluated = writes, together, 0
        self._known = dict(known or {})

    def losses(self, patterns: Iterable[str], committed: str | None = None) -> dict[str, float]:
        """Mean loss under each pattern."""
        wanted = sorted(set(patterns))
        unknown = [pattern for pattern in wanted if pattern not in self._known]
        for begin in range(0, len(unknown), self.together):
            some = unknown[begin : begin + self.together]
            for pattern, score in self.evaluator.scores(some, committed).items():
                self._known[pattern] = Score(*(self.gather(values) for values in score))
                self._write(pattern)
            self.evaluated += len(some)
            self.progress(self.evaluated)
        return {pattern: float(self._known[pattern].loss.mean()) for pattern in wanted}

    def begin(self) -> None:
        """Evaluates the model's own pattern, also if its score is known: it has to be the same.

        Raises:
            InputError: it is not; what is known is of other weights.
        """
        known = self._known.pop(self.own, None)
        if known is None:
            self.losses([self.own])
            return
        score = Score(*(self.gather(values) for values in self.evaluator.scores([self.own])[self.own]))
        self._known[self.own] = known
        if not torch.allclose(score.loss, known.loss, rtol=1e-3, atol=1e-4):
            raise InputError(
                f"file {self.file} says {float(known.loss.mean()):.4f} nats of {self.own}, this model has "
                f"{float(score.loss.mean()):.4f}; expected the model that was searched"
            )

    def row(self, method: str, pattern: str) -> Row:
        """A pattern beside the model's own."""
        self.losses([pattern, self.own])
        score, base = self._known[pattern], self._known[self.own]
        difference, error = paired(score.loss, base.loss)
        right = {
            group: round(float(score.right[[g == group for g in self.data.groups]].mean()), 4)
            for group in dict.fromkeys(self.data.groups)
        }
        return Row(method, pattern, pattern.count("F"), float(score.loss.mean()), difference, error, right)

    def difference(self, one: str, other: str) -> tuple[float, float]:
        """Loss of one less the other's, paired by sequence, and its standard error."""
        self.losses([one, other])
        return paired(self._known[one].loss, self._known[other].loss)

    # ---------------------------------------------------------------------------- methods
    def greedy(self, full: int, blocks: int = 1) -> list[Row]:
        """From the model's own pattern down to ``full`` indexers, a row a flip; ties go to the deeper layer.

        Args:
            blocks: stages of a pipeline, each of which begins with an F: none is without a Selection of its own. In
                each round every block in turn commits its best flip (spec 3.2).

        Raises:
            InputError: ``full`` is more than there are, or less than the blocks need.
        """
        if not 1 <= blocks <= len(self.own):
            raise InputError(f"blocks is {blocks}; expected 1 to {len(self.own)}, the number of layers")
        borders = [round(b * len(self.own) / blocks) for b in range(blocks + 1)]
        fixed = set(borders[:-1]) if blocks > 1 else {0}
        if not len(fixed) <= full <= self.own.count("F") or not all(self.own[layer] == "F" for layer in fixed):
            raise InputError(
                f"{full} indexers are asked for in {blocks} blocks; expected {len(fixed)} to {self.own.count('F')}, "
                f"with an F at the first layer of each block of {self.own}"
            )
        pattern, rows = self.own, [self.row("greedy", self.own)]
        while pattern.count("F") > full:
            before = pattern
            for begin, end in zip(borders, borders[1:], strict=False):
                candidates = [flipped(pattern, i) for i in range(begin, end) if pattern[i] == "F" and i not in fixed]
                if candidates and pattern.count("F") > full:
                    losses = self.losses(candidates, committed=pattern)
                    pattern = min(candidates, key=lambda p: (losses[p], -_parted(p, before)))
                    before = pattern
                    rows.append(self.row("greedy", pattern))
        return rows

    def swap(self, pattern: str) -> Row:
        """Exchanges one F for one S, the best exchange first, until none lowers the loss."""
        while True:
            best = self.losses([pattern])[pattern]
            ones, others = ([i for i, c in enumerate(pattern) if c == letter and i] for letter in "FS")
            found = self.losses([flipped(flipped(pattern, i), j) for i in ones for j in others if self.own[j] == "F"])
            if not found or min(found.values()) >= best:
                return self.row("swap", pattern)
            pattern = min(found, key=lambda p: (found[p], p))

    def beam(self, full: int, width: int = BEAM) -> Row:
        """As greedy, with the ``width`` best patterns of each number of indexers."""
        held = [self.own]
        while held[0].count("F") > full:
            found = self.losses({flipped(p, i) for p in held for i, c in enumerate(p) if c == "F" and i})
            held = sorted(found, key=lambda p: (found[p], p))[:width]
        return self.row("beam", held[0])

    def exhaustive(self, full: int) -> Row:
        """The best of all patterns with ``full`` indexers. Raises InputError if there are too many."""
        if (count := math.comb(self.own.count("F") - 1, full - 1)) > MOST:
            raise InputError(f"exhaustive would evaluate {count:,} patterns; expected at most {MOST:,}")
        found = self.losses(subsets(self.own, full))
        return self.row("exhaustive", min(found, key=lambda p: (found[p], p)))

    def uniform(self, full: int) -> list[Row]:
        """Every definition of uniform at the spacing that gives about ``full`` indexers, where the model has them."""
        every = max(1, round(len(self.own) / full))
        found = {rule: uniform(len(self.own), every, rule) for rule in UNIFORM}
        has = [
            rule
            for rule, p in found.items()
            if all(own == "F" for own, new in zip(self.own, p, strict=True) if new == "F")
        ]
        self.losses([found[rule] for rule in has])
        return [self.row(f"uniform ({rule})", found[rule]) for rule in has]

    def random(self, full: int, count: int = 5, seed: int = 0) -> list[Row]:
        """Patterns drawn, all others."""
        free = [layer for layer, letter in enumerate(self.own) if letter == "F" and layer]
        rng, drawn = np.random.default_rng(seed), dict[str, None]()
        for _ in range(min(count, math.comb(len(free), full - 1))):
            while (pattern := with_full(rng.choice(free, full - 1, replace=False), len(self.own))) in drawn:
                pass
            drawn[pattern] = None
        self.losses(drawn)
        return [self.row("random", pattern) for pattern in drawn]

    def alike(self, method: str, likeness: Tensor, full: int) -> Row:
        """The pattern whose Shared layers are most like their sources, see :func:`best_groups`."""
        return self.row(method, best_groups(likeness, full, self.own))

    # ---------------------------------------------------------------------------- file
    def _write(self, pattern: str) -> None:
        if self.file is not None and self.writes:
            score = self._known[pattern]
            line = {"pattern": pattern, "loss": score.loss.tolist(), "right": score.right.tolist()}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def paired(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean difference by sequence and its standard error."""
    difference = one - other
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return float(difference.mean()), error


def best_groups(likeness: Tensor, full: int, own: str) -> str:
    """Maximises the sum of likeness[layer, its source] over Shared layers, with exactly ``full`` F (spec 3.3).

    Args:
        likeness: [N, N], of layer i (row) with the earlier layer j (column) in the role of its source.
        own: where an F can be.
    """
    n = len(own)
    # best[i][m]: of layers 0 to i - 1 with m F, where the next F is at i; from[i][m]: the F before it.
    best = {(0, 0): 0.0}
    before: dict[tuple[int, int], int] = {}
    for i in [*(i for i in range(1, n) if own[i] == "F"), n]:
        for m in range(1, full + 1):
            for j in range(i):
                if own[j] == "F" and (j, m - 1) in best:
                    value = best[j, m - 1] + float(likeness[j + 1 : i, j].sum())
                    if value > best.get((i, m), -math.inf):
                        best[i, m], before[i, m] = value, j
    if (n, full) not in best:
        raise InputError(f"{full} indexers are asked for; expected 1 to {own.count('F')}, what {own} has")
    letters, at = ["S"] * n, n
    for m in range(full, 0, -1):
        at = before[at, m]
        letters[at] = "F"
    return "".join(letters)


def best_by_count(losses: dict[str, float]) -> dict[int, str]:
    """By number of indexers the pattern of the lowest loss, fewest indexers first."""
    found: dict[int, str] = {}
    for pattern in sorted(losses, key=lambda p: (p.count("F"), losses[p], p)):
        found.setdefault(pattern.count("F"), pattern)
    return found


def cost(method: Method, full: int, own: str, seconds: float) -> tuple[int, float]:
    """About how many patterns a method will evaluate (swap: in two rounds) and how long that lasts at most, if the
    whole model takes ``seconds``; less where weights come from a disk, since all of a step share their reading."""
    n, have = len(own), own.count("F")
    flips = sum(range(full, have))  # candidates of all greedy steps
    patterns = {
        "greedy": flips, "swap": flips + 2 * (full - 1) * (have - full), "beam": BEAM * flips,
        "exhaustive": math.comb(have - 1, full - 1), "uniform": 3, "random": 5, "similarity": 1, "overlap": 1,
    }[method]  # fmt: skip
    share = (n + 1) / 2 / n  # of the layers: those behind the place where candidates part
    if method == "exhaustive":  # a prefix of length d with m F is run once: m - 1 of d - 1 places, the rest behind it
        prefixes = sum(
            math.comb(d - 1, m - 1) for d in range(1, n + 1) for m in range(max(1, full - n + d), min(d, full) + 1)
        )
        share = prefixes / n / patterns if have == n else 1.0
    return patterns, patterns * seconds * (share if method in ("greedy", "swap", "beam", "exhaustive") else 1.0)


def _parted(pattern: str, other: str) -> int:
    """The first layer at which two patterns differ."""
    return next((i for i, (a, b) in enumerate(zip(pattern, other, strict=True)) if a != b), len(pattern))


def read_scores(file: Path, sequences: int | None = None, cut: bool = False) -> dict[str, Score]:
    """What a search kept, by pattern; nothing if there is no such file.

    Args:
        sequences: that it has to be of. cut: take half a line at its end, of a process that was killed, away.

    Raises:
        InputError: something else, or scores of another number of sequences.
    """
    try:
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if cut and whole != text:
            file.write_text(whole, encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"file {file} cannot be read: {error}") from None
    found: dict[str, Score] = {}
    for line in whole.splitlines():
        try:
            raw: dict[str, Any] = json.loads(line)
            score = Score(*(torch.tensor(raw[name], dtype=torch.float64) for name in ("loss", "right")))
            found[raw["pattern"]] = score
        except (ValueError, KeyError, TypeError):
            raise InputError(f"file {file} holds something else; expected lines of nanoglm indexcache search") from None
        if sequences is not None and len(score.loss) != sequences:
            raise InputError(f"file {file} is of {len(score.loss)} sequences; expected {sequences}")
    return found
