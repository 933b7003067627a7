"""The engine against the plain loop: whatever is scheduled, a request's tokens are those it would have alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from nanoglm.api import Model, load
from nanoglm.cache import PAGE, PagedCache
from nanoglm.config import GLMConfig
from nanoglm.engine import Engine, Request, SamplingParams, generate
from nanoglm.engine.generate import prefill
from nanoglm.engine.request import accepted_length
from nanoglm.engine.sampler import best
from nanoglm.engine.speculative import verify
from nanoglm.errors import InputError
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch


@cache
def build() -> GLM:
    """Tiny, with drafts that are often right: a deterministic text repeats itself."""
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.2)).initialise(2)


def prompt(length: int, seed: int = 0, prefix: int = 0) -> list[int]:
    """Random tokens, the first ``prefix`` of which are the same whatever the seed."""
    shared = torch.randint(0, 320, (prefix,), generator=torch.Generator().manual_seed(99)).tolist()
    return shared + torch.randint(0, 320, (length - prefix,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def alone(ids: tuple[int, ...], params: SamplingParams) -> list[int]:
    return list(generate(build(), ids, params))


def finish(engine: Engine) -> None:
    steps = 0
    while engine.busy:
        engine.step()
        engine.check()
        steps += 1
        assert steps < 5000, "the engine makes no progress"


# ------------------------------------------------------------------------------- by example
@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("budget", [4, 64, 1024])
def test_many_requests_get_what_each_gets_alone(drafts: int, budget: int) -> None:
    engine = Engine(build(), pages=40, budget=budget, drafts=drafts)
    lengths = [1, 9, 64, 65, 130, 17, 100, 128]
    requests = [engine.add(prompt(n, n), SamplingParams(12)) for n in lengths]
    finish(engine)
    for n, request in zip(lengths, requests, strict=True):
        assert request.outputs == alone(tuple(prompt(n, n)), SamplingParams(12)) and request.finish == "length"


@pytest.mark.parametrize("drafts", [0, 2, "auto"])
def test_sampling_alone_and_in_company(drafts: int | str) -> None:
    """Without drafts a seed gives the plain loop's tokens; with them the same in company, without room, as alone.

    With the bundled model, whose drafts are accepted: a chain cut short would draw other numbers.
    """
    model, text = load(), "It was a dark evening in November, and the lamps ha"
    ids = model.tokenizer.encode(text)
    params = [SamplingParams(30, 1.0, 5, seed) for seed in range(6)]
    expected = [list(generate(model.module, ids, p)) for p in params]
    if drafts:
        expected = []
        for p in params:
            single = Engine(model.module, pages=40, drafts=drafts)
            expected.append(list(single.generate(ids, p)))
    budget = 18 if drafts == "auto" else 11  # little enough to cut, and enough for two to be under way
    engine = Engine(model.module, pages=3, budget=budget, drafts=drafts, prefix=False)
    requests = [engine.add(ids, p) for p in params]
    finish(engine)
    assert [request.outputs for request in requests] == expected and any(r.preempted for r in requests)
    assert not drafts or accepted_length(requests) > 1.3


@torch.no_grad()
def test_drafts_are_those_of_the_whole_sequence() -> None:
    """Behind every step: the chain from one pass over all tokens, with keys and Selection of step 0."""
    model = build()
    engine = Engine(model, pages=4, drafts=3, budget=20)
    request, seen = engine.add(prompt(50), SamplingParams(16)), 0
    while engine.busy:
        engine.step()
        if not request.drafts:
            continue
        ids = torch.tensor(request.ids)
        output = model(ids[:-1], Batch.contiguous([len(ids) - 1]), BatchStore())
        hidden, selection = model.draft(ids[1:], output.hidden, output.step)
        last, rows = output.step.tail([1])
        hidden, chain = hidden[rows], []
        for place in range(len(request.drafts)):
            if place:
                hidden, _ = model.draft(
                    ids.new_tensor(chain[-1:]), hidden, last, depth=place, selection=selection[rows]
                )
            chain.append(int(model.logits(hidden)[0].argmax()))
        assert request.drafts == chain
        seen += 1
    assert seen > 10


def test_pages_that_run_out_send_the_youngest_back() -> None:
    engine = Engine(build(), pages=5, prefix=False)
    requests = [engine.add(prompt(100, seed), SamplingParams(60)) for seed in range(3)]
    finish(engine)
    assert requests[0].preempted == 0 and sum(r.preempted for r in requests) > 0
    for seed, request in enumerate(requests):
        assert request.outputs == alone(tuple(prompt(100, seed)), SamplingParams(60))
    assert engine.cache.free_pages == 5


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_known_prefix_is_not_computed_again(drafts: int) -> None:
    engine = Engine(build(), pages=40, drafts=drafts)
    first = engine.add(prompt(300, 1, 200), SamplingParams(8))
    finish(engine)
    second = engine.add(prompt(300, 2, 200), SamplingParams(8))
    finish(engine)
    assert (first.hit, second.hit) == (0, 192)
    assert second.outputs == alone(tuple(prompt(300, 2, 200)), SamplingParams(8))


def test_mtp_entries_after_a_hit_are_the_requests_own() -> None:
    """The trap of the last position of a shared prefix: its MTP entry is made from the token behind it."""
    shared, layer = prompt(64, 5, 64), build().config.num_hidden_layers
    for tail in ([7], [8, 9, 10, 11], [5, 9]):
        entries = []
        for known in (False, True):
            engine = Engine(build(), pages=40, drafts=1)
            if known:
                engine.add([*shared, 5, 6, 7], SamplingParams(3))
                finish(engine)
            request = engine.add([*shared, *tail], SamplingParams(8))
            engine.step()
            assert request.hit == (64 if known and tail[0] == 5 else 0)
            assert request.handle is not None and engine.prefix is not None
            rows = engine.cache.last([request.handle], [request.computed]).slots
            entries.append(torch.cat([x[rows] for x in engine.cache.latent(layer)], 1))
        assert torch.equal(*entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_equal_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind every token those of the plain loop: in company, in chunks, after a hit, sent back, verified as a draft.

    With the bundled model, whose drafts are accepted.
    """
    model, new = load(dtype=dtype), 24
    text = "It was a dark evening in November, and the lamps had not been lit; " * 5
    ids = model.tokenizer.encode(text)
    prompts = [ids[:1], ids[:63], ids[:65], ids[:150], ids[:200], ids[5:90]]
    expected = []
    for ids in prompts:
        cache, rows, outputs = PagedCache(model.config, 4, dtype=dtype), [], list[int]()
        handle = cache.open()
        while len(outputs) < new:
            rows.append(prefill(model.module, cache, handle, outputs[-1:] or ids))
            outputs.append(best(rows[-1]))
        expected.append(torch.stack(rows))
    seen: dict[Request, list[Tensor]] = {}

    def watched(request: Request, rows: Tensor) -> list[int]:
        found = verify(request, rows)
        seen.setdefault(request, []).extend(rows[: len(found)])
        return found

    monkeypatch.setattr("nanoglm.engine.engine.verify", watched)
    requests: list[Request] = []
    for drafts, budget, pages in ((0, 1024, 40), (0, 40, 5), (3, 40, 6), ("auto", 100, 40)):
        engine = Engine(model.module, pages=pages, budget=budget, drafts=drafts)
        for _ in range(2):
            requests += [engine.add(ids, SamplingParams(new)) for ids in prompts]
            finish(engine)
    for i, request in enumerate(requests):
        assert torch.equal(torch.stack(seen[request])[:new], expected[i % len(prompts)])
    assert all(sum(found) > 0 for found in ([r.hit for r in requests], [r.preempted for r in requests]))
    assert sum(sum(request.accepted) for request in requests) > 100


