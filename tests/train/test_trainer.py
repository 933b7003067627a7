"""The trainer: stages, rates, data order, who is moved when, and that it learns."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanoglm.api import Model, load
from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import ConfigError, InputError
from nanoglm.model import GLM, Attention, BatchStore, Tape
from nanoglm.ops import Batch
from nanoglm.train import data, trainer
from nanoglm.train.data import Tokens
from nanoglm.train.trainer import Recipe, balance, optimizers, read_text, shared_indexers, train, train_step, windows
from nanoglm.weights import SHARED_INDEXERS, Checkpoint

SENTENCE = (
    "It was a dark evening in November, and the lamps along the river had been lit an hour since. She walked "
    "quickly, and did not once look back at the house where she had been born, nor at the garden."
)
BYTES = np.frombuffer(SENTENCE.encode(), np.uint8).astype(np.uint16)
TEXT = Tokens.of(BYTES)
QUICK = Recipe(steps=4, batch=2, length=32, sparse_length=32, indexer_every=1)
ALWAYS = {"dense": {"dense": 1.0}, "warmup": {"dense": 0.0, "warmup": 1.0}, "sparse": {"dense": 0.0, "warmup": 0.0}}


def always(stage: str, **changes: object) -> Recipe:
    """QUICK with a single stage."""
    return Recipe(**(vars(QUICK) | ALWAYS[stage] | changes))


def build(seed: int = 0, **changes: object) -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(**changes)).initialise(seed)


def state(model: GLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: GLM) -> set[str]:
    """Names whose bits changed."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# ------------------------------------------------------------------------------- recipe
def test_stage_borders() -> None:
    recipe = Recipe(steps=64, dense=0.5, warmup=0.25)
    stages = [recipe.stage(step) for step in range(64)]
    assert stages == ["dense"] * 32 + ["warmup"] * 16 + ["sparse"] * 16


@pytest.mark.parametrize("stage", ALWAYS)
def test_a_stage_can_be_all_there_is(stage: str) -> None:
    recipe = always(stage, steps=7)
    assert {recipe.stage(step) for step in range(7)} == {stage}
    assert all(math.isfinite(rate) for step in range(7) for rate in recipe.rates(step))


def test_rates() -> None:
    recipe = Recipe(steps=1024, dense=0.5, warmup=0.25, rate=2.0, indexer_rate=7.0)
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


# ------------------------------------------------------------------------------- data
def test_windows_are_cut_from_the_text_and_repeat() -> None:
    text = Tokens.of(np.arange(1000, dtype=np.uint16))
    recipe = Recipe(steps=8, batch=4, length=16, sparse_length=64, dense=0.5, warmup=0.25)
    first, again = list(windows(text, recipe)), list(windows(text, recipe))
    other = list(windows(text, Recipe(**(vars(recipe) | {"seed": 1}))))
    assert [tuple(ids.shape) for ids in first] == [(4, 17)] * 6 + [(1, 65)] * 2  # the same tokens a step
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for ids in first:
        assert ids.dtype == torch.int64
        assert torch.equal(ids, ids[:, :1] + torch.arange(ids.shape[1]))  # runs of the text


def test_every_window_of_the_text_can_come() -> None:
    text = Tokens.of(np.arange(20, dtype=np.uint16))
    starts = {int(row[0]) for ids in windows(text, Recipe(steps=50, batch=8, length=16, dense=1.0)) for row in ids}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("tokens", [5, 16])
def test_a_text_without_a_window_is_refused(tokens: int) -> None:
    with pytest.raises(InputError, match=f"text holds {tokens} tokens; expected more than one window of 16"):
        next(windows(Tokens.of(np.zeros(tokens, np.uint16)), Recipe(length=16)))


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
    (adam,) = optimizers(model, Recipe())
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
def test_sparse_stage_moves_all_but_the_balance_bias(optimizer: str) -> None:
    model = build()
    before = state(model)
    train(model, TEXT, always("sparse", optimizer=optimizer))
    assert moved(before, model) == {n for n in before if not n.endswith("e_score_correction_bias")}


