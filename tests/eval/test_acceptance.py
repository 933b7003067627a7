"""Accepted drafts, against speculative decoding with coins, against greedy decoding and against training's roll-out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanoglm.config import GLMConfig
from nanoglm.engine import SamplingParams, generate
from nanoglm.eval.acceptance import greedy, reached, rejection_sampling, target_only
from nanoglm.model import GLM, BatchStore, Output
from nanoglm.ops import Batch
from nanoglm.train import losses
from nanoglm.train.data import Sample

LENGTH, DRAFTS = 21, 4  # beyond k, so that selection bites


def build(seed: int = 0, **changes: object) -> GLM:
    config = GLMConfig.preset("tiny").replace(**{"initializer_range": 0.15, "index_topk": 8, **changes})
    return GLM(config).initialise(seed).double()


def prompts(count: int, vocabulary: int = 320, length: int = LENGTH) -> Tensor:
    return torch.randint(0, vocabulary, (count, length + 1), generator=torch.Generator().manual_seed(1))


def whole(model: GLM, ids: Tensor) -> Output:
    return model(ids.flatten(), Batch.contiguous([ids.shape[1]] * len(ids)), BatchStore(), attention="masked")


def kept(texts: Tensor) -> tuple[list[tuple[Tensor, Tensor]], object]:
    """A way that reads these tokens [B, G], whatever is drafted, and keeps p and q."""
    found: list[tuple[Tensor, Tensor]] = []

    def verify(p_BV: Tensor, q_BV: Tensor) -> tuple[Tensor, Tensor]:
        found.append((p_BV, q_BV))
        return torch.minimum(p_BV, q_BV).sum(-1), texts[:, len(found) - 1]

    return found, verify


@torch.no_grad()
def test_decoding_drafts_what_training_rolls_out() -> None:
    """Along a text: each depth's q from the cache is that of the whole sequence, and p the main model's there; so the
    chains are those of the total-variation loss."""
    model, texts = build(), prompts(3, length=LENGTH + DRAFTS)
    found, verify = kept(texts[:, LENGTH + 1 :])
    chains = reached(model, texts[:, : LENGTH + 1], DRAFTS, [verify])[0]
    sample = Sample.of(torch.cat([texts, texts[:, :1]], 1))
    output = whole(model, texts)
    p = model.logits(output.hidden).softmax(-1).unflatten(0, texts.shape)
    for depth, hidden in enumerate(losses.drafts(model, output, sample, DRAFTS)):
        q = model.logits(hidden).softmax(-1).unflatten(0, texts.shape)
        torch.testing.assert_close(found[depth][1], q[:, LENGTH - 1], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found[depth][0], p[:, LENGTH + depth], rtol=1e-5, atol=1e-9)
    targets = sample.targets.unflatten(0, texts.shape).clone()
    targets[:, :LENGTH] = targets[:, LENGTH + DRAFTS :] = losses.IGNORE  # the drafts behind the prompts alone
    lost, count = losses.total_variation(model, output, Sample(sample.ids, targets.flatten(), sample.counts), DRAFTS)
    assert count == 3
    assert float(lost) == pytest.approx(float((1 - chains.mean(1)).sum()), rel=1e-6)


@torch.no_grad()
def test_own_keys_are_those_of_a_sequence_of_drafts() -> None:
    """Without sharing, a draft's row is the last of one sequence: verified hidden states, then what was recycled."""
    model, texts = build(), prompts(1, length=LENGTH + DRAFTS)
    found, verify = kept(texts[:, LENGTH + 1 :])
    reached(model, texts[:, : LENGTH + 1], DRAFTS, [verify], share=False)
    hidden = whole(model, texts).hidden[:LENGTH]
    for depth in range(DRAFTS):
        rows = LENGTH + depth
        step = whole(model, texts[:, :rows]).step
        m, _ = model.draft(texts[0, 1 : rows + 1], hidden, step)
        torch.testing.assert_close(found[depth][1][0], model.logits(m[-1]).softmax(-1), rtol=1e-5, atol=1e-9)
        hidden = torch.cat([hidden, m[-1:]])
    shared, verify = kept(texts[:, LENGTH + 1 :])
    reached(model, texts[:, : LENGTH + 1], DRAFTS, [verify])
    assert torch.equal(shared[0][1], found[0][1])
    assert (shared[1][1] - found[1][1]).abs().max() > 1e-4


