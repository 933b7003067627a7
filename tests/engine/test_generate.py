"""The sampler's distribution, and generation against whole-sequence logits."""

from __future__ import annotations

import math
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanoglm.api import Model
from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.engine import SamplingParams, generate, sample
from nanoglm.engine.generate import prefill
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.ops import cpu

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.4, 1.1, 0.0, -3.0])


def build(dtype: torch.dtype = torch.float32, **changes: object) -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.2, **changes)).initialise(2).to(dtype)


@pytest.fixture(scope="module")
def model() -> GLM:
    return build()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def draws(logits: Tensor, count: int, temperature: float, top_k: int | None = None, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=temperature, top_k=top_k)
    return [sample(logits, params, generator) for _ in range(count)]


# ------------------------------------------------------------------------------- sampler
@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0]), min_size=1, max_size=12))
def test_greedy_takes_the_first_of_the_best(values: list[float]) -> None:
    """Equal logits go to the lower id; -0.0 equals 0.0."""
    assert draws(torch.tensor(values), 1, 0.0) == [values.index(max(values))]


def test_greedy_draws_no_random_number() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sample(LOGITS, SamplingParams(top_k=3), generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("top_k", [1, 3, 7, 8, 9, None])
def test_top_k_is_the_support(top_k: int | None) -> None:
    seen = set(draws(LOGITS, 600, 3.0, top_k))
    best = LOGITS.argsort(descending=True).tolist()
    assert seen == set(best[:top_k])


def test_top_k_keeps_the_lower_ids_of_a_tie() -> None:
    assert set(draws(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), 200, 1.0, 2)) == {0, 2}


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, None), (0.8, 5)])
def test_distribution_by_chi_square(temperature: float, top_k: int | None) -> None:
    """4,000 draws against softmax(logits / temperature) over the k best; p = 1e-4 by Wilson and Hilferty."""
    kept = sorted(range(8), key=lambda i: -float(LOGITS[i]))[:top_k]
    weights = {i: math.exp(float(LOGITS[i]) / temperature) for i in kept}
    total = sum(weights.values())
    seen = Counter(draws(LOGITS, 4000, temperature, top_k))
    assert seen.keys() <= weights.keys()
    expected = {i: 4000 * w / total for i, w in weights.items()}
    rare = [i for i, n in expected.items() if n < 5]  # too few for the approximation: one cell together
    cells = [([i], expected[i]) for i in kept if i not in rare] + [(rare, sum(expected[i] for i in rare))]
    statistic = sum((sum(seen[i] for i in ids) - n) ** 2 / n for ids, n in cells if n)
    freedom = sum(1 for _, n in cells if n) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-4])
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_coldest_temperature_is_greedy(temperature: float, top_k: int | None) -> None:
    assert set(draws(LOGITS, 20, temperature, top_k)) == {2}


def test_half_precision_logits_are_sampled_in_fp32() -> None:
    assert draws(LOGITS.bfloat16(), 50, 1.0) == draws(LOGITS.bfloat16().float(), 50, 1.0)


# ------------------------------------------------------------------------------- generation
def greedy_by_whole_sequences(model: GLM, ids: list[int], count: int) -> list[int]:
    """One forward pass over everything for each new token; ties to the lower id."""
    whole, ids = Model(model, None), list(ids)
    for _ in range(count):
        last = whole.logits([ids])[0][-1]
        ids.append(int((last == last.max()).nonzero()[0]))
    return ids[-count:]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 58])  # around k = 16, and across the border of a page of 64
def test_greedy_equals_repeated_whole_sequence_logits(model: GLM, length: int) -> None:
    ids = prompt(length)
    assert list(generate(model, ids, SamplingParams(max_tokens=12))) == greedy_by_whole_sequences(model, ids, 12)


def test_greedy_in_bfloat16() -> None:
    model = build(torch.bfloat16)
    ids = prompt(40)
    assert list(generate(model, ids, SamplingParams(max_tokens=8))) == greedy_by_whole_sequences(model, ids, 8)