def test_late_drafts_learn_what_verification_accepts() -> None:
    model, ids = build(), next(windows(TEXT, QUICK))
    late = always("dense", late=0.0, late_drafts="total_variation")
    assert 0 < float(train_step(model, ids, late, 0)["mtp"]) < 1  # a share, no longer nats
    early = always("dense", late=1.0, late_drafts="total_variation")
    assert float(train_step(model, ids, early, 0)["mtp"]) > 4


def test_indexers_rest_between_their_steps_of_the_sparse_stage() -> None:
    model = build()
    recipe = always("sparse", indexer_every=3)
    ids = next(windows(TEXT, recipe))
    found = []
    for step in range(4):
        model.zero_grad()
        terms = train_step(model, ids, recipe, step)
        touched = any(p.grad is not None for n, p in model.named_parameters() if ".indexer." in n)
        assert touched == ("kl" in terms)
        found.append(touched)
    assert found == [True, False, False, True]


@pytest.mark.parametrize(("stage", "attention"), [("warmup", "dense"), ("sparse", "masked")])
def test_indexers_learn_on_all_positions_then_on_the_selected(stage: str, attention: Attention) -> None:
    model, recipe = build(initializer_range=0.15), always(stage)
    ids = next(windows(TEXT, recipe))
    found = train_step(model, ids, recipe, 0)["kl"]
    tape, inputs = Tape(), ids[:, :-1]
    output = model(inputs.flatten(), Batch.contiguous([32, 32]), BatchStore(), attention=attention, tape=tape)
    trainer.losses.mtp(model, output, inputs, 1)
    for sparse in (False, True) if stage == "sparse" else (False,):
        expected = trainer.indexer_loss(model, output, tape, 32, sparse=sparse)
        assert (found.item() == pytest.approx(expected.item(), rel=1e-4)) == (sparse == (stage == "sparse"))


def test_balance_bias_rests_late() -> None:
    model = build()
    recipe = always("dense", steps=10, late=0.5)
    ids = next(windows(TEXT, recipe))
    before = state(model)
    train_step(model, ids, recipe, 5)
    assert moved(before, model) == set()
    train_step(model, ids, recipe, 4)
    assert moved(before, model) == {n for n in before if n.endswith("e_score_correction_bias")}


