"""Stochastic speculation loses nothing: what it yields is distributed as plain sampling, for any draft distribution.

Main model and MTP layer are tables here: logits of the next token by the two tokens before, unlike each other. Three
tokens are generated in chains of two drafts, and all 216 outcomes counted against their exact probabilities.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from nanoglm.engine.params import SamplingParams
from nanoglm.engine.request import Request
from nanoglm.engine.sampler import adjust, distribution
from nanoglm.engine.speculative import propose, verify

V, TOKENS, DRAFTS = 6, 3, 2
MAIN, MTP = (1.5 * torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
MTP = MTP / 2 + MAIN / 2  # alike enough for drafts to be accepted often, and refused often
SETTINGS = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "top-k": {"top_k": 3, "temperature": 1.5},
    "top-p": {"top_p": 0.7},
    "min-p and bias": {"min_p": 0.2, "logit_bias": {2: 1.0, 4: -1.0}},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "mask": {"mask": lambda outputs: torch.arange(V) != (outputs[-1] if outputs else 0)},
}


def params_of(setting: str) -> SamplingParams:
    return SamplingParams(**({"max_tokens": TOKENS, "temperature": 1.0} | SETTINGS[setting]))


def logits(table: Tensor, ids: list[int]) -> Tensor:
    return table[ids[-2], ids[-1]]


def exact(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of each outcome of plain sampling."""
    found = {}
    for outcome in product(range(V), repeat=TOKENS):
        probability, ids = 1.0, [0, 1]
        for place, token in enumerate(outcome):
            row = adjust(logits(MAIN, ids), params, (0, 1), list(outcome[:place]))
            probability *= float(distribution(row, params)[token])
            ids.append(token)
        found[outcome] = probability
    return found


def speculate(
    params: SamplingParams, times: int, seed: int, greedy: bool = False
) -> tuple[Counter[tuple[int, ...]], list[float]]:
    """Outcomes of so many requests, and of each place the share of drafts that were accepted."""
    seen: Counter[tuple[int, ...]] = Counter()
    generator, drafted, accepted = torch.Generator().manual_seed(seed), [0] * DRAFTS, [0] * DRAFTS
    for _ in range(times):
        request = Request(0, (0, 1), params)
        request.generator = generator
        while len(request.outputs) < TOKENS:
            for _ in range(DRAFTS):
                propose(request, logits(MTP, [*request.ids, *request.drafts]))
                if greedy:
                    request.drafts[-1] = int(request.draft_probs[-1].argmax())
            whole = [*request.ids, *request.drafts]
            rows = [logits(MAIN, whole[: len(whole) - DRAFTS + place]) for place in range(DRAFTS + 1)]
            for token in verify(request, torch.stack(rows)):
                if not request.append(token):
                    break
            request.drafts, request.draft_probs = [], []
        seen[tuple(request.outputs)] += 1
        for total, counts in ((drafted, request.drafted), (accepted, request.accepted)):
            for place, n in enumerate(counts):
                total[place] += n
    return seen, [a / d for a, d in zip(accepted, drafted, strict=True)]


def chi_square(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """z of the statistic by Wilson and Hilferty; outcomes expected fewer than five times make one cell."""
    times = sum(seen.values())
    assert all(expected[outcome] > 0 for outcome in seen)
    cells = [(seen[o], times * p) for o, p in expected.items() if times * p >= 5]
    rare = [(seen[o], times * p) for o, p in expected.items() if 0 < times * p < 5]
    if rare:
        cells.append((sum(n for n, _ in rare), sum(e for _, e in rare)))
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    freedom = len(cells) - 1
    return float(((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom)))


LIMIT = 2.98  # p = 0.01 over seven settings: 0.0014 each


def check(setting: str, times: int) -> None:
    params = params_of(setting)
    seen, shares = speculate(params, times, seed=5)
    print(setting, [round(share, 3) for share in shares], z := chi_square(seen, exact(params)))
    assert all(0.1 < share < 0.99 for share in shares)
    assert z < LIMIT


@pytest.mark.parametrize("setting", ["temperature 1", "penalties"])
def test_speculation_is_plain_sampling(setting: str) -> None:
    check(setting, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_speculation_is_plain_sampling_over_100_000_samples(setting: str) -> None:
    check(setting, 100_000)


def test_greedy_drafts_taken_for_sampled_ones_are_noticed() -> None:
    """A planted error: the likeliest draft is proposed, and verified as if it had been drawn from q."""
    params = params_of("temperature 1")
    assert chi_square(speculate(params, 2000, 5, greedy=True)[0], exact(params)) > LIMIT
