"""bf16 forward and backward over fp32 weights: nothing of an update is lost, and what is fp32 in inference stays so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from nanoglm.config import GLMConfig
from nanoglm.model import GLM
from nanoglm.train import trainer
from nanoglm.train.data import Tokens, Windows
from nanoglm.train.objective import backward
from nanoglm.train.precision import low_copy, refresh
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse
from nanoglm.train.trainer import Keep, train

TEXT = Tokens.of(np.tile(np.random.default_rng(0).integers(32, 120, 100), 10).astype(np.uint16))
STAGES = (dense(0.5, 32), indexer_warmup(0.2, 32), sparse(0.3, 64, indexer_every=2))
RECIPE = Recipe("tiny", steps=10, tokens=64, pass_tokens=32, stages=STAGES, warmup=2)


def build(tied: bool = False) -> GLM:
    config = GLMConfig.preset("tiny").replace(initializer_range=0.15, tie_word_embeddings=tied)
    return GLM(config).initialise(0)


def trained(dtype: str, tied: bool = False) -> dict[str, torch.Tensor]:
    model = build(tied)
    train(model, TEXT, replace(RECIPE, dtype=dtype), Keep(quiet=True))
    return model.state_dict()


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_in_the_same_dtype_changes_no_bit(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages, accumulation, frozen backbone, router's bias and rotation: as without a copy."""
    plain = trained("float32", tied)
    monkeypatch.setattr(trainer, "low_copy", partial(low_copy, dtype=torch.float32))
    for name, value in trained("bfloat16", tied).items():
        assert torch.equal(value, plain[name]), name


def test_gradients_are_those_of_fp32_but_for_rounding() -> None:
    model, sample = build(), Windows(TEXT, 0).take(32, 2)
    copy = low_copy(model)
    refresh(copy, model)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16, torch.float32}
    assert all(p.dtype is torch.float32 for n, p in copy.named_parameters() if n.endswith("weights_proj.weight"))
    backward(copy, sample, RECIPE, 0)
    found = {n: p.grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in copy.parameters())
    model.zero_grad()
    backward(model, sample, RECIPE, 0)
    for name, parameter in model.named_parameters():
        grad = found[name]
        if parameter.grad is None:
            assert grad is None, name
            continue
        assert grad is not None and grad.dtype is torch.float32, name
        if "mlp.gate" not in name and parameter.grad.norm() > 1e-3:  # a token that changes its expert changes a router
            assert torch.cosine_similarity(grad.flatten(), parameter.grad.flatten(), 0) > 0.9, name


def test_updates_smaller_than_bf16_are_kept() -> None:
    """At a rate of 1e-4 no update of a weight near 1 is 2**-8 of it; the fp32 weights move all the same."""
    before, model = build().state_dict(), build()
    train(model, TEXT, replace(RECIPE, dtype="bfloat16", rate=1e-4, stages=(dense(1.0, 32),)), Keep(quiet=True))
    after = model.state_dict()
    assert all(value.dtype is torch.float32 for value in after.values())
    moved = after["model.norm.weight"] - before["model.norm.weight"]
    assert 0 < moved.abs().max() < 2**-9 and (moved != 0).all()
