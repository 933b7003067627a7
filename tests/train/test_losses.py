"""Losses against the definition spelled out one position at a time (training spec 6)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanoglm import ops
from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.model import GLM, Attention, BatchStore, Output, Tape
from nanoglm.model.indexer import IndexerInputs
from nanoglm.ops import Batch, kl
from nanoglm.train import losses
from nanoglm.train.data import Sample
from nanoglm.train.objective import indexer_loss

LENGTH = 24  # longer than the tiny preset's k of 16, so selection bites


def build(seed: int = 0, **changes: object) -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.15, **changes)).initialise(seed)


@pytest.fixture(scope="module")
def model() -> GLM:
    return build()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 320, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model: GLM, ids_BL: Tensor, attention: Attention, tape: Tape | None = None) -> Output:
    batch = Batch.contiguous([ids_BL.shape[1]] * ids_BL.shape[0])
    return model(ids_BL.flatten(), batch, BatchStore(), attention=attention, tape=tape)


def sample(ids_BL: Tensor, last: int = losses.IGNORE) -> Sample:
    """Each token's target is the next one; of the last one ``last``."""
    targets = torch.cat([ids_BL[:, 1:], torch.full_like(ids_BL[:, :1], last)], 1)
    return Sample(ids_BL.flatten(), targets.flatten(), (ids_BL.shape[1],) * ids_BL.shape[0])


def nats(logits_V: Tensor, target: int) -> float:
    """-log p(target), by the definition of softmax, in double precision."""
    values = logits_V.double().tolist()
    highest = max(values)
    return highest + math.log(sum(math.exp(x - highest) for x in values)) - values[target]


# ------------------------------------------------------------------------------- cross entropy
def test_cross_entropy_by_hand(model: GLM, ids: Tensor) -> None:
    with torch.no_grad():
        hidden = run(model, ids, "dense").hidden
    targets = torch.arange(len(hidden)) * 5 % 320
    targets[[0, 7, 30]] = losses.IGNORE
    with torch.no_grad():
        total, count = losses.cross_entropy(model, hidden, targets)
        logits = model.logits(hidden)
    expected = sum(nats(logits[t], int(targets[t])) for t in range(len(hidden)) if targets[t] >= 0)
    assert count == len(hidden) - 3
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_sums_and_counts_of_parts_add_up(model: GLM, ids: Tensor) -> None:
    targets = ids.flatten().roll(-1)
    with torch.no_grad():
        hidden = run(model, ids, "dense").hidden
        parts = [losses.cross_entropy(model, hidden[a:b], targets[a:b]) for a, b in ((0, 5), (5, 40), (40, 48))]
        total, count = losses.cross_entropy(model, hidden, targets)
    assert float(sum(s for s, _ in parts)) == pytest.approx(total.item(), rel=1e-6)
    assert sum(n for _, n in parts) == count == 48


def test_only_ignored_targets_count_nothing(model: GLM) -> None:
    total, count = losses.cross_entropy(model, torch.randn(3, 64), torch.full((3,), losses.IGNORE))
    assert (total.item(), count) == (0.0, 0)


# ------------------------------------------------------------------------------- MTP
@torch.no_grad()
def decoded(model: GLM, ids: list[int], depths: int) -> tuple[float, int]:
    """MTP loss as decoding would meet it: one token at a time through the cache, one row a draft.

    Depth 0 at position t reads token t + 1 and writes its keys; each later depth continues from that one
    row alone, with its Selection and with keys of depth 0 only.
    """
    cache = PagedCache(model.config, 4)
    request = cache.open()
    total, count = 0.0, 0
    for t in range(len(ids)):
        output = model(torch.tensor(ids[t : t + 1]), cache.extend([request], [1]), cache)
        hidden, selection = output.hidden, None
        for depth in range(depths):
            if t + 2 + depth >= len(ids):
                break
            following = torch.tensor([ids[t + 1 + depth]])
            hidden, selection = model.draft(following, hidden, output.step, depth=depth, selection=selection)
            total += nats(model.logits(hidden)[0], ids[t + 2 + depth])
            count += 1
    return total, count


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("attention", ["sparse", "masked", "dense"])
def test_mtp_against_decoding(ids: Tensor, attention: Attention, depths: int) -> None:
    # Dense training is decoding with k as large as the text; the other two work below it.
    model = build(index_topk=LENGTH if attention == "dense" else 8)
    with torch.no_grad():
        total, count = losses.mtp(model, run(model, ids, attention), sample(ids), depths)
    expected = [decoded(model, row, depths) for row in ids.tolist()]
    assert count == sum(n for _, n in expected) == 2 * sum(LENGTH - 2 - depth for depth in range(depths))
    assert total.item() == pytest.approx(sum(s for s, _ in expected), rel=2e-5)