def test_stop_ids_cut_an_accepted_run() -> None:
    ids = prompt(30)
    whole = alone(tuple(ids), SamplingParams(24))
    for stop in sorted(set(whole)):
        engine = Engine(build(), pages=8, drafts=4)
        request = engine.add(ids, SamplingParams(24, stop_ids=(stop,)))
        finish(engine)
        assert request.outputs == whole[: whole.index(stop)] and request.finish == "stop"
        assert engine.cache.free_pages + len(engine.prefix or ()) == 8


def test_abort_at_any_moment() -> None:
    for moment in range(12):
        engine = Engine(build(), pages=8, budget=16, drafts=2)
        a, b = (engine.add(prompt(50, seed), SamplingParams(20)) for seed in (0, 1))
        for _ in range(moment):
            engine.step()
        ended = a.finish
        engine.abort(a)
        engine.abort(a)
        engine.check()
        finish(engine)
        assert a.finish == (ended or "abort")
        assert b.outputs == alone(tuple(prompt(50, 1)), SamplingParams(20))


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = Engine(build(), pages=2)
    with pytest.raises(InputError, match="request has 100 tokens and wants 29 new ones; expected at most 128 together"):
        engine.add(prompt(100), SamplingParams(29))
    engine.add(prompt(100), SamplingParams(28))
    finish(engine)