@pytest.mark.parametrize(("step", "weight"), [(4, 0.3), (5, 0.1)])
def test_the_objective_is_its_terms_weighted(step: int, weight: float) -> None:
    """MTP weighs 0.3, late 0.1; the gradient on the head is that of loss + weight * mtp."""
    recipe = always("dense", steps=10, late=0.5)
    ids = next(windows(TEXT, recipe))
    gradients = []
    for mtp in (True, False):
        model = build(num_nextn_predict_layers=int(mtp))
        model.load_state_dict(build().state_dict(), strict=False)  # the same weights with and without
        terms = train_step(model, ids, recipe, step)
        assert terms.keys() == ({"loss", "mtp"} if mtp else {"loss"})
        gradients.append(model.lm_head.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None
    model, inputs = build(), ids[:, :-1]
    output = model(inputs.flatten(), Batch.contiguous([32, 32]), BatchStore(), attention="dense")
    total, count = trainer.losses.mtp(model, output, inputs, recipe.mtp_depths)
    (share,) = torch.autograd.grad(total / count, [model.lm_head.weight])
    torch.testing.assert_close(gradients[0] - gradients[1], weight * share, rtol=1e-3, atol=1e-6)


def test_gradients_of_an_objective_are_those_of_finite_steps() -> None:
    """Through masked attention and experts: the loss falls by |g|² times a small step along -g."""
    model = build(initializer_range=0.1)
    recipe = always("sparse", indexer_every=9)
    ids = next(windows(TEXT, recipe))
    objective = []
    for _ in range(2):
        terms = train_step(model, ids, recipe, 1)
        objective.append(float(terms["loss"]) + 0.3 * float(terms["mtp"]))
        slope = 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".gate.weight" not in name and parameter.grad is not None:  # a step there may flip a choice
                    slope += float(parameter.grad.square().sum())
                    parameter -= 2e-5 * parameter.grad
        if len(objective) == 1:
            expected = 2e-5 * slope
    assert objective[0] - objective[1] == pytest.approx(expected, rel=0.05)


# ------------------------------------------------------------------------------- balance
def test_balance_bias_moves_the_right_way() -> None:
    model = build()
    router = model.model.layers[2].mlp.gate  # 8 experts
    tape = Tape()
    tape.experts[2] = torch.tensor([[0, 1]] * 10 + [[2, 3]] * 5 + [[3, 4]] * 1)  # loads 10 10 5 6 1 0 0 0, mean 4
    balance(model, tape, 0.25)
    assert router.e_score_correction_bias.tolist() == [-0.25] * 4 + [0.25] * 4
    tape.experts[2] = torch.arange(8).repeat(3)[:, None]
    balance(model, tape, 0.25)  # even loads leave it alone
    assert router.e_score_correction_bias.tolist() == [-0.25] * 4 + [0.25] * 4
    assert not model.model.layers[1].mlp.gate.e_score_correction_bias.any()


def test_balance_evens_out_a_crooked_router() -> None:
    model = build()
    layer = model.model.layers[1]
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        layer.mlp.gate.weight[0] += 0.05  # everyone's favourite

    def heaviest() -> float:
        _, ids = layer.mlp(x)
        tape = Tape()
        tape.experts[1] = ids
        balance(model, tape, 0.01)
        return float(torch.bincount(ids.flatten(), minlength=8).max() / (ids.numel() / 8))

    loads = [heaviest() for _ in range(100)]
    assert loads[0] > 3  # of at most 4: each token chooses two different experts of eight
    assert max(loads[-5:]) < 1.5


def test_every_moe_layer_is_balanced_the_mtp_layer_too() -> None:
    model = build()
    train_step(model, next(windows(TEXT, QUICK)), always("dense"), 0)
    for layer in (1, 2, 3, 4):
        assert model.model.layers[layer].mlp.gate.e_score_correction_bias.any(), layer


# ------------------------------------------------------------------------------- learning
@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[GLM, list[dict[str, float]]]:
    """tiny after 200 steps on one sentence of 196 bytes, a few seconds on one core; and its log."""
    log = tmp_path_factory.mktemp("log") / "train.jsonl"
    model = build()
    recipe = Recipe(steps=200, batch=4, length=64, sparse_length=64, dense=0.7, warmup=0.1, rate=1e-2)
    train(model, TEXT, recipe, log)
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
    ids = torch.from_numpy(BYTES[:65].astype(np.int64))[None]

    def kl(of: GLM) -> float:
        return float(train_step(of, ids, always("warmup"), 0)["kl"])

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
        train(model, TEXT, Recipe(**(vars(QUICK) | {"dense": 0.5, "warmup": 0.25, "seed": seed})))
        states.append(model)
    assert moved(state(states[0]), states[1]) == set()
    assert moved(state(states[0]), states[2])


# ------------------------------------------------------------------------------- shared indexers, whole runs
def test_shared_indexers_are_for_the_shared_layers_and_move_nothing() -> None:
    model = build()
    before = state(model)
    extra = shared_indexers(model, TEXT, Recipe(**(vars(QUICK) | {"steps": 40})))
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
    trainer.run("tiny", TEXT, QUICK, tmp_path / "out")
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
    tokens, tokenizer = trainer.corpus(tmp_path / "data")
    trainer.run("tiny", tokens, QUICK, tmp_path / "out", tokenizer)
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
            trainer.run(preset, text, QUICK, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_overwrites_nothing(tmp_path: Path) -> None:
    """Neither an earlier model nor its indexers, which beside other weights would be a lie."""
    trainer.run("tiny", TEXT, QUICK, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert SHARED_INDEXERS in before
    with pytest.raises(InputError, match="not empty; expected a new directory"):
        trainer.run("tiny", TEXT, QUICK, tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
