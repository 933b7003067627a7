"""The fixed sequences on which patterns are compared: every one sees the same tokens.

Source: indexcache spec 3.2, 8.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from nanoglm.errors import InputError
from nanoglm.tasks import TASKS, Task, draw
from nanoglm.train.data import Sample

HOPS = ("2hop", "3hop", "4hop")


@dataclass(frozen=True)
class Calibration:
    """Sequences of one length with what is scored in them.

    Attributes:
        sample: the sequences; targets are -100 where nothing is scored.
        groups: of each sequence what it is a sample of (a task), for scores by group.
    """

    sample: Sample
    groups: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names the sequences: two runs compare the same tokens if it is the same."""
        both = torch.stack([self.sample.ids, self.sample.targets]).cpu().numpy()
        return hashlib.sha256(both.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.groups)

    def part(self, begin: int, end: int) -> Calibration:
        """Sequences ``begin`` to ``end`` - 1."""
        return Calibration(self.sample.part(begin, end), self.groups[begin:end])


def of_text(ids: np.ndarray, length: int, sequences: int, skip: int = 0) -> Calibration:
    """Windows of a text, evenly spread, in which every token but the first is scored.

    Args:
        skip: of the windows drawn with the same numbers, which: 0 and 1 are disjoint (search on one, report on the
            other).

    Raises:
        InputError: the text is too short for that.
    """
    step = len(ids) // (2 * sequences)
    if step < length + 1:
        raise InputError(
            f"text holds {len(ids)} tokens; expected at least {2 * sequences * (length + 1)} for two disjoint sets of "
            f"{sequences} sequences of {length}"
        )
    begins = np.arange(sequences) * 2 * step + skip * step
    windows = torch.from_numpy(np.stack([ids[b : b + length + 1] for b in begins]).astype(np.int64))
    return Calibration(Sample.of(windows), ("text",) * sequences)


def of_tasks(
    tasks: Sequence[str], length: int, sequences: int, seed: int = 0, text: np.ndarray | None = None
) -> Calibration:  # fmt: skip
    """Sequences of the tasks in turn, in which the answers are scored; another seed, other sequences.

    Args:
        tasks: names of tasks; 2hop, 3hop and 4hop are multihop with chains of one length. A 16th of the tokens or, of
            chains, a 32nd is facts.
        text: byte ids, filler of ``needle``.

    Raises:
        InputError: no such task, and what ``tasks.draw`` refuses.
    """
    ids, targets, groups = [], [], []
    for number in range(sequences):
        task, rng = tasks[number % len(tasks)], np.random.default_rng((seed, length, number))
        hops = int(task[0]) if task in HOPS else None
        name = cast(Task, "multihop" if hops else task)
        if name not in TASKS:
            raise InputError(f"task is {task!r}; expected one of {', '.join((*TASKS, *HOPS))}")
        facts = max(1, length // (32 if name == "multihop" else 16))
        example = draw(name, length, rng, facts=facts, text=text if name == "needle" else None, hops=hops)
        ids.append(example.ids)
        targets.append(example.targets)
        groups.append(task)
    tokens, scored = (torch.from_numpy(np.concatenate(part)) for part in (ids, targets))
    return Calibration(Sample(tokens, scored, tuple(len(each) for each in ids)), tuple(groups))
