"""Captured passes without a GPU: what captures is replaced by what calls again, on the same tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanoglm import ops
from nanoglm.api import load
from nanoglm.cache import PAGE
from nanoglm.config import GLMConfig
from nanoglm.engine import Engine, Request, SamplingParams
from nanoglm.engine.graphs import MOST_GRAPHS, MOST_OF_ONE, MOST_ROWS, OFTEN, Graphs, Tensors
from nanoglm.model import GLM
from nanoglm.ops import Batch

SELECT = ops.select


def again(call: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """Captures a call as a GPU's graph does: repeated, it reads and writes the same memory."""
    results = call()

    def replay() -> None:
        for result, now in zip(results, call(), strict=True):
            result.copy_(now)

    return replay, results


class Counting(Graphs):
    """Says how often each of its graphs was replayed."""

    def __init__(self) -> None:
        super().__init__(again)
        self.replayed: Counter[tuple[str, int, int, int]] = Counter()

    def _graph(self, *arguments):
        found = super()._graph(*arguments)
        self.replayed.update(key for key, graph in self.captured.items() if graph is found)
        return found


@pytest.fixture
def select_by_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's kernel: where rows stand is what tensors say, and the numbers beside them are bounds."""

    def select(q: Tensor, weights: Tensor, keys: Tensor, batch: Batch, k: int) -> Tensor:
        seen = (batch.positions + 1).tolist()
        assert all(n <= batch.lengths[b] for n, b in zip(seen, batch.requests.tolist(), strict=True))
        each = Batch(
            tuple(range(len(q) + 1)), tuple(seen), batch.positions, torch.arange(len(q)), batch.table[batch.requests],
            batch.page_size,
        )  # fmt: skip
        return SELECT(q, weights, keys, each, k)

    monkeypatch.setattr(ops, "select", select)


# ------------------------------------------------------------------------------- of any function
def batch_of(counts: list[int], lengths: list[int], pages: int | None = None) -> Batch:
    pages = max(-(-n // PAGE) for n in lengths) if pages is None else pages
    return Batch.build(counts, lengths, torch.randperm(pages * len(counts)).int().view(-1, pages), PAGE)


def told(batch: Batch, x: Tensor, y: Tensor) -> Tensors:
    """Of all that a pass may read."""
    first = (batch.slots + 1000 * batch.turns)[:, None] * x
    return first, y.sum(1) + first[:, 0] + batch.requests


def test_replays_equal_calls_whatever_the_inputs() -> None:
    graphs, calls = Counting(), 0
    torch.manual_seed(0)
    for turn in range(60):
        requests, count = 1 + turn % 2, 1 + turn // 2 % 2
        lengths = torch.randint(2, 3000, (requests,)).tolist()
        batch = batch_of([count] * requests, lengths)
        if turn % 3 == 0:
            batch = replace(batch, rope_positions=batch.positions + turn)
        inputs = torch.randint(9, (requests * count, 2)), torch.randint(9, (requests * count, 5))
        found, expected = graphs.run("told", told, batch, *inputs), told(batch, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        kept = [x.clone() for x in found]
        graphs.run("told", told, batch, *(0 * x for x in inputs))
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))  # results are the caller's own
        calls += 2
    assert {key[:3] for key in graphs.captured} == {("told", r, n) for r in (1, 2) for n in (1, 2)}
    assert {key[3] for key in graphs.captured} == {16, 32, 64}
    assert graphs.replayed.total() == calls - (OFTEN - 1) * len(graphs.captured)


def test_what_is_no_pass_for_a_graph_is_called() -> None:
    def run(graphs: Graphs, batch: Batch, name: str = "count") -> None:
        seen: list[Batch] = []

        def function(given: Batch) -> Tensors:
            seen.append(given)
            return (given.turns,)

        for _ in range(2 * OFTEN):
            graphs.run(name, function, batch)
        assert graphs.captured or (len(seen) == 2 * OFTEN and all(given is batch for given in seen))

    for counts in ([1, 2], [MOST_OF_ONE + 1], [1] * (MOST_ROWS + 1)):
        graphs = Graphs(again)
        run(graphs, batch_of(counts, [100] * len(counts)))
        assert not graphs.captured and not graphs.capturing
    counted = Graphs(again)
    with ops.count_work():  # counting waits for the device
        run(counted, batch_of([1], [100]))
    assert not counted.captured
    none = Graphs()
    run(none, batch_of([1], [100]))
    assert not none.came
    full = Graphs(again)
    for requests in range(1, MOST_ROWS + 1):
        run(full, batch_of([1] * requests, [100] * requests))
    run(full, batch_of([2], [100]))
    assert len(full.captured) == MOST_GRAPHS == MOST_ROWS
    run(full, batch_of([2], [100]), "another")
    assert len(full.captured) == MOST_GRAPHS + 1


# ------------------------------------------------------------------------------- of the engine
def tiny() -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.2)).initialise(2)


