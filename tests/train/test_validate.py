"""Validation and monitors against their definitions, spelled out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanoglm.config import GLMConfig
from nanoglm.model import GLM, BatchStore, Tape
from nanoglm.train import losses
from nanoglm.train.data import Sample, Tokens
from nanoglm.train.validate import Validation, monitors

IDS = np.random.default_rng(0).integers(0, 257, 203).astype(np.uint16)


@pytest.fixture(scope="module")
def model() -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.15)).initialise(0)


def test_every_token_of_the_windows_is_predicted_once(model: GLM) -> None:
    tokens = Tokens.of(IDS)
    validation = Validation(tokens, length=40)
    samples = validation.samples()
    assert torch.cat([s.ids for s in samples]).tolist() == IDS[:200].tolist()
    assert torch.cat([s.targets for s in samples]).tolist() == IDS[1:201].tolist()
    found = validation.run(model, "dense")
    with torch.no_grad():
        total = 0.0
        for begin in range(0, 200, 40):
            sample = Sample.of(torch.from_numpy(IDS[begin : begin + 41].astype(np.int64))[None])
            hidden = model(sample.ids, sample.batch, BatchStore(), attention="dense").hidden
            total += float(losses.cross_entropy(model, hidden, sample.targets)[0])
    assert found["val_dense"] == pytest.approx(total / 200, abs=1e-4)
    assert "val_sparse" not in found
    each = (IDS < 256).sum() / len(IDS)  # a token that ends a document is no byte
    assert found["bits_per_byte"] == pytest.approx(total / 200 / math.log(2) / each, abs=1e-4)


def test_under_selections_both_losses_are_given(model: GLM) -> None:
    found = Validation(Tokens.of(IDS), length=40, limit=80).run(model, "masked")
    assert abs(found["val_sparse"] - found["val_dense"]) > 1e-4  # k is 16
    assert found["bits_per_byte"] > 0


def test_a_text_without_a_window_gives_none() -> None:
    assert Validation(Tokens.of(IDS[:40]), length=40).samples() == []


def test_monitors_by_hand(model: GLM) -> None:
    sample = Sample.of(torch.from_numpy(IDS[:82].astype(np.int64)).view(2, 41))
    found, config, tape = monitors(model, sample, depths=2), model.config, Tape()
    with torch.no_grad():
        output = model(sample.ids, sample.batch, BatchStore(), attention="dense", tape=tape)
        lost, count = losses.total_variation(model, output, sample, 2)
    assert found["accepted"] == pytest.approx(3 - 2 * float(lost) / count, abs=1e-4)
    loads = [np.bincount(ids.flatten().numpy(), minlength=8) for ids in tape.experts.values()]
    assert found["load"] == pytest.approx(max(load.max() / load.mean() for load in loads), abs=1e-4)
    assert found["dead"] == sum(int((load == 0).sum()) for load in loads)
    masses, active = [], []
    for first, served in ((0, (0, 1)), (2, (2, 3))):
        q, w, k = (x[:40] for x in tape.indexer[first])
        dots = torch.einsum("tji,si->tjs", q, k)
        scores = (w[:, :, None] * dots.relu()).sum(1)
        active += [sum(int((dots[t, j, : t + 1] > 0).sum()) for t in range(40)) / 820 for j in range(8)]
        for layer in served:
            queries, keys = (x[:40] for x in tape.attention[layer])
            inside = []
            for t in range(16, 40):
                p = torch.einsum("ha,sha->hs", queries[t], keys[: t + 1]).mul(config.qk_head_dim**-0.5).softmax(-1)
                inside.append(float(p.mean(0)[scores[t, : t + 1].topk(16).indices].sum()))
            masses.append(sum(inside) / len(inside))
    assert found["mass"] == pytest.approx(min(masses), abs=2e-4)
    assert found["active"] == pytest.approx(min(active), abs=1e-4)
