"""Tasks of long context, made as they are asked for: facts stated somewhere in filler, questions about them at the end.

    filler  statement  filler  statement  filler ... | question answer question answer ...

    task        states                            asks                  amid
    recall      k v                               k -> v                noise
    needle      k v                               k -> v                a text
    multikey    k v                               k -> v                statements of keys never asked for
    multivalue  k v1, later k v2 (up to four)     k -> v1 v2 ...        noise
    multihop    k1 v, later k2 k1 (two to four)   kn -> v               noise
    order       k v1, later k v2 (two to four)    n-th k -> vn          noise
    copy        k v1 v2 ... v8                    k -> v1 v2 ... v8     noise

Vocabulary 2,048: text is bytes with the byte tokenizer's markup (0 to 319, of which the marks take reserved ids), then
keys, then values. Noise is made of values, so nothing but its key tells an answer from filler. Answers stand behind
their questions, as if they had been given; each asks for another key, so none helps another.

Source: training spec 5.3; multi-query associative recall after zoology, the others after RULER and MRCR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np

from nanoglm.errors import InputError

Task = Literal["recall", "needle", "multikey", "multivalue", "multihop", "order", "copy"]
TASKS: tuple[Task, ...] = get_args(Task)

VOCABULARY = 2048
TEXT = 292  # ids below are the byte tokenizer's
ASK, FIRST = 292, 293  # the bar before the questions; first, second, third, fourth
KEYS, VALUES = range(320, 1184), range(1184, VOCABULARY)
MOST = 4  # values or hops of a fact
SPAN = 8  # values of a ``copy``
NONE = -100  # where nothing is answered


@dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
        ids: int64 [length].
        targets: int64 [length], the token that follows where that is part of an answer, else -100.
        sources: int64 [length], the position at which that token is stated, else -1.
    """

    ids: np.ndarray
    targets: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True)
class _Fact:
    """What is stated (in this order, with other things between) and asked; token i of the answer is at ``places[i]``,
    (statement, token of it)."""

    statements: list[list[int]]
    question: list[int]
    places: list[tuple[int, int]]