@pytest.mark.parametrize("depths", [1, 3])
def test_total_variation_is_the_share_of_drafts_that_fail(ids: Tensor, depths: int) -> None:
    """By decoding one token at a time: sum of min(p, q) at each depth, products along the chain."""
    model = build(index_topk=8)
    with torch.no_grad():
        total, count = losses.total_variation(model, run(model, ids, "masked"), sample(ids, last=0), depths)
        p = model.logits(run(model, ids, "masked").hidden).softmax(-1).unflatten(0, ids.shape)
    expected, rows = 0.0, 0
    for b, row in enumerate(ids.tolist()):
        cache = PagedCache(model.config, 4)
        request = cache.open()
        for t in range(LENGTH - depths):
            with torch.no_grad():
                output = model(torch.tensor(row[t : t + 1]), cache.extend([request], [1]), cache)
                hidden, selection, chain, kept = output.hidden, None, 1.0, 0.0
                for depth in range(depths):
                    following = torch.tensor([row[t + 1 + depth]])
                    hidden, selection = model.draft(following, hidden, output.step, depth=depth, selection=selection)
                    q = model.logits(hidden)[0].softmax(-1)
                    chain *= float(torch.minimum(p[b, t + 1 + depth], q).sum())
                    kept += chain
            expected, rows = expected + 1 - kept / depths, rows + 1
    assert count == rows == 2 * (LENGTH - depths)
    assert total.item() == pytest.approx(expected, rel=2e-5)
    assert (
        losses.total_variation(model, run(model, ids[:, :3], "dense"), sample(ids[:, :3], last=0), 3)[1] == 0
    )  # nothing to draft


def test_total_variation_moves_the_draft_towards_the_model(ids: Tensor) -> None:
    """The main distribution is a target: head and backbone get gradient through the draft only."""
    model = build()
    output = run(model, ids, "dense")
    head = model.lm_head.weight
    total, _ = losses.total_variation(model, output, sample(ids, last=0), 1)
    (ours,) = torch.autograd.grad(total, head, retain_graph=True)
    with torch.no_grad():
        p = model.logits(output.hidden).softmax(-1).unflatten(0, ids.shape)[:, 1:]
    hidden = next(losses.drafts(model, output, sample(ids), 1)).unflatten(0, ids.shape)[:, :-1].detach()
    (expected,) = torch.autograd.grad((1 - torch.minimum(p, (hidden @ head.T).softmax(-1)).sum(-1)).sum(), head)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    parameters = dict(model.named_parameters())
    (moved,) = torch.autograd.grad(total, [parameters["model.layers.4.eh_proj.weight"]])
    assert moved.abs().sum() > 0


def test_mtp_reads_no_token_it_predicts(model: GLM, ids: Tensor) -> None:
    """The last token is only ever a target: another one moves one row's loss at depth 0, by its own nats."""
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 320
    with torch.no_grad():
        output = run(model, ids, "dense")
        first, second = (float(losses.mtp(model, run(model, x, "dense"), sample(x), 1)[0]) for x in (ids, changed))
        hidden, _ = model.draft(ids.roll(-1, 1).flatten(), output.hidden, output.step)
        logits = model.logits(hidden[LENGTH - 3 : LENGTH - 2])[0]
    moved = nats(logits, int(changed[0, -1])) - nats(logits, int(ids[0, -1]))
    assert second - first == pytest.approx(moved, abs=2e-4)
    assert abs(moved) > 0.01


