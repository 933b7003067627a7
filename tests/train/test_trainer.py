"""The trainer: stages, rates, data order, who is moved when, and that it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanoglm.api import Model, load
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import ConfigError, InputError
from nanoglm.model import GLM, Attention, BatchStore, Tape
from nanoglm.train import data, losses, objective
from nanoglm.train.data import Sample, Tokens, Windows
from nanoglm.train.objective import backward, balance
from nanoglm.train.recipe import Drafts, Recipe, dense, indexer_warmup, long, sparse
from nanoglm.train.run import Corpus, corpus, read_text, run
from nanoglm.train.trainer import Keep, optimizers, shared_indexers, train
from nanoglm.weights import SHARED_INDEXERS, Checkpoint

SENTENCE = (
    "It was a dark evening in November, and the lamps along the river had been lit an hour since. She walked "
    "quickly, and did not once look back at the house where she had been born, nor at the garden."
)
BYTES = np.frombuffer(SENTENCE.encode(), np.uint8).astype(np.uint16)
TEXT = Tokens.of(BYTES)
CORPUS = Corpus(byte_tokenizer(), TEXT)
STAGES = (dense(0.75, 32), indexer_warmup(0.07, 32), sparse(0.18, 32, 1))
QUICK = Recipe("tiny", steps=4, tokens=64, stages=STAGES, balance_weight=0.0)
ALWAYS = {"dense": dense(1.0, 32), "warmup": indexer_warmup(1.0, 32), "sparse": sparse(1.0, 32, 1)}


def always(stage: str, **changes: Any) -> Recipe:
    """QUICK with a single stage."""
    return replace(QUICK, stages=(ALWAYS[stage],), **changes)


def draw(recipe: Recipe = QUICK, seed: int = 0) -> Sample:
    """The first step's."""
    length = recipe.stages[0].length
    return Windows(TEXT, seed).take(length, recipe.tokens // length)


def build(seed: int = 0, **changes: object) -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(**changes)).initialise(seed)