@torch.no_grad()
def test_greedy_is_what_speculative_decoding_accepts() -> None:
    """Drafted by the MTP layer's own likeliest tokens, compared with what plain decoding goes on to say."""
    model = build(3)
    model.lm_head.weight[8:] = 0  # few tokens are ever likeliest, so that some drafts are accepted
    ids, lengths = prompts(12), []
    for row in ids:
        said = list(generate(model, row.tolist(), SamplingParams(max_tokens=DRAFTS)))
        output = whole(model, row[None, :-1])
        hidden, selection, token, drafted = output.hidden, None, row[1:], list[int]()
        for depth in range(DRAFTS):
            hidden, selection = model.draft(token, hidden, output.step, depth=depth, selection=selection)
            drafted.append(int(model.logits(hidden[-1:]).argmax()))
            token = torch.cat([token[1:], torch.tensor(drafted[-1:])])
        lengths.append(next((i for i in range(DRAFTS) if said[i] != drafted[i]), DRAFTS))
    chains = reached(model, ids, DRAFTS, [greedy])[0]
    assert chains.sum(1).tolist() == lengths
    assert len(set(lengths)) > 1


@torch.no_grad()
def test_rejection_sampling_accepts_as_often_as_its_coins() -> None:
    """Seven tokens, two drafts: the chains' mean is the frequency with which draws from q survive min(1, p / q)."""
    v = 7
    model, (ids,) = build(5, vocab_size=v, initializer_range=0.25), prompts(1, v)
    tables = []
    for x in range(v):
        found, verify = kept(torch.tensor([[x, 0]]))
        reached(model, ids[None], 2, [verify])
        tables.append([pair[0] for step in found for pair in step])
    p, q = tables[0][:2]
    behind = [(table[2], table[3]) for table in tables]
    coins, draws = torch.Generator().manual_seed(0), 40_000
    first = torch.multinomial(q, draws, replacement=True, generator=coins)
    passed = torch.rand(draws, generator=coins) < p[first] / q[first]
    second = torch.stack([torch.multinomial(b, draws, replacement=True, generator=coins) for _, b in behind])
    second = second[first, torch.arange(draws)]
    ratio = torch.stack([a / b for a, b in behind])[first, second]
    both = passed & (torch.rand(draws, generator=coins) < ratio)
    way = rejection_sampling(torch.Generator().manual_seed(1))
    chains = reached(model, ids.expand(800, -1), 2, [way])[0]
    for found, coin in zip(chains.mean(0).tolist(), (passed, both), strict=True):
        assert found == pytest.approx(coin.double().mean().item(), abs=0.017)  # five standard errors at most
    naive = float((torch.minimum(p, q).sum() * torch.stack([torch.minimum(*b).sum() for b in behind]) * q).sum())
    assert abs(naive - both.double().mean().item()) > 0.03  # reading on drafts that were not accepted is another number


@torch.no_grad()
def test_ways_start_from_the_same_place_and_by_hand() -> None:
    model, ids = build(), prompts(2)
    alone = [reached(model, ids, DRAFTS, [way])[0] for way in (greedy, target_only)]
    together = reached(model, ids, DRAFTS, [greedy, target_only, greedy])
    for found, expected in zip(together, [*alone, alone[0]], strict=True):
        torch.testing.assert_close(found, expected)
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    assert [x.tolist() for x in greedy(p, q)] == [[0.0, 1.0], [0, 2]]
    accepted, token = target_only(p, q)
    torch.testing.assert_close(accepted, torch.tensor([0.3, 0.7]))
    assert token.tolist() == [1, 2]
    accepted, _ = rejection_sampling(torch.Generator().manual_seed(0))(p, q)
    torch.testing.assert_close(accepted, torch.tensor([0.6, 0.9]))