def test_sampling_equals_the_sampler_on_whole_sequence_logits(model: GLM) -> None:
    ids, generator = prompt(20), torch.Generator().manual_seed(11)
    expected = list(ids)
    for _ in range(10):
        logits = Model(model, None).logits([expected])[0][-1]
        expected.append(sample(logits, SamplingParams(temperature=0.7, top_k=9), generator))
    params = SamplingParams(max_tokens=10, temperature=0.7, top_k=9, seed=11)
    assert list(generate(model, ids, params)) == expected[20:]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no compiler"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 2048])
def test_prefill_in_chunks(model: GLM, chunk: int, kernels: bool) -> None:
    """Of all chunks but the last the last layer has no rows to work at."""
    ids = prompt(100)
    with patch.object(cpu, "best", cpu.best if kernels else lambda: None):
        cache = PagedCache(model.config, 2)
        request = cache.open()
        logits = prefill(model, cache, request, ids, chunk)
        assert torch.equal(logits, Model(model, None).logits([ids])[0][-1])
    assert cache.length(request) == 100


def test_seeds(model: GLM) -> None:
    texts = [list(generate(model, prompt(9), SamplingParams(20, 1.0, None, seed))) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_request_has_its_own_random_numbers(model: GLM) -> None:
    """Neither the global generator nor a request between the tokens changes what comes."""
    params = SamplingParams(12, 1.0, None, 5)
    alone = list(generate(model, prompt(9), params))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    stream, other = generate(model, prompt(9), params), generate(model, prompt(4), SamplingParams(12, 1.0, None, 6))
    mixed = [next(stream)]
    for token in stream:
        next(other)
        torch.rand(3)
        mixed.append(token)
    assert mixed == alone
    torch.set_rng_state(state)
    list(generate(model, prompt(9), params))
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_ids_end_and_are_not_yielded(model: GLM) -> None:
    params = SamplingParams(24, 1.0, None, 3)
    whole = list(generate(model, prompt(9), params))
    at = next(i for i in range(3, 24) if whole[i] not in whole[:i])
    for stops in ((whole[at],), (whole[at], whole[-1], 999)):
        cut = list(generate(model, prompt(9), SamplingParams(24, 1.0, None, 3, stops)))
        assert cut == whole[: min(whole.index(s) for s in stops if s in whole)]
    assert list(generate(model, prompt(9), SamplingParams(24, 1.0, None, 3, (whole[0],)))) == []


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_tokens(model: GLM, count: int) -> None:
    assert len(list(generate(model, prompt(9), SamplingParams(count)))) == count


def test_the_prompt_is_not_changed(model: GLM) -> None:
    ids = prompt(9)
    list(generate(model, ids, SamplingParams(5)))
    assert ids == prompt(9)


# ------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("top_k", 0), ("top_k", -4), ("seed", -1), ("seed", 2**64),
    ],
)  # fmt: skip
def test_bad_parameters_name_the_field(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{field} is {value}; expected"):
        SamplingParams(**{field: value})


def test_the_largest_seed(model: GLM) -> None:
    assert list(generate(model, [1], SamplingParams(1, 1.0, None, 2**64 - 1)))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "prompt is empty; expected at least one token"),
        ([1, 320], "prompt holds token id 320; expected 0 to 319"),
        ([1, -1], "prompt holds token id -1; expected 0 to 319"),
        ([1] * 30, r"prompt has 30 tokens and 3 new ones .* max_position_embeddings \(32\)"),
    ],
)
def test_bad_prompts_are_refused_at_once(ids: list[int], words: str) -> None:
    model = build(max_position_embeddings=32)
    with pytest.raises(InputError, match=words):
        generate(model, ids, SamplingParams(3))  # before the first token is asked for


def test_a_prompt_that_just_fits() -> None:
    model = build(max_position_embeddings=32)
    assert len(list(generate(model, [1] * 29, SamplingParams(3)))) == 3


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_prompt_gives_tokens_of_the_vocabulary(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 319), min_size=1, max_size=20))
    params = SamplingParams(4, data.draw(st.sampled_from([0.0, 0.5, 5.0])), data.draw(st.sampled_from([None, 1, 400])))
    tokens = list(generate(build(), ids, params))
    assert len(tokens) == 4 and all(0 <= token < 320 for token in tokens)