def steps(engine: Engine, requests: list[Request]) -> Iterator[list[object]]:
    """Behind each step all that passes have made: tokens, drafts, what they were drawn from, and what is unread."""
    while engine.busy:
        engine.step()
        engine.check()
        yield [(r.outputs, r.drafts, r.draft_probs, r.unread, r.finish) for r in requests]


def same(found: object, expected: object) -> bool:
    """Bit for bit."""
    if isinstance(found, Tensor):
        return isinstance(expected, Tensor) and torch.equal(found, expected)
    if isinstance(found, list | tuple):
        assert isinstance(expected, list | tuple)
        return len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))
    return found == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_an_engine_gives_the_same_with_graphs(select_by_tensors: None, drafts: int, temperature: float) -> None:
    """Step by step, bit by bit: requests come and leave, grow over pages and get more of them than a table had, end
    with chains cut short, and one is aborted."""
    model, generator = tiny(), torch.Generator().manual_seed(5)
    lengths, news = [60, 1000, 5, 120, 31], [30, 60, 12, 25, 18]
    prompts = [torch.randint(0, 320, (n,), generator=generator).tolist() for n in lengths]
    engines = [Engine(model, pages=60, drafts=drafts, budget=2048) for _ in range(2)]
    graphs = engines[1].runner.graphs = Counting()
    both: list[list[Request]] = [[], []]
    for place, engine in enumerate(engines):
        for ids, new in zip(prompts[:3], news, strict=False):
            both[place].append(engine.add(ids, SamplingParams(new, temperature, seed=new)))
    captured, known = 0, 0
    for turn, (expected, found) in enumerate(zip(*map(steps, engines, both), strict=True)):
        assert same(found, expected), turn
        assert graphs.capturing == (len(graphs.captured) > known)
        captured, known = captured + graphs.capturing, len(graphs.captured)
        if turn in (6, 9):
            for place, engine in enumerate(engines):
                i = len(both[place])
                both[place].append(engine.add(prompts[i], SamplingParams(news[i], temperature, seed=i)))
        if turn == 13:
            for engine, requests in zip(engines, both, strict=True):
                engine.abort(requests[3])
    pools = [engine.cache.latent(layer) for engine in engines for layer in range(5)]
    assert same(pools[:5], pools[5:])  # what was written
    assert [r.finish for r in both[1]] == ["length", "length", "length", "abort", "length"]
    names = {"step"} | ({"draft"} if drafts > 1 else set()) | ({"entries"} if drafts else set())
    assert {key[0] for key in graphs.replayed} == names and captured
    assert {key[3] for key in graphs.captured if key[0] == "step"} == {16, 32}


@pytest.mark.parametrize("drafts", [3, "auto"])
def test_drafts_that_are_accepted_are_the_same_with_graphs(select_by_tensors: None, drafts) -> None:
    """The bundled model's chains: kept rows differ from request to request, and one graph serves all depths."""
    model, text = load(), "It was a dark evening in November, and the lamps had not been lit; "
    prompts = [model.tokenizer.encode(text * n) for n in (1, 2, 4)]
    outputs, replayed = [], Counting()
    for graphs in (None, replayed):
        engine = Engine(model.module, pages=60, drafts=drafts)
        engine.runner.graphs = graphs or engine.runner.graphs
        requests = [engine.add(ids, SamplingParams(40 + 9 * i)) for i, ids in enumerate(prompts)]
        while engine.busy:
            engine.step()
        outputs.append([request.outputs for request in requests])
        assert sum(sum(r.accepted) for r in requests) > 20
    assert outputs[0] == outputs[1]
    if drafts == 3:  # else a clock chooses
        assert {key[0] for key in replayed.replayed} == {"step", "entries", "draft"}
        assert {key[1:3] for key in replayed.captured if key[0] == "draft"} >= {(1, 1), (3, 1)}