def test_drafts_need_an_mtp_layer() -> None:
    model = GLM(GLMConfig.preset("tiny").replace(num_nextn_predict_layers=0)).initialise(0)
    with pytest.raises(InputError, match="model has no MTP layer"):
        Engine(model, pages=2, drafts=1)


def test_logprobs() -> None:
    """Of prompt and continuation, also in pieces and after being sent back: those of the whole sequence."""
    ids = prompt(90)
    for budget, drafts in ((1024, 0), (7, 2)):
        engine = Engine(build(), pages=8, budget=budget, drafts=drafts)
        request = engine.add(ids, SamplingParams(6, logprobs=2, prompt_logprobs=3))
        finish(engine)
        whole = [*ids, *request.outputs]
        expected = Model(build(), None).logits([whole])[0].log_softmax(-1)
        found = [*request.prompt_logprobs, *request.logprobs]
        assert [entry.token for entry in found] == whole[1:]
        for entry, row in zip(found, expected[:-1], strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
            assert max(entry.top, key=lambda i: entry.top[i]) == int(row.argmax())
        assert {len(entry.top) for entry in request.prompt_logprobs} == {3}


def test_a_span_is_of_prompt_continuation_and_drafts() -> None:
    request = Request(0, (1, 2, 3), SamplingParams(), outputs=[4, 5], drafts=[6, 7])
    whole = [1, 2, 3, 4, 5, 6, 7]
    for begin in range(8):
        for end in range(begin, 8):
            assert request.span(begin, end) == whole[begin:end]


# ------------------------------------------------------------------------------- whatever happens
class Schedules(RuleBasedStateMachine):
    """Arrivals, lengths, shared prefixes, aborts, tiny pools, budgets, drafts, all drawn."""

    @initialize(
        pages=st.integers(4, 12), budget=st.sampled_from([8, 13, 33, 200]), most=st.integers(1, 5),
        drafts=st.sampled_from([0, 1, 2, 4, "auto"]), prefix=st.booleans(),
    )  # fmt: skip
    def begin(self, pages: int, budget: int, most: int, drafts: int | str, prefix: bool) -> None:
        self.engine = Engine(build(), pages=pages, budget=budget, most=most, drafts=drafts, prefix=prefix)
        self.requests: list[Request] = []
        self.aborted: set[int] = set()

    @rule(
        length=st.sampled_from([1, 2, 63, 64, 65, 66, 127, 128, 129, 150]), seed=st.integers(0, 2),
        shared=st.sampled_from([0, 64, 65, 128]), new=st.sampled_from([1, 2, 9, 20]),
        stop=st.sampled_from([(), (3, 5, 250)]),
    )  # fmt: skip
    def arrive(self, length: int, seed: int, shared: int, new: int, stop: tuple[int, ...]) -> None:
        ids = prompt(length, seed, min(shared, length))
        if -(-(length + new) // PAGE) <= self.engine.cache.pages:
            self.requests.append(self.engine.add(ids, SamplingParams(new, stop_ids=stop)))

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        request = self.requests[which % len(self.requests)]
        if request.finish is None:
            self.aborted.add(request.number)
        self.engine.abort(request)

    @rule(times=st.integers(1, 12))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @invariant()
    def books(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        finish(self.engine)
        for request in self.requests:
            expected = alone(request.prompt, request.params)
            if request.number in self.aborted:
                assert request.outputs == expected[: len(request.outputs)]
            else:
                assert request.outputs == expected
        held = len(self.engine.prefix) if self.engine.prefix else 0
        assert self.engine.cache.free_pages + held == self.engine.cache.pages


def settle(examples: int) -> settings:
    return settings(
        max_examples=examples, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
    )


class TestSchedules(Schedules.TestCase):  # type: ignore[name-defined,misc]
    settings = settle(25)


@pytest.mark.slow
class TestAThousandSchedules(Schedules.TestCase):  # type: ignore[name-defined,misc]
    settings = settle(1000)
