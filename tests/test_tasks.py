"""Tasks, each solved by a reader that knows only what a task asks, from the ids alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoglm.errors import InputError
from nanoglm.tasks import ASK, FIRST, KEYS, NONE, TASKS, VALUES, VOCABULARY, Example, Task, answers, draw

TEXT = np.frombuffer(b"It was a dark evening in November, and the lamps had been lit an hour since. ", np.uint8)


def make(task: Task, length: int = 400, facts: int = 6, seed: int = 0, questions: int | None = None) -> Example:
    return draw(task, length, np.random.default_rng(seed), facts=facts, questions=questions, text=TEXT)


# ------------------------------------------------------------------------------- a solver
def followers(haystack: list[int], key: int) -> list[int]:
    """Positions behind each mention of ``key``, in order."""
    return [i + 1 for i, token in enumerate(haystack) if token == key]


def solve(task: Task, haystack: list[int], question: list[int]) -> list[int]:
    """Positions of the tokens that answer."""
    *mark, key = question
    behind = followers(haystack, key)
    if task == "multivalue":
        return behind
    if task == "order":
        return [behind[mark[0] - FIRST]]
    if task == "multihop":
        at = behind[0]
        while haystack[at] in KEYS:  # a key that stands for what another one stands for; its first mention says what
            at = followers(haystack, haystack[at])[0]
        return [at]
    assert len(behind) == 1, "a key is stated once"
    return list(range(behind[0], behind[0] + (8 if task == "copy" else 1)))


def read(task: Task, example: Example) -> tuple[list[int], list[int]]:
    """Targets and sources, row by row, as the solver finds them."""
    ids = example.ids.tolist()
    bar = len(ids) - 1 - ids[::-1].index(ASK)
    haystack, rest = ids[:bar], ids[bar + 1 :]
    targets, sources, at = [NONE] * len(ids), [-1] * len(ids), 0
    while at < len(rest):
        width = 2 if task == "order" else 1
        places = solve(task, haystack, rest[at : at + width])
        for i, place in enumerate(places):
            row = bar + at + width + i
            targets[row], sources[row] = haystack[place], place
        at += width + len(places)
    return targets, sources


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), facts=st.integers(1, 12), asked=st.integers(1, 12), spare=st.integers(0, 300))
def test_a_solver_finds_every_answer(task: Task, seed: int, facts: int, asked: int, spare: int) -> None:
    length = facts * 20 + spare
    example = make(task, length, facts, seed, min(asked, facts))
    targets, sources = read(task, example)
    assert example.targets.tolist() == targets
    assert example.sources.tolist() == sources
    assert len(example.ids) == length and example.ids.dtype == np.int64
    assert example.ids.min() >= 0 and example.ids.max() < VOCABULARY
    assert len(answers(example)) == min(asked, facts)


@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_behind_their_questions(task: Task) -> None:
    """As if given before; the last one's end is a target only. Each question asks for another key."""
    example = make(task)
    asked = []
    for rows in answers(example):
        assert example.ids[rows[0]] in KEYS
        asked.append(int(example.ids[rows[0]]))
        for row in rows:
            assert row + 1 == len(example.ids) or example.ids[row + 1] == example.targets[row]
            assert example.targets[row] == example.ids[example.sources[row]]
    assert len(set(asked)) == 6
    assert answers(example)[-1][-1] == len(example.ids) - 1


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_one_example(task: Task) -> None:
    a, b, c = make(task, seed=3), make(task, seed=3), make(task, seed=4)
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.sources, b.sources)
    assert not np.array_equal(a.ids, c.ids)


# ------------------------------------------------------------------------------- what lies around
def haystack(example: Example) -> list[int]:
    ids = example.ids.tolist()
    return ids[: ids.index(ASK)]


def test_a_needle_lies_in_text() -> None:
    text = bytes(i for i in haystack(make("needle")) if i < 256)
    assert len(text) == len(haystack(make("needle"))) - 2 * 6
    assert text in TEXT.tobytes() * 20  # in its order, begun anew where it ends


@pytest.mark.parametrize("task", ["recall", "multivalue", "multihop", "order", "copy"])
def test_noise_is_of_values(task: Task) -> None:
    """Nothing but the key before it tells an answer from filler."""
    example = make(task, 4000)
    assert set(haystack(example)) <= {*KEYS, *VALUES}
    assert sum(i in KEYS for i in haystack(example)) < 60


def test_multikey_is_full_of_other_facts() -> None:
    ids = haystack(make("multikey", 4000))
    assert abs(sum(i in KEYS for i in ids) - len(ids) / 2) <= 1
    pairs = [(a, b) for a, b in zip(ids, ids[1:], strict=False) if a in KEYS]
    assert all(b in VALUES for _, b in pairs)


def test_facts_lie_anywhere() -> None:
    """Every tenth of the haystack gets its share."""
    places = np.concatenate([make("recall", 1000, 10, seed).sources for seed in range(200)])
    shares = np.histogram(places[places >= 0], 10, (0, 980))[0] / 2000
    assert (abs(shares - 0.1) < 0.03).all()


def test_hops_mentions_and_values_come_in_all_numbers() -> None:
    counts: dict[str, set[int]] = {"multivalue": set(), "multihop": set(), "order": set()}
    for task, found in counts.items():
        for seed in range(40):
            example = make(task, 100, 1, seed)  # type: ignore[arg-type]
            found.add(sum(i in KEYS for i in haystack(example)))
    assert counts == {"multivalue": {1, 2, 3, 4}, "multihop": {3, 5, 7}, "order": {2, 3, 4}}


# ------------------------------------------------------------------------------- errors
MISTAKES: dict[str, tuple[Callable[[], Example], str]] = {
    "name": (lambda: make("recal"), "task is 'recal'; expected one of recall, needle"),  # type: ignore[arg-type]
    "no text": (lambda: draw("needle", 99, np.random.default_rng()), "text is missing"),
    "other ids": (lambda: draw("needle", 99, np.random.default_rng(), text=np.array([292])), "ids above 291"),
    "no question": (lambda: make("recall", questions=0), r"questions is 0; expected 1 to the number of facts \(6\)"),
    "too many": (lambda: make("recall", questions=7), "questions is 7; expected 1 to"),
    "no room": (lambda: make("recall", 23, 6), "length is 23; expected at least 24 for 6 facts"),
    "no keys": (lambda: make("recall", 9999, 865), "facts is 865; expected fewer, there are 864 keys"),
    "none left": (lambda: make("multikey", 9999, 864), "facts is 864; expected fewer, there are 864 keys"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    mistake, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        mistake()


def test_as_short_as_it_can_be() -> None:
    assert len(answers(make("recall", 24, 6))) == 6


def test_chains_of_one_length() -> None:
    for hops in (2, 3, 4):
        example = draw("multihop", 256, np.random.default_rng(0), facts=8, hops=hops)
        haystack = example.ids[: int((example.ids == ASK).nonzero()[0][-1])]
        assert sum(int(i) in KEYS for i in haystack) == 8 * (2 * hops - 1)
    with pytest.raises(InputError, match="hops is 5; expected 2 to 4"):
        draw("multihop", 256, np.random.default_rng(0), facts=8, hops=5)
