"""Methods of search, on losses that are made up and on a model."""

import json
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_models import sequences, small

from nanoglm.errors import InputError
from nanoglm.indexcache.evaluate import Evaluator, Score
from nanoglm.indexcache.pattern import count_of, flipped, sources, subsets, uniform
from nanoglm.indexcache.search import Search, best_groups, cost, paired, read_scores
from nanoglm.indexcache.stack import GLMStack


class Made:
    """An evaluator whose losses a function of the pattern makes up; counts what it is asked."""

    def __init__(self, own: str, loss: Callable[[str], float], sequences: int = 4) -> None:
        self.own, self.loss, self.asked, self.n = own, loss, list[str](), sequences
        self.stack = type("Stack", (), {"pattern": own})()
        self.data = type("Data", (), {"groups": ("a", "b") * (sequences // 2)})()

    def scores(self, patterns: Iterable[str], committed: str | None = None) -> dict[str, Score]:
        found = {}
        for pattern in patterns:
            self.asked.append(pattern)
            noise = torch.arange(self.n, dtype=torch.float64) * 0.01
            found[pattern] = Score(noise + self.loss(pattern), torch.ones(self.n, dtype=torch.float64))
        return found


def additive(weights: list[float]) -> Callable[[str], float]:
    """Every Shared layer costs its own; greedy is exact there."""
    return lambda pattern: sum(w for w, letter in zip(weights, pattern, strict=True) if letter == "S")


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=8), st.data())
@settings(max_examples=50, deadline=None)
def test_where_costs_add_up_greedy_beam_and_exhaustive_agree(weights: list[int], data: st.DataObject) -> None:
    n = len(weights)
    full = data.draw(st.integers(1, n))
    made = Made("F" * n, additive([float(w) for w in weights]))
    search = Search(made)  # type: ignore[arg-type]
    best = search.exhaustive(full).loss
    assert (
        search.greedy(full)[-1].loss
        == search.beam(full).loss
        == search.swap("F" * full + "S" * (n - full)).loss
        == best
    )
    rows = search.greedy(1)
    assert [row.full for row in rows] == list(range(n, 0, -1))
    for a, b in zip(rows, rows[1:], strict=False):  # nested: one run gives every level
        assert {i for i, c in enumerate(b.pattern) if c == "F"} < {i for i, c in enumerate(a.pattern) if c == "F"}
    assert all(row.difference == pytest.approx(row.loss - rows[0].loss) for row in rows)


def test_greedy_commits_the_best_flip_of_the_pattern_it_has() -> None:
    """A pair that is dear together and cheap apart: greedy takes the cheaper first and must not look it up alone."""
    table = {"FSF": 0.1, "FFS": 0.2, "FSS": 5.0, "FFF": 0.0}
    rows = Search(Made("FFF", table.__getitem__)).greedy(1)  # type: ignore[arg-type]
    assert [row.pattern for row in rows] == ["FFF", "FSF", "FSS"]


def test_swap_and_beam_mend_what_greedy_missed() -> None:
    """The cheapest first flip leads away from the best pair."""

    def loss(pattern: str) -> float:
        return {"FFFF": 0.0, "FSFF": 0.1, "FFSF": 0.2, "FFFS": 0.3, "FSSF": 3.0, "FSFS": 2.0, "FFSS": 0.5}.get(
            pattern, 9
        )

    search = Search(Made("FFFF", loss))  # type: ignore[arg-type]
    greedy = search.greedy(2)[-1].pattern
    assert (
        greedy == "FSFS"
        and search.swap(greedy).pattern == search.beam(2).pattern == search.exhaustive(2).pattern == "FFSS"
    )


def test_pipeline_blocks_begin_with_an_f() -> None:
    made = Made("F" * 12, additive([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]))
    rows = Search(made).greedy(3, blocks=3)  # type: ignore[arg-type]
    assert rows[-1].pattern == "FSSSFSSSFSSS"
    assert all(row.pattern[i] == "F" for row in rows for i in (0, 4, 8))
    assert [row.pattern for row in rows[1:4]] == ["FSFFFFFFFFFF", "FSFFFSFFFFFF", "FSFFFSFFFSFF"]  # each block in turn
    with pytest.raises(InputError, match="3 blocks"):
        Search(made).greedy(2, blocks=3)  # type: ignore[arg-type]


def test_a_killed_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file, weights = tmp_path / "evaluations.jsonl", [0.0, 5.0, 1.0, 4.0, 2.0, 3.0]
    whole = Made("F" * 6, additive(weights))
    expected = Search(whole, tmp_path / "whole.jsonl", together=1).greedy(2)  # type: ignore[arg-type]

    def dies(pattern: str) -> float:
        if pattern == "FFSFSS":
            raise KeyboardInterrupt
        return additive(weights)(pattern)

    first = Made("F" * 6, dies)
    with pytest.raises(KeyboardInterrupt):
        Search(first, file, together=1).greedy(2)  # type: ignore[arg-type]
    with file.open("a") as out:
        out.write('{"pattern": "FSSSSF", "lo')  # half a line
    second = Made("F" * 6, additive(weights))
    assert read_scores(file, 4).keys() < read_scores(tmp_path / "whole.jsonl", 4).keys()
    known = read_scores(file, 4, cut=True)
    assert Search(second, file, known=known).greedy(2) == expected  # type: ignore[arg-type]
    lines = [json.loads(line)["pattern"] for line in file.read_text().splitlines()]
    assert len(lines) == len(set(lines)) and set(second.asked).isdisjoint(lines[: len(lines) - len(second.asked)])
    assert 0 < len(second.asked) < len(whole.asked)
    with pytest.raises(InputError, match="of 4 sequences; expected 6"):
        read_scores(file, 6)
    file.write_text("x\n")
    with pytest.raises(InputError, match="something else"):
        read_scores(file)
    assert read_scores(tmp_path / "none.jsonl") == {}


def test_differences_are_paired_by_sequence() -> None:
    hard = torch.tensor([1.0, 5.0, 9.0, 2.0], dtype=torch.float64)
    mean, error = paired(hard + torch.tensor([0.1, 0.1, 0.3, 0.1]), hard)
    assert mean == pytest.approx(0.15) and error == pytest.approx(0.05, rel=1e-3)


@given(st.integers(2, 7), st.data())
@settings(max_examples=60, deadline=None)
def test_the_dynamic_program_finds_the_best_groups(n: int, data: st.DataObject) -> None:
    seed, full = data.draw(st.integers(0, 10_000)), data.draw(st.integers(1, n))
    likeness = torch.from_numpy(np.random.default_rng(seed).random((n, n)))

    def value(pattern: str) -> float:
        return sum(float(likeness[i, j]) for i, j in enumerate(sources(pattern)) if i != j)

    found = best_groups(likeness, full, "F" * n)
    assert found.count("F") == full and found[0] == "F"
    assert value(found) == pytest.approx(max(value(p) for p in subsets("F" * n, full)))


def test_uniform_has_three_definitions() -> None:
    assert uniform(12, 4, "paper") == "FSSSFSSSFSSS"
    assert uniform(12, 4, "patch") == "FFSSSFSSSFSS"
    assert uniform(12, 4, "glm") == "FFFSSSFSSSFS"
    with pytest.raises(InputError, match="rule"):
        uniform(12, 4, "other")
    rows = Search(Made("F" * 12, lambda p: p.count("S"))).uniform(3)  # type: ignore[arg-type]
    assert [row.method for row in rows] == ["uniform (paper)", "uniform (patch)", "uniform (glm)"]
    assert [row.full for row in rows] == [3, 4, 5]


def test_patterns() -> None:
    assert sources("FSSFS") == [0, 0, 0, 3, 3] and flipped("FSF", 1) == "FFF"
    assert len(subsets("F" * 12, 3)) == 55 and len(subsets("F" * 12, 6)) == 462
    assert all(p[0] == "F" for p in subsets("F" * 12, 3)) and subsets("FSFF", 2) == ["FSFS", "FSSF"]
    assert [count_of(keep, 12) for keep in ("1/4", "1/6", "1/8", "3", "12", "0.5", "1/1", "1")] == [
        3,
        2,
        2,
        3,
        12,
        6,
        12,
        1,
    ]
    for wrong in ("0", "13", "x", "1/0", "-1/4", "2.5"):
        with pytest.raises(InputError, match="keep is"):
            count_of(wrong, 12)
    with pytest.raises(InputError, match="expected 1 to 3"):
        subsets("FSFF", 4)


def test_what_is_known_has_to_be_of_these_weights() -> None:
    one, other = (Made("FFF", lambda p, more=more: p.count("S") + more) for more in (0.0, 0.5))
    known = {"FFF": one.scores(["FFF"])["FFF"]}
    one.asked.clear()
    Search(one, known=known).begin()  # type: ignore[arg-type]
    assert one.asked == ["FFF"]  # looked at again
    with pytest.raises(InputError, match="expected the model that was searched"):
        Search(other, known=known).begin()  # type: ignore[arg-type]


def test_random_patterns_are_drawn_from_models_of_any_depth() -> None:
    rows = Search(Made("F" * 78, lambda p: 0.0)).random(20)  # type: ignore[arg-type]
    assert len({row.pattern for row in rows}) == 5 and all(row.full == 20 and row.pattern[0] == "F" for row in rows)
    assert {row.pattern for row in Search(Made("FSF", lambda p: 0.0)).random(2)} == {"FSF"}  # type: ignore[arg-type]
    with pytest.raises(InputError, match="exhaustive would evaluate"):
        Search(Made("F" * 78, lambda p: 0.0)).exhaustive(20)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [0, -1, 13])