def test_mtp_trains_the_backbone_and_the_embedding(model: GLM, ids: Tensor) -> None:
    total, _ = losses.mtp(model, run(model, ids, "dense"), sample(ids), 2)
    names = ["model.layers.4.eh_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
    parameters = dict(model.named_parameters())
    for gradient in torch.autograd.grad(total, [parameters[n] for n in names]):
        assert gradient.abs().sum() > 0


# ------------------------------------------------------------------------------- groups
@pytest.mark.parametrize(
    ("full", "layers", "expected"),
    [
        ((0, 2), 4, {0: range(0, 2), 2: range(2, 4)}),
        ((0, 1, 5, 9), 12, {0: range(0, 1), 1: range(1, 5), 5: range(5, 9), 9: range(9, 12)}),
        ((0, 1, 2), 3, {0: range(0, 1), 1: range(1, 2), 2: range(2, 3)}),
        ((0,), 5, {0: range(0, 5)}),
    ],
)
def test_groups(full: tuple[int, ...], layers: int, expected: dict[int, range]) -> None:
    assert losses.groups(full, layers) == expected


def test_groups_of_glm_52_are_the_selections_that_layers_use() -> None:
    config = GLMConfig.preset("glm-5.2")
    served = losses.groups(config.full_layers, config.num_hidden_layers)
    source = 0
    for layer in range(config.num_hidden_layers):
        source = layer if config.has_indexer(layer) else source
        assert layer in served[source]
    assert sum(map(len, served.values())) == 78
    assert served[74] == range(74, 78)


# ------------------------------------------------------------------------------- indexer KL
B, L, J, DIM, H, A = 2, 9, 4, 6, 3, 5
SCALE = A**-0.5


def kl_case(layers: int = 3, seed: int = 0) -> tuple[IndexerInputs, list[tuple[Tensor, Tensor]], Tensor]:
    """Random indexer inputs, teachers, and a Selection of up to four of the visible positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, w, k = (normal(B * L, J, DIM), normal(B * L, J), normal(B * L, DIM))
    inputs = IndexerInputs(*(x.requires_grad_() for x in (q, w, k)))
    served = [(2 * normal(B * L, H, A), normal(B * L, H, A)) for _ in range(layers)]
    selection = torch.full((B * L, 4), -1, dtype=torch.int32)
    for row in range(B * L):
        visible = torch.randperm(row % L + 1, generator=generator)[:4].sort().values
        selection[row, : len(visible)] = visible
    return inputs, served, selection


def kl_by_hand(inputs: IndexerInputs, served: list[tuple[Tensor, Tensor]], selection: Tensor | None) -> Tensor:
    """sum over rows of KL(p || q), with loops over sequences, rows, layers and heads."""
    q, w, k = (x.double() for x in inputs)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, B * L, L):
        for row in range(first, first + L):
            positions = range(row - first + 1) if selection is None else [int(s) for s in selection[row] if s >= 0]
            keys = [first + s for s in positions]
            scores = [sum(w[row, j] * (q[row, j] @ k[s]).relu() for j in range(J)) for s in keys]
            log_q = torch.stack(scores).log_softmax(0)
            p = torch.zeros(len(keys), dtype=torch.float64)
            for queries, main_keys in served:
                for h in range(H):
                    logits = [(queries[row, h] @ main_keys[s, h]).double() * SCALE for s in keys]
                    p += torch.stack(logits).softmax(0) / (H * len(served))
            total = total + (p * (p.log() - log_q)).sum()
    return total


def gradients(loss: Tensor, inputs: IndexerInputs) -> list[Tensor]:
    return [g.float() for g in torch.autograd.grad(loss, list(inputs))]


@pytest.mark.parametrize("selected", [False, True], ids=["dense", "selected"])
@pytest.mark.parametrize("layers", [1, 3])
def test_kl_and_its_gradient_by_hand(layers: int, selected: bool) -> None:
    inputs, served, selection = kl_case(layers)
    chosen = selection if selected else None
    total, count = losses.indexer_kl(inputs, served, L, SCALE, chosen)
    expected = kl_by_hand(inputs, served, chosen)
    assert count == B * L
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients(total, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("selected", [False, True], ids=["dense", "selected"])
def test_multi_layer_gradient_is_the_mean_of_the_layers_gradients(selected: bool) -> None:
    """IndexCache 3.2: averaging teachers averages gradients; the values differ by a constant."""
    inputs, served, selection = kl_case()
    chosen = selection if selected else None
    together, _ = losses.indexer_kl(inputs, served, L, SCALE, chosen)
    apart = [losses.indexer_kl(inputs, [one], L, SCALE, chosen)[0] for one in served]
    mean = torch.stack(apart).mean()
    for ours, theirs in zip(gradients(together, inputs), gradients(mean, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert together.item() < mean.item() - 1e-3  # the mean form pays for what the layers disagree on


@pytest.mark.parametrize("selected", [False, True], ids=["dense", "selected"])
@pytest.mark.parametrize("shared_keys", [False, True], ids=["expanded", "absorbed"])
def test_kl_in_chunks_is_the_whole_to_fp64(monkeypatch: pytest.MonkeyPatch, selected: bool, shared_keys: bool) -> None:
    """Rows one by one, and gradients against finite differences."""
    inputs, served, selection = kl_case()
    wide = IndexerInputs(*(x.detach().double().requires_grad_() for x in inputs))
    teachers = [(q.double(), (k[:, 0] if shared_keys else k).double()) for q, k in served]
    expanded = [(q, k[:, None].expand(-1, H, -1) if shared_keys else k) for q, k in teachers]
    chosen = selection if selected else None
    whole, _ = losses.indexer_kl(wide, teachers, L, SCALE, chosen)
    assert whole.item() == pytest.approx(kl_by_hand(wide, expanded, chosen).item(), rel=1e-9)
    monkeypatch.setattr(kl, "CHUNK_ELEMENTS", 1)
    parts, _ = losses.indexer_kl(wide, teachers, L, SCALE, chosen)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(whole, list(wide)), torch.autograd.grad(parts, list(wide)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *x: losses.indexer_kl(IndexerInputs(*x), teachers, L, SCALE, chosen)[0], tuple(wide)
    )


def test_kl_is_zero_where_the_indexer_is_the_attention() -> None:
    """q = p needs I[t, s] = q·k / sqrt(A): one indexer head on positive queries and keys, one main head."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.rand(B * L, 1, A, generator=generator) for _ in range(2))
    inputs = IndexerInputs(queries, torch.full((B * L, 1), SCALE), keys[:, 0])
    for selection in (None, kl_case()[2]):
        total, _ = losses.indexer_kl(inputs, [(queries, keys)], L, SCALE, selection)
        assert abs(total.item()) < 1e-5


def test_kl_sees_no_later_token_and_no_other_sequence() -> None:
    inputs, served, _ = kl_case()
    total, _ = losses.indexer_kl(inputs, served, L, SCALE, None)
    _, _, k = gradients(total, inputs)
    alone = [
        losses.indexer_kl(
            IndexerInputs(*(x[b : b + L] for x in inputs)),
            [(q[b : b + L], y[b : b + L]) for q, y in served],
            L,
            SCALE,
            None,
        )[0]
        for b in (0, L)
    ]
    assert sum(alone).item() == pytest.approx(total.item(), rel=1e-5)
    # A query's own row is the last it sees: the last key of a sequence is met by one row only.
    (only,) = torch.autograd.grad(alone[0], inputs.keys_TI, retain_graph=True)
    torch.testing.assert_close(only[L - 1], k[L - 1])
    assert float(only[L:].abs().sum()) == 0.0


def test_kl_survives_attention_that_underflows() -> None:
    """Teachers so sharp that p is exactly 0 nearly everywhere give no NaN, in value or gradient."""
    inputs, served, selection = kl_case()
    sharp = [(1e4 * q, k) for q, k in served]
    for chosen in (None, selection):
        total, _ = losses.indexer_kl(inputs, sharp, L, SCALE, chosen)
        assert math.isfinite(total.item()) and total.item() > 0
        assert all(g.isfinite().all() for g in gradients(total, inputs))


# ------------------------------------------------------------------------------- the gradient border
@pytest.mark.parametrize(("attention", "sparse"), [("dense", False), ("masked", True)])
def test_kl_moves_indexers_and_nothing_else(ids: Tensor, attention: Attention, sparse: bool) -> None:
    """Hidden state and query latent enter the indexer detached: all else gets exactly zero gradient."""
    model = build()
    tape = Tape()
    output = run(model, ids, attention, tape)
    losses.mtp(model, output, sample(ids), 1)  # the MTP layer has an indexer too
    loss, _ = indexer_loss(model, tape, sample(ids), sparse=sparse)
    loss.backward()
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    assert loss.item() > 0


@pytest.mark.parametrize("attention", ["dense", "masked"])
def test_the_other_losses_never_move_an_indexer(ids: Tensor, attention: Attention) -> None:
    model = build()
    output = run(model, ids, attention, Tape())
    targets = ids.roll(-1, 1).flatten()
    total = losses.cross_entropy(model, output.hidden, targets)[0] + losses.mtp(model, output, sample(ids), 2)[0]
    total.backward()
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is None or not parameter.grad.any(), name
        elif ".experts." not in name and name != "model.embed_tokens.weight":
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(("attention", "sparse"), [("dense", False), ("masked", True)])
def test_indexer_loss_is_the_mean_over_indexers_of_their_group(ids: Tensor, attention: Attention, sparse: bool) -> None:
    """FSFS: indexer 0 learns from layers 0 and 1, indexer 2 from 2 and 3, the MTP layer's from its own.

    In the sparse stage on the Selection that the group attends under.
    """
    model, tape = build(), Tape()
    output = run(model, ids, attention, tape)
    losses.mtp(model, output, sample(ids), 1)
    terms = []
    for first, layers in ((0, (0, 1)), (2, (2, 3)), (4, (4,))):
        teachers = [tape.attention[layer] for layer in layers]
        selection = tape.selections[first] if sparse else None
        total, count = losses.indexer_kl(tape.indexer[first], teachers, LENGTH, 32**-0.5, selection)
        terms.append(total.item() / count)
    assert sorted(tape.indexer) == [0, 2, 4]
    assert sorted(tape.attention) == [0, 1, 2, 3, 4]
    loss, count = indexer_loss(model, tape, sample(ids), sparse=sparse)
    assert loss.item() / count == pytest.approx(sum(terms) / 3, rel=1e-6)
    own = []
    for first in (0, 2, 4):
        selection = tape.selections[first] if sparse else None
        total, n = losses.indexer_kl(tape.indexer[first], [tape.attention[first]], LENGTH, 32**-0.5, selection)
        own.append(total.item() / n)
    loss, count = indexer_loss(model, tape, sample(ids), sparse=sparse, own=True)
    assert loss.item() / count == pytest.approx(sum(own) / 3, rel=1e-6) != pytest.approx(sum(terms) / 3, rel=1e-6)


# ------------------------------------------------------------------------------- packed sequences
def test_packed_sequences_are_as_if_alone(model: GLM) -> None:
    """Of unlike lengths, some tokens not learnt: each loss is the sum over the sequences alone, none looks across."""
    ids = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(2))
    targets = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(3))
    targets[[2, 3, 30]] = losses.IGNORE
    counts = (20, 1, 21, 18)

    def found(part: Sample) -> dict[str, tuple[float, int]]:
        tape = Tape()
        output = model(part.ids, part.batch, BatchStore(), attention="masked", tape=tape)
        values = {
            "mtp": losses.mtp(model, output, part, 2),
            "tv": losses.total_variation(model, output, part, 2),
            "rejection": losses.rejection(model, output, part, 2),
            "kl": indexer_loss(model, tape, part, sparse=True),
            "balance": losses.balance(tape.scores[2], tape.experts[2], part),
        }
        return {name: (float(total), n) for name, (total, n) in values.items()}

    with torch.no_grad():
        whole = found(Sample(ids, targets, counts))
        begins = [sum(counts[:i]) for i in range(4)]
        alone = [found(Sample(ids[b : b + n], targets[b : b + n], (n,))) for b, n in zip(begins, counts, strict=True)]
    for name, (total, count) in whole.items():
        assert count == sum(part[name][1] for part in alone), name
        assert total == pytest.approx(sum(part[name][0] for part in alone), rel=1e-4), name


