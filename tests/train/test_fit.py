"""A budget of memory: the largest pass whose measured peak is within it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.train import fit as fitting
from nanoglm.train.fit import fit, measure
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse

STAGES = (dense(0.5, 64), indexer_warmup(0.2, 64), sparse(0.3, 128))
RECIPE = Recipe("tiny", tokens=1024, stages=STAGES)
CONFIG = GLMConfig.preset("tiny")


def test_the_largest_pass_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def peak(recipe: Recipe, config: GLMConfig, device: str) -> float:
        tried.append(recipe.pass_tokens)
        return 1.0 + recipe.pass_tokens / 1000

    monkeypatch.setattr(fitting, "measure", peak)
    lines: list[str] = []
    assert fit(RECIPE, CONFIG, 1.3e9, tell=lines.append) == replace(RECIPE, pass_tokens=256)
    assert tried == [1024, 512, 256]
    assert lines[-1] == "fit: passes of 256 tokens take 1.26 GB of 1.3 GB"
    with pytest.raises(InputError, match=r"fit is 1 GB; expected at least 1\.13 GB, which one sequence takes"):
        fit(RECIPE, CONFIG, 1e9)
    assert tried[-1] == 128  # one sequence of the longest stage
    tried.clear()
    assert fit(replace(RECIPE, tokens=384), CONFIG, 1.13e9).pass_tokens == 128
    assert tried == [384, 192, 128]  # no half of a sequence


@pytest.mark.slow
def test_the_measured_peak_is_within_the_budget_and_grows_with_the_pass() -> None:
    recipe = replace(RECIPE, tokens=16_384)
    small, large = (measure(replace(recipe, pass_tokens=n), CONFIG) for n in (128, 16_384))
    assert large > small + 0.1
    budget = (small + large) / 2 * 1e9
    fitted = fit(recipe, CONFIG, budget)
    assert fitted.pass_tokens is not None and 128 <= fitted.pass_tokens < 16_384
    assert measure(fitted, CONFIG) * 1e9 <= budget * 1.02  # a process takes some MB more or less
