"""The plain transformer as a stack: layers that choose by an oracle."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoglm.indexcache.calibration import Calibration
from nanoglm.indexcache.evaluate import Evaluator
from nanoglm.indexcache.overlap import overlap
from nanoglm.indexcache.plain import Transformer, held, oracle
from nanoglm.indexcache.search import Search
from nanoglm.indexcache.stack import run
from nanoglm.ops import Batch
from nanoglm.train.data import Sample


def plain(layers: int = 4) -> Transformer:
    return Transformer(50, 32, 4, layers).initialise(0, 0.2).eval()


def some(count: int = 3, length: int = 20) -> Calibration:
    ids = torch.randint(50, (count, length + 1), generator=torch.Generator().manual_seed(0))
    return Calibration(Sample.of(ids), ("text",) * count)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_the_oracle_takes_what_is_attended_to_most(length: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, keys = (torch.randn(length, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    found = oracle(k)(0, q, keys)
    assert found.shape == (length, k) and found.dtype == torch.int32
    for t in range(length):
        logits = torch.stack([q[t, h] @ keys[: t + 1, h].T / 2 for h in range(2)])
        mean = logits.softmax(-1).mean(0)
        valid = [p for p in found[t].tolist() if p >= 0]
        assert set(valid) == set(mean.topk(min(k, t + 1)).indices.tolist()) and valid == sorted(valid)
        assert found[t, len(valid) :].eq(-1).all()
        assert held(found, length)[t].nonzero()[:, 0].tolist() == valid


@torch.no_grad()
def test_with_all_keys_selected_it_is_the_dense_model() -> None:
    model, data = plain(), some()
    dense = model(data.sample.ids, data.sample.batch)
    sparse = model.selecting(oracle(20), 20)(data.sample.ids, data.sample.batch)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-5)
    assert not torch.allclose(model.selecting(oracle(3), 3)(data.sample.ids, data.sample.batch), dense, atol=1e-2)


@torch.no_grad()
def test_it_is_causal_and_sequences_are_apart() -> None:
    model = plain().selecting(oracle(3), 3)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, 24))
    alone = model(ids[:10], Batch.contiguous([10]))
    torch.testing.assert_close(model(ids, Batch.contiguous([10, 14]))[:10], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(ids[:6], Batch.contiguous([6])), alone[:6], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_shared_layer_takes_the_set_before_it() -> None:
    model, data = plain().selecting(oracle(3), 3), some()
    found = Evaluator(model, data).scores(["FFFF", "FSSS"])
    x, step = model.begin(data.sample.ids, data.sample.batch)
    chosen = None
    for i in range(4):
        x, chosen = run(model.layer(i), x, step, chosen)
    logits = model.logits(x)
    losses = torch.nn.functional.cross_entropy(logits, data.sample.targets, reduction="none").view(3, -1).mean(1)
    torch.testing.assert_close(found["FSSS"].loss, losses.double(), rtol=0, atol=1e-6)
    assert not torch.equal(found["FFFF"].loss, found["FSSS"].loss)


def test_overlap_and_search_take_it() -> None:
    model, data = plain().selecting(oracle(3), 3), some()
    bands = overlap(model, data)
    assert [band.begin for band in bands] == [6, 12] and float(bands[-1].overlap[0, 1]) < 1
    search = Search(Evaluator(model, data))
    assert search.greedy(2)[-1].loss >= search.exhaustive(2).loss - 1e-12