# ------------------------------------------------------------------------------- balance
def test_balance_by_hand() -> None:
    """sum_i f_i P_i of each sequence, weighted by its length (DeepSeek-V3 2.1.2)."""
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 4, generator=g)
    ids = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(7)])
    total, count = losses.balance(scores, ids, Sample(torch.zeros(7).long(), torch.zeros(7).long(), (5, 2)))
    expected = 0.0
    for rows in (range(5), range(5, 7)):
        for i in range(4):
            f = 4 / (2 * len(rows)) * sum(i in ids[t].tolist() for t in rows)
            p = sum(float(scores[t, i] / scores[t].sum()) for t in rows) / len(rows)
            expected += len(rows) * f * p
    assert count == 7
    assert total.item() == pytest.approx(expected, rel=1e-5)
    even = torch.tensor([[0, 1], [2, 3]] * 4)
    value, n = losses.balance(torch.ones(8, 4), even, Sample(torch.zeros(8).long(), torch.zeros(8).long(), (8,)))
    assert value.item() / n == pytest.approx(1.0)


# ------------------------------------------------------------------------------- forms of attention
def test_absorbed_training_is_expanded_training() -> None:
    """Gathering what is selected and masking what is not: the same losses and gradients, MTP and indexers included.

    In fp64, 56 tokens under a k of 16; scores of the indexers are rounded to fp32 in both.
    """
    g = torch.Generator().manual_seed(4)
    ids, targets = torch.randint(0, 320, (2, 112), generator=g)
    part = Sample(ids, targets, (56, 40, 16))
    found = {}
    for attention in ("masked", "sparse"):
        model, tape = build().double(), Tape()
        output = model(part.ids, part.batch, BatchStore(), attention=attention, tape=tape)
        values = [losses.cross_entropy(model, output.hidden, part.targets), losses.mtp(model, output, part, 2)]
        values.append(indexer_loss(model, tape, part, sparse=True))
        torch.stack([total / count for total, count in values]).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[attention] = [total.item() for total, _ in values], gradients, dict(tape.selections)
    (losses_a, gradients_a, chosen_a), (losses_b, gradients_b, chosen_b) = found.values()
    assert all(torch.equal(chosen_b[layer], selection) for layer, selection in chosen_a.items())
    assert losses_b == pytest.approx(losses_a, rel=1e-9)
    assert gradients_b.keys() == gradients_a.keys()
    for name, gradient in gradients_a.items():
        torch.testing.assert_close(gradients_b[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


def test_gradcheck_of_sparse_attention() -> None:
    g = torch.Generator().manual_seed(0)
    batch = Batch.contiguous([7, 4])
    shapes = ((11, 2, 5), (11, 2, 3), (11, 5), (11, 3))
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    scores = torch.rand(11, 7, generator=g).masked_fill(torch.arange(7) > batch.positions[:, None], -1)
    best = scores.topk(3)
    selection = torch.where(best.values < 0, 99, best.indices).sort(-1).values
    selection = torch.where(selection == 99, -1, selection).int()
    assert (selection < 0).any()
    assert torch.autograd.gradcheck(lambda *x: ops.sparse_attention(*x, selection, batch, 0.7), tuple(inputs))
