"""Drafts rolled out under rejection sampling: the loss against decoding, and against every draft there could be."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.model import GLM, BatchStore, Output
from nanoglm.train import losses
from nanoglm.train.data import Sample


def build(seed: int = 0, **changes: object) -> GLM:
    """In fp64, sharp enough that p and q differ by much."""
    config = GLMConfig.preset("tiny").replace(**{"initializer_range": 0.25, "index_topk": 8, **changes})
    return GLM(config).initialise(seed).double()


def run(model: GLM, sample: Sample) -> Output:
    return model(sample.ids, sample.batch, BatchStore(), attention="masked")


def draw(seed: int, counts: tuple[int, ...], vocabulary: int = 320) -> Sample:
    """A fifth of the targets are not learnt."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sum(counts),), generator=g)
    targets = torch.cat([torch.cat([part[1:], torch.tensor([7 % vocabulary])]) for part in ids.split(counts)])
    return Sample(ids, targets.where(torch.rand(len(ids), generator=g) > 0.2, losses.IGNORE), counts)


@torch.no_grad()
def decoded(model: GLM, ids: list[int], targets: list[int], depths: int) -> tuple[float, int]:
    """One token at a time through the cache, one row a draft; each draft in turn is accepted or ends the chain."""
    cache = PagedCache(model.config, 4, dtype=torch.float64)
    request = cache.open()
    passes = [model(torch.tensor([token]), cache.extend([request], [1]), cache) for token in ids]
    p = [model.logits(output.hidden)[0].softmax(-1) for output in passes]
    total, count = 0.0, 0
    for t, output in enumerate(passes):
        hidden, selection, weight = output.hidden, None, 1.0
        for depth in range(depths):
            place = t + 1 + depth
            if place >= len(ids):
                break
            token = torch.tensor([ids[place]])  # step 0 writes keys even where nothing is learnt
            hidden, selection = model.draft(token, hidden, output.step, depth=depth, selection=selection)
            if targets[place] < 0:
                break
            q = model.logits(hidden)[0].softmax(-1)
            total, count = total - weight * float(q[targets[place]].log()), count + 1
            weight *= min(1.0, float(q[targets[place]] / p[place][targets[place]]))
    return total, count


@pytest.mark.parametrize(("seed", "depths"), [(0, 1), (1, 2), (2, 4)])
def test_rejection_against_decoding(seed: int, depths: int) -> None:
    model, sample = build(seed), draw(seed, (21, 3, 17))
    with torch.no_grad():
        total, count = losses.rejection(model, run(model, sample), sample, depths)
    rows = zip(sample.ids.split(sample.counts), sample.targets.split(sample.counts), strict=True)
    expected = [decoded(model, ids.tolist(), targets.tolist(), depths) for ids, targets in rows]
    assert count == sum(n for _, n in expected) == losses.counts(sample, depths, "rejection")["mtp"]
    assert total.item() == pytest.approx(sum(value for value, _ in expected), rel=1e-6)  # indexers score in fp32


@torch.no_grad()
def rolled_out(model: GLM, prefix: Tensor) -> float:
    """What the second draft behind ``prefix`` (its last token not run yet) loses along each first draft x there could
    be: drawn from q, accepted with min(1, p(x) / q(x)), run by the main model, which then says what was right."""
    cache = PagedCache(model.config, 2, dtype=torch.float64)
    request = cache.open()
    passed = model(prefix[:-1], cache.extend([request], [len(prefix) - 1]), cache)
    hidden, chosen = model.draft(prefix[1:], passed.hidden, passed.step)
    last, rows = passed.step.tail([1])
    p = model.logits(model(prefix[-1:], cache.extend([request], [1]), cache).hidden)[0].softmax(-1)
    q = model.logits(hidden[rows])[0].softmax(-1)
    found = 0.0
    for x in range(model.config.vocab_size):
        token = torch.tensor([x])
        behind = model.logits(model(token, cache.extend([request], [1]), cache).hidden)[0].softmax(-1)
        second, _ = model.draft(token, hidden[rows], last, depth=1, selection=chosen[rows])
        loss = -(behind * model.logits(second)[0].log_softmax(-1)).sum()
        found += float(q[x]) * min(1.0, float(p[x] / q[x])) * float(loss)
        cache.rollback(request, 1)
    return found


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_rejection_over_all_that_the_model_could_say_is_the_loss_along_accepted_drafts(seed: int) -> None:
    """Six tokens, two places: each text's loss as often as the main model says it, and each draft's that q makes."""
    model = build(seed, vocab_size=6)
    prefix = torch.randint(0, 6, (12,), generator=torch.Generator().manual_seed(seed))
    said = 0.0
    for x, y in product(range(6), repeat=2):
        ids = torch.cat([prefix, torch.tensor([x, y])])
        targets = torch.full_like(ids, losses.IGNORE)
        targets[11:13] = ids[12:]
        sample = Sample(ids, targets, (14,))
        output = run(model, sample)
        p = model.logits(output.hidden).softmax(-1)
        first, both = (losses.rejection(model, output, sample, depths)[0] for depths in (1, 2))
        said += float(p[11, x] * p[12, y] * (both - first))  # of the second draft behind the prefix: no other is learnt
    assert said == pytest.approx(rolled_out(model, prefix), rel=1e-6)


def test_rejection_learns_through_the_draft_alone() -> None:
    """Weights and the main distribution are constants: the gradient is that of the weighted loss with both given."""
    model, sample = build(), draw(4, (30,))
    output, targets = run(model, sample), losses.draft_targets(sample, 2)
    names = ["lm_head.weight", "model.layers.4.eh_proj.weight", "model.layers.4.self_attn.kv_a_proj_with_mqa.weight"]
    parameters = [dict(model.named_parameters())[name] for name in names]
    total, _ = losses.rejection(model, output, sample, 2)
    found = torch.autograd.grad(total, parameters, retain_graph=True)
    first, second = (model.logits(hidden).log_softmax(-1) for hidden in losses.drafts(model, output, sample, 2))
    p = model.logits(output.hidden).log_softmax(-1).detach()
    expected = total.new_zeros(())
    for t, (x, y) in enumerate(targets.T.tolist()):
        if x >= 0:
            expected = expected - first[t, x]
        if x >= 0 and y >= 0:
            expected = expected - min(1.0, float((first[t, x].detach() - p[t + 1, x]).exp())) * second[t, y]
    assert total.item() == pytest.approx(expected.item())
    for ours, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("drafts", losses.DRAFTS)
def test_behind_a_resting_backbone_the_mtp_layer_alone_learns(drafts: str) -> None:
    model, sample = build(), draw(5, (30,))
    with torch.no_grad():
        output = run(model, sample)
    losses.DRAFTS[drafts](model, output, sample, 3)[0].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    layer = {name for name, _ in model.named_parameters() if name.startswith("model.layers.4.")}
    assert {n for n in moved if n.startswith("model.layers.")} == {n for n in layer if ".indexer." not in n}
    assert moved - layer == {"lm_head.weight", "model.embed_tokens.weight"}


@torch.no_grad()
def test_where_draft_and_model_agree_every_depth_weighs_one() -> None:
    """A head of zeros: p = q everywhere, so this is the likelihood of all rows that count."""
    model, sample = build(), draw(6, (16,))
    output = run(model, sample)
    model.lm_head.weight.zero_()
    (total, count), (_, all_rows) = (loss(model, output, sample, 3) for loss in (losses.rejection, losses.mtp))
    assert total.item() == pytest.approx(math.log(320) * count)
    assert count < all_rows  # behind a token that is not learnt nothing counts