def draw(
    task: Task,
    length: int,
    rng: np.random.Generator,
    *,
    facts: int = 64,
    questions: int | None = None,
    text: np.ndarray | None = None,
    hops: int | None = None,
) -> Example:
    """An example of exactly ``length`` tokens; its last target is the end of the last answer.

    Args:
        rng: what it is drawn from; the same state gives the same example.
        facts: that may be asked about. questions: about how many it is asked; all if left out.
        text: ids below 292, of which ``needle`` takes a piece as filler.
        hops: of ``multihop``, in every chain; 2 to 4 are drawn if left out.

    Raises:
        InputError: a task of no such name, no text where one is needed, or more facts than there are keys or room.
    """
    if task not in TASKS:
        raise InputError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    questions = facts if questions is None else questions
    if not 1 <= questions <= facts:
        raise InputError(f"questions is {questions}; expected 1 to the number of facts ({facts})")
    if hops is not None and not 2 <= hops <= MOST:
        raise InputError(f"hops is {hops}; expected 2 to {MOST}")
    if task == "needle" and (text is None or not len(text) or text.max() >= TEXT):
        raise InputError(f"text is missing or holds ids above {TEXT - 1}; expected bytes, which needle hides facts in")
    fresh = iter((KEYS.start + rng.permutation(len(KEYS))).tolist())
    try:
        made = partial(_multihop, hops=hops) if task == "multihop" else _FACTS[task]
        found = [made(rng, fresh) for _ in range(facts)]
        others = [next(fresh), *fresh]
    except (StopIteration, RuntimeError):
        raise InputError(f"facts is {facts}; expected fewer, there are {len(KEYS)} keys") from None
    asked = rng.permutation(facts)[:questions].tolist()
    free = length - sum(len(found[i].question) + len(found[i].places) for i in asked)
    free -= sum(len(statement) for fact in found for statement in fact.statements)
    if free < 0:
        raise InputError(f"length is {length}; expected at least {length - free} for {facts} facts")
    if task == "multikey":
        pairs = np.stack([rng.choice(others, free // 2), _values(rng, free // 2)], 1)
        found, free = found + [_Fact([pair], [], []) for pair in pairs.tolist()], free % 2
    filler = _values(rng, free) if text is None or task != "needle" else _piece(text, free, rng)
    haystack, begins = _hide(found, filler, rng)
    return _ask(haystack, [(found[i], begins[i]) for i in asked])


def answers(example: Example) -> list[range]:
    """The rows of each answer's targets, question by question."""
    rows = (example.targets != NONE).nonzero()[0]
    return [range(part[0], part[-1] + 1) for part in np.split(rows, (np.diff(rows) > 1).nonzero()[0] + 1)]


# ------------------------------------------------------------------------------- facts
def _values(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(VALUES.start, VALUES.stop, count).tolist()  # a range as choices would be copied each time


def _pair(rng: np.random.Generator, fresh: Iterator[int]) -> _Fact:
    key = next(fresh)
    return _Fact([[key, *_values(rng, 1)]], [key], [(0, 1)])


def _multivalue(rng: np.random.Generator, fresh: Iterator[int]) -> _Fact:
    key, count = next(fresh), int(rng.integers(1, MOST + 1))
    return _Fact([[key, value] for value in _values(rng, count)], [key], [(i, 1) for i in range(count)])


def _multihop(rng: np.random.Generator, fresh: Iterator[int], hops: int | None = None) -> _Fact:
    chain = [*_values(rng, 1), *(next(fresh) for _ in range(hops or int(rng.integers(2, MOST + 1))))]
    return _Fact([[chain[i + 1], chain[i]] for i in range(len(chain) - 1)], [chain[-1]], [(0, 1)])


def _order(rng: np.random.Generator, fresh: Iterator[int]) -> _Fact:
    key, count = next(fresh), int(rng.integers(2, MOST + 1))
    asked = int(rng.integers(count))
    return _Fact([[key, value] for value in _values(rng, count)], [FIRST + asked, key], [(asked, 1)])


def _copy(rng: np.random.Generator, fresh: Iterator[int]) -> _Fact:
    key = next(fresh)
    return _Fact([[key, *_values(rng, SPAN)]], [key], [(0, 1 + i) for i in range(SPAN)])


_FACTS: dict[Task, Callable[[np.random.Generator, Iterator[int]], _Fact]] = {
    "recall": _pair, "needle": _pair, "multikey": _pair, "multivalue": _multivalue, "multihop": _multihop,
    "order": _order, "copy": _copy,
}  # fmt: skip


# ------------------------------------------------------------------------------- sequence
def _piece(text: np.ndarray, length: int, rng: np.random.Generator) -> list[int]:
    """So much of the text from a drawn place on; a shorter text begins again."""
    begin = int(rng.integers(max(1, len(text) - length + 1)))
    return np.resize(text[begin : begin + length], length).tolist()


def _hide(facts: list[_Fact], filler: list[int], rng: np.random.Generator) -> tuple[list[int], list[list[int]]]:
    """All statements anywhere in the filler, those of a fact in order; and where each begins, by fact."""
    owners = rng.permutation(np.repeat(np.arange(len(facts)), [len(fact.statements) for fact in facts])).tolist()
    begins: list[list[int]] = [[] for _ in facts]
    haystack, used = list[int](), 0
    for gap, owner in zip(np.sort(rng.integers(0, len(filler) + 1, len(owners))).tolist(), owners, strict=True):
        haystack += filler[used:gap]
        used = gap
        statement = facts[owner].statements[len(begins[owner])]
        begins[owner].append(len(haystack))
        haystack += statement
    return haystack + filler[used:], begins


def _ask(haystack: list[int], asked: list[tuple[_Fact, list[int]]]) -> Example:
    """The haystack, the bar and the questions with their answers, less the last token, which is a target only."""
    ids, sources = [*haystack, ASK], [-1] * (len(haystack) + 1)
    for fact, begins in asked:
        where = [begins[statement] + token for statement, token in fact.places]
        ids += fact.question + [ids[at] for at in where]
        sources += [-1] * len(fact.question) + where
    following, whole = np.array(sources[1:], np.int64), np.array(ids, np.int64)
    return Example(whole[:-1], np.where(following >= 0, whole[1:], NONE), following)