def state(model: GLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: GLM) -> set[str]:
    """Names whose bits changed."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# ------------------------------------------------------------------------------- recipe
def test_stage_borders() -> None:
    recipe = Recipe(steps=64, stages=(dense(0.5), indexer_warmup(0.25), sparse(0.25)))
    stages = [recipe.stage(step).name for step in range(64)]
    assert stages == ["dense"] * 32 + ["indexer_warmup"] * 16 + ["sparse"] * 16


@pytest.mark.parametrize("stage", ALWAYS)
def test_a_stage_can_be_all_there_is(stage: str) -> None:
    recipe = always(stage, steps=7)
    assert {recipe.stage(step) for step in range(7)} == {ALWAYS[stage]}
    assert all(math.isfinite(rate) for step in range(7) for rate in recipe.rates(step))


def test_rates() -> None:
    stages = (dense(0.5), indexer_warmup(0.25), sparse(0.25))
    recipe = Recipe(steps=1024, stages=stages, rate=2.0, indexer_rate=7.0)
    backbone = [recipe.rates(step)[0] for step in range(1024)]
    assert backbone[0] == pytest.approx(2.0 / 50)  # 50 steps up
    assert backbone[24] == pytest.approx(2.0 * 25 / 50, rel=5e-3)
    assert max(backbone) == backbone[49] and backbone[49] == pytest.approx(2.0, rel=2e-2)
    assert backbone[512:768] == [0.0] * 256  # the backbone rests while the indexers warm up
    assert [recipe.rates(step)[1] for step in range(512, 768)] == [7.0] * 256
    active = backbone[49:512] + backbone[768:]
    assert all(a > b for a, b in pairwise(active))  # down, with no jump across the pause
    assert max(a - b for a, b in pairwise(active)) < 0.01
    assert active[-1] == pytest.approx(0.1 * 2.0, rel=1e-2)
    assert recipe.rates(900)[0] == recipe.rates(900)[1]  # one rate for both afterwards


def test_a_stage_sets_the_rotation_for_those_behind_it() -> None:
    stages = (dense(0.5, 32), long(0.25, 64, rope_theta=1e6), sparse(0.25, 32))
    recipe = Recipe("tiny", steps=4, tokens=64, stages=stages)
    assert [recipe.rope_theta(step) for step in range(4)] == [None, None, 1e6, 1e6]
    model = build()
    train(model, TEXT, replace(recipe, steps=2, stages=(dense(0.5, 32), long(0.5, 64, rope_theta=123.0))))
    assert model.config.rope_theta == 123.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"stages": (dense(0.5),)}, "shares of the stages are 0.5 together; expected 1"),
        ({"tokens": 100}, r"stage dense has share 0.75 and length 32; expected .* divides tokens \(100\)"),
        ({"stages": (dense(-1.0), dense(2.0))}, "stage dense has share -1"),
        ({"warmup": 0}, "warmup is 0; expected at least 1"),
        ({"mtp_depths": 0}, "mtp_depths is 0; expected at least 1"),
        ({"pass_tokens": 0}, "pass_tokens is 0; expected at least 1"),
        (
            {"stages": (replace(indexer_warmup(1.0, 32), indexer_every=2),)},
            "stage indexer_warmup has indexer_every 2; expected .* 1 where the backbone rests",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(QUICK, **changes)


# ------------------------------------------------------------------------------- data
@pytest.mark.parametrize("tokens", [5, 16])
def test_a_text_without_a_window_is_refused(tokens: int) -> None:
    with pytest.raises(InputError, match=f"text holds {tokens} tokens; expected more than one window of 16"):
        Windows(Tokens.of(np.zeros(tokens, np.uint16))).take(16, 1)


def test_read_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("é", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffone", encoding="utf-8")  # a byte order mark is no text
    (tmp_path / "notes.md").write_text("no")
    ids = read_text(tmp_path)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [*b"one", 256, *"é".encode(), 256]
    assert read_text(tmp_path / "notes.md").tolist() == [*b"no", 256]  # a file named is a file meant
    for path, words in ((tmp_path / "none", "cannot be read"), (tmp_path / "b" / "x", "cannot be read")):
        with pytest.raises(InputError, match=words):
            read_text(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.txt file"):
        read_text(tmp_path / "empty")


# ------------------------------------------------------------------------------- optimiser
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    (adam,) = optimizers(model, Recipe(optimizer="adamw"))
    grouped = [id(p) for group in adam.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    matrices, others, indexers = ([names[id(p)] for p in group["params"]] for group in adam.param_groups)
    assert {n for n in names.values() if ".indexer." in n} == set(indexers)
    assert all(n.endswith("norm.weight") for n in others)  # no decay on norms
    assert "model.layers.1.mlp.experts.gate_up_proj" in matrices and "model.layers.4.eh_proj.weight" in matrices
    assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.0, 0.0]
    movers = optimizers(model, Recipe(optimizer="muon"))
    shared = [id(p) for mover in movers for group in mover.param_groups for p in group["params"]]
    assert sorted(shared) == sorted(grouped)
    assert {names[id(p)] for p in movers[0].param_groups[0]["params"]} == {
        n for n in matrices if n.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))
    }


# ------------------------------------------------------------------------------- who moves when
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_warmup_leaves_the_backbone_bit_for_bit(optimizer: str) -> None:
    model = build()
    before = state(model)
    train(model, TEXT, always("warmup", optimizer=optimizer))
    assert moved(before, model) == {n for n in before if ".indexer." in n}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_dense_stage_leaves_the_indexers_bit_for_bit(optimizer: str) -> None:
    model = build()
    before = state(model)
    train(model, TEXT, always("dense", optimizer=optimizer))
    assert moved(before, model) == {n for n in before if ".indexer." not in n}  # the router bias included


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sparse_stage_moves_all_and_late_not_the_balance_bias(optimizer: str) -> None:
    model = build()
    before = state(model)
    train(model, TEXT, always("sparse", optimizer=optimizer))
    assert moved(before, model) == before.keys()
    before = state(model)
    train(model, TEXT, always("sparse", optimizer=optimizer, late=0.0))
    assert moved(before, model) == {n for n in before if not n.endswith("e_score_correction_bias")}


def test_late_drafts_learn_what_verification_accepts() -> None:
    model, sample = build(), draw()
    late = always("dense", late=0.0, late_drafts="total_variation")
    assert 0 < float(backward(model, sample, late, 0).means["mtp"]) < 1  # a share, no longer nats
    early = always("dense", late=1.0, late_drafts="total_variation")
    assert float(backward(model, sample, early, 0).means["mtp"]) > 4
    likely = always("dense", late=0.0)
    reached = replace(likely, late_drafts="rejection")  # as likely, but for the second depth, which weighs less
    means = [float(backward(model, sample, recipe, 0).means["mtp"]) for recipe in (likely, reached)]
    assert 0.5 * means[0] < means[1] < means[0]


def test_indexers_rest_between_their_steps_of_the_sparse_stage() -> None:
    model = build()
    recipe = replace(QUICK, stages=(sparse(1.0, 32, indexer_every=3),))
    found = []
    for step in range(4):
        model.zero_grad()
        terms = backward(model, draw(), recipe, step).means
        touched = any(p.grad is not None for n, p in model.named_parameters() if ".indexer." in n)
        assert touched == ("kl" in terms)
        found.append(touched)
    assert found == [True, False, False, True]


@pytest.mark.parametrize(("stage", "attention"), [("warmup", "dense"), ("sparse", "masked")])
def test_indexers_learn_on_all_positions_then_on_the_selected(stage: str, attention: Attention) -> None:
    model, recipe = build(initializer_range=0.15), always(stage)
    sample = draw(recipe)
    found = backward(model, sample, recipe, 0).means["kl"]
    tape = Tape()
    output = model(sample.ids, sample.batch, BatchStore(), attention=attention, tape=tape)
    losses.mtp(model, output, sample, 1)
    for chosen in (False, True) if stage == "sparse" else (False,):
        total, count = objective.indexer_loss(model, tape, sample, sparse=chosen)
        assert (found.item() == pytest.approx(total.item() / count, rel=1e-4)) == (chosen == (stage == "sparse"))


def test_balance_bias_rests_late() -> None:
    for late, moves in ((0.0, False), (1.0, True)):
        model = build()
        before = state(model)
        train(model, TEXT, always("dense", steps=1, late=late))
        assert any(n.endswith("e_score_correction_bias") for n in moved(before, model)) == moves


@pytest.mark.parametrize(("step", "weight"), [(4, 0.3), (5, 0.1)])
def test_the_objective_is_its_terms_weighted(step: int, weight: float) -> None:
    """MTP weighs 0.3, late 0.1; the gradient on the head is that of loss + weight * mtp."""
    recipe = always("dense", steps=10, late=0.5)
    sample = draw(recipe)
    gradients = []
    for mtp in (True, False):
        model = build(num_nextn_predict_layers=int(mtp))
        model.load_state_dict(build().state_dict(), strict=False)  # the same weights with and without
        terms = backward(model, sample, recipe, step).means
        assert terms.keys() == ({"loss", "mtp"} if mtp else {"loss"})
        gradients.append(model.lm_head.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None
    model = build()
    output = model(sample.ids, sample.batch, BatchStore(), attention="dense")
    total, count = losses.mtp(model, output, sample, recipe.mtp_depths)
    (share,) = torch.autograd.grad(total / count, [model.lm_head.weight])
    torch.testing.assert_close(gradients[0] - gradients[1], weight * share, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "drafts"),
    [*((stage, "likelihood") for stage in ALWAYS), ("sparse", "rejection"), ("sparse", "total_variation")],
)
def test_parts_of_a_step_add_exactly(stage: str, drafts: Drafts) -> None:
    """Accumulated over sequences of unlike lengths, with tokens that are not learnt: the gradients of the whole."""
    recipe = always(stage, balance_weight=0.1, late=0.0, late_drafts=drafts)
    ids = torch.from_numpy(BYTES[:97].astype(np.int64))
    targets = ids[1:].clone()
    targets[torch.tensor([3, 4, 5, 40, 60, 61])] = data.IGNORE
    sample = Sample(ids[:-1], targets, (17, 30, 30, 19))
    found = []
    for size in (None, 1, 60):
        model = build(initializer_range=0.15).double()
        done = backward(model, sample, replace(recipe, pass_tokens=size), 0)
        found.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, done))
    (whole, done), *others = found
    for parts, again in others:
        assert parts.keys() == whole.keys()
        assert all(torch.equal(again.loads[layer], load) for layer, load in done.loads.items())
        for name, mean in done.means.items():
            torch.testing.assert_close(again.means[name], mean, rtol=1e-6, atol=1e-8)  # losses are fp32
        for name, grad in whole.items():
            torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("depths", [1, 3])
def test_counts_are_foretold(depths: int) -> None:
    ids = torch.from_numpy(BYTES[:65].astype(np.int64))
    targets = ids[1:].clone()
    targets[torch.tensor([3, 4, 5, 40])] = data.IGNORE
    sample = Sample(ids[:-1], targets, (17, 1, 30, 16))
    recipe = replace(QUICK, stages=(sparse(1.0, 32, 1),), mtp_depths=depths, balance_weight=0.1, late=0.5)
    model, mtp = build(), dict[str, int]()
    for drafts in losses.DRAFTS:
        late = replace(recipe, late_drafts=drafts)
        for step in (0, 3):
            expected = losses.counts(sample, depths, drafts if step == 3 else "likelihood")
            found = objective.terms(model, sample, late, step)[0]
            assert {name: count for name, (_, count) in found.items()} == expected
        mtp[drafts] = expected["mtp"]
    assert len(set(mtp.values())) == (3 if depths > 1 else 1)


def test_gradients_of_an_objective_are_those_of_finite_steps() -> None:
    """Through masked attention and experts: the loss falls by |g|² times a small step along -g."""
    model = build(initializer_range=0.1)
    recipe = replace(QUICK, stages=(sparse(1.0, 32, indexer_every=9),))
    values = []
    for _ in range(2):
        model.zero_grad()
        terms = backward(model, draw(), recipe, 1).means
        values.append(float(terms["loss"]) + 0.3 * float(terms["mtp"]))
        slope = 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".gate.weight" not in name and parameter.grad is not None:  # a step there may flip a choice
                    slope += float(parameter.grad.square().sum())
                    parameter -= 2e-5 * parameter.grad
        if len(values) == 1:
            expected = 2e-5 * slope
    assert values[0] - values[1] == pytest.approx(expected, rel=0.05)


# ------------------------------------------------------------------------------- balance
def test_balance_bias_moves_the_right_way() -> None:
    model = build()
    router = model.model.layers[2].mlp.gate  # 8 experts
    balance(model, {2: torch.tensor([10, 10, 5, 6, 1, 0, 0, 0])}, 0.25)  # mean 4
    assert router.e_score_correction_bias.tolist() == [-0.25] * 4 + [0.25] * 4
    balance(model, {2: torch.full((8,), 3)}, 0.25)  # even loads leave it alone
    assert router.e_score_correction_bias.tolist() == [-0.25] * 4 + [0.25] * 4
    assert not model.model.layers[1].mlp.gate.e_score_correction_bias.any()


def test_balance_evens_out_a_crooked_router() -> None:
    model = build()
    layer = model.model.layers[1]
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        layer.mlp.gate.weight[0] += 0.05  # everyone's favourite

    def heaviest() -> float:
        load = torch.bincount(layer.mlp(x)[1].flatten(), minlength=8)
        balance(model, {1: load}, 0.01)
        return float(load.max() / load.float().mean())

    loads = [heaviest() for _ in range(100)]
    assert loads[0] > 3  # of at most 4: each token chooses two different experts of eight
    assert max(loads[-5:]) < 1.5


def test_every_moe_layer_is_balanced_the_mtp_layer_too() -> None:
    model = build()
    train(model, TEXT, always("dense", steps=1))
    for layer in (1, 2, 3, 4):
        assert model.model.layers[layer].mlp.gate.e_score_correction_bias.any(), layer


# ------------------------------------------------------------------------------- learning
@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[GLM, list[dict[str, float]]]:
    """tiny after 200 steps on one sentence of 196 bytes, a few seconds on one core; and its log."""
    log = tmp_path_factory.mktemp("log") / "train.jsonl"
    model = build()
    stages = (dense(0.7, 64), indexer_warmup(0.1, 64), sparse(0.2, 64))
    train(model, TEXT, Recipe("tiny", steps=200, tokens=256, stages=stages, rate=1e-2), Keep(log))
    return model, [json.loads(line) for line in log.read_text().splitlines()]


def test_tiny_learns_a_sentence_by_heart(overfitted: tuple[GLM, list[dict[str, float]]]) -> None:
    """From ln 320 = 5.77 nats through all three stages to below 0.3, with 16 of 64 positions attended to."""
    model, log = overfitted
    assert [line["step"] for line in log] == [*range(0, 200, 20), 199]
    assert log[0]["loss"] == pytest.approx(math.log(320), abs=0.3)
    assert log[-1]["stage"] == "sparse"
    assert log[-1]["loss"] < 0.3 and log[-1]["mtp"] < 0.3
    windows_ = [BYTES[i : i + 64].tolist() for i in range(0, 128, 16)]
    right = total = 0
    for ids, logits in zip(windows_, Model(model, None).logits(windows_), strict=True):
        right += int((logits[8:-1].argmax(-1) == torch.tensor(ids[9:])).sum())
        total += len(ids) - 9
    assert right / total > 0.95  # inference attends sparsely, as the last stage did


def test_indexers_learn_where_attention_looks(overfitted: tuple[GLM, list[dict[str, float]]]) -> None:
    """The warmed-up indexers' KL against the model's attention is far below that of random ones."""
    model, _ = overfitted
    sample = Sample.of(torch.from_numpy(BYTES[:65].astype(np.int64))[None])

    def kl(of: GLM) -> float:
        return float(backward(of, sample, always("warmup"), 0).means["kl"])

    fresh = GLM(model.config)
    fresh.load_state_dict(model.state_dict())
    random = build(seed=7)
    indexers = {n: t for n, t in random.state_dict().items() if ".indexer." in n}
    fresh.load_state_dict(indexers, strict=False)
    assert kl(model) < 0.7 * kl(fresh)


def test_training_is_repeatable() -> None:
    states = []
    for seed in (0, 0, 1):
        model = build()
        train(model, TEXT, replace(QUICK, seed=seed))
        states.append(model)
    assert moved(state(states[0]), states[1]) == set()
    assert moved(state(states[0]), states[2])


# ------------------------------------------------------------------------------- shared indexers, whole runs
def test_shared_indexers_are_for_the_shared_layers_and_move_nothing() -> None:
    model = build()
    before = state(model)
    extra = shared_indexers(model, TEXT, replace(QUICK, steps=40))
    assert moved(before, model) == set()
    names = {name.split(".indexer.")[0] for name in extra}
    assert names == {"model.layers.1.self_attn", "model.layers.3.self_attn"}
    assert all(tensor.dtype == torch.bfloat16 for tensor in extra.values())
    for name, tensor in extra.items():  # they began as their source's copy and went on to learn
        source = before[name.replace(".1.", ".0.", 1).replace(".3.", ".2.", 1)]
        assert tensor.shape == source.shape
        if name.endswith("wq_b.weight"):
            assert not torch.equal(tensor, source.bfloat16())
            assert float((tensor - source).abs().max()) < 0.1


def test_an_all_full_model_needs_no_shared_indexers() -> None:
    assert shared_indexers(build(indexer_types=(FULL,) * 4), TEXT, QUICK) == {}


def test_run_writes_what_load_reads(tmp_path: Path) -> None:
    run(CORPUS, QUICK, tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.tokenizer.encode("é") == [0xC3, 0xA9]
    assert model.module.lm_head.weight.bfloat16().float().equal(model.module.lm_head.weight)
    full, _ = Checkpoint(tmp_path / "out", all_full=True).load()
    indexers = load_file(tmp_path / "out" / SHARED_INDEXERS)
    for name, parameter in full.named_parameters():
        if name in indexers:
            assert torch.equal(parameter, indexers[name].float())


def test_run_on_a_dataset_takes_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SENTENCE)
    data.write([tmp_path / "a.txt"], tmp_path / "data", tokenizer="bpe:300")
    found = corpus(tmp_path / "data")
    tokens = found.text
    run(found, QUICK, tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.config.vocab_size == model.tokenizer.vocab_size == 300
    ids = tokens.read(0, 20).tolist()
    assert SENTENCE.startswith(model.tokenizer.decode(ids)) and len(model.tokenizer.decode(ids)) > 20


def test_run_refuses_before_it_writes(tmp_path: Path) -> None:
    for preset, text, kind, words in (
        ("recall", TEXT, InputError, "recall has vocabulary 2048"),
        ("huge", TEXT, ConfigError, "'huge' is unknown"),
        ("tiny", Tokens.of(BYTES[:32]), InputError, "text holds 32 tokens"),
    ):
        with pytest.raises(kind, match=words):
            run(Corpus(byte_tokenizer(), text), replace(QUICK, preset=preset), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_overwrites_nothing(tmp_path: Path) -> None:
    """Neither an earlier model nor its indexers, which beside other weights would be a lie."""
    run(CORPUS, QUICK, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert SHARED_INDEXERS in before
    with pytest.raises(InputError, match="not empty; expected a new directory"):
        run(CORPUS, QUICK, tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