def test_blocks_that_are_none(blocks: int) -> None:
    with pytest.raises(InputError, match=f"blocks is {blocks}; expected 1 to 12"):
        Search(Made("F" * 12, lambda p: 0.0)).greedy(3, blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["greedy", "exhaustive", "beam", "swap"])
def test_the_cost_told_is_an_upper_bound(method: str) -> None:
    made = Made("F" * 8, additive([0.0, 3, 1, 4, 1, 5, 9, 2]))
    search = Search(made)  # type: ignore[arg-type]
    search.losses([search.own])
    told, _ = cost(method, 3, search.own, 1.0)  # type: ignore[arg-type]
    search.swap(search.greedy(3)[-1].pattern) if method == "swap" else getattr(search, method)(3)
    run = len(made.asked) - 1
    assert 0 < run <= told
    assert run == told or method in ("beam", "swap")


def test_search_on_a_model_equals_looking_up_every_pattern() -> None:
    model = small(6)
    evaluator = Evaluator(GLMStack(model), sequences(model))
    search = Search(evaluator)
    found = {p: float(s.loss.mean()) for p, s in evaluator.scores(subsets("F" * 6, 3)).items()}
    assert search.exhaustive(3).pattern == min(found, key=lambda p: (found[p], p))
    rows = search.greedy(3)
    before = rows[0].pattern
    for row in rows[1:]:
        flips = [flipped(before, i) for i, c in enumerate(before) if c == "F" and i]
        losses = {
            p: float(s.loss.mean()) for p, s in Evaluator(GLMStack(model), sequences(model)).scores(flips).items()
        }
        assert row.loss == min(losses.values())
        before = row.pattern
    assert len(list(combinations(range(5), 2))) == len(found)
