"""Training on long-context tasks: what is drawn, at which positions, and that skipped positions are long sequences'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoglm.api import load
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch
from nanoglm.tasks import ASK, KEYS, VALUES
from nanoglm.train import objective
from nanoglm.train.data import IGNORE, Sample, Tokens
from nanoglm.train.recall import REACH, Recall, skipped
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse, tasks
from nanoglm.train.run import Corpus, run
from nanoglm.train.trainer import Keep, train

SENTENCE = "It was a dark evening in November, and the lamps along the river had been lit an hour since. " * 12
TEXT = Tokens.of(np.frombuffer(SENTENCE.encode(), np.uint8).astype(np.uint16))
SHAPE: dict[str, Any] = {"vocab_size": 2048, "initializer_range": 0.15}


def build(**changes: Any) -> GLM:
    return GLM(GLMConfig.preset("tiny", **(SHAPE | changes))).initialise(1)


# ------------------------------------------------------------------------------- positions
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(2, 600), share=st.floats(0, 1))
def test_positions_ascend_from_0_and_break_where_they_may(seed: int, length: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    whole = np.arange(length)[rng.random(length) < share]
    positions = skipped(length, rng, whole)
    steps = np.diff(positions)
    assert positions[0] == 0 and positions.dtype == np.int64 and len(positions) == length
    assert (steps >= 1).all() and positions[-1] < REACH
    assert (steps > 1).sum() < 8
    assert not set(1 + (steps > 1).nonzero()[0]) & set(whole.tolist())


def test_gaps_are_of_every_order_of_magnitude() -> None:
    rng = np.random.default_rng(0)
    steps = np.concatenate([np.diff(skipped(64, rng, np.empty(0, np.int64))) for _ in range(400)])
    counts = np.histogram(np.log10(steps[steps > 1]), [0.3, 1, 2, 3, 4, 5, 6.1])[0]
    assert (counts > 80).all(), counts


def test_skipped_positions_are_those_of_a_long_sequence() -> None:
    """Rows around a gap equal those of a sequence whose gap is filled with tokens that nobody selects."""
    model, k = build(num_nextn_predict_layers=0), 6
    g = torch.Generator().manual_seed(2)
    ids, gap, first, length = torch.randint(0, 2048, (24,), generator=g), 40, 10, 24
    chosen = torch.full((length, k), -1, dtype=torch.int32)
    for t in range(length):
        seen = torch.randperm(t + 1, generator=g)[:k].sort().values
        chosen[t, : len(seen)] = seen.int()
    rows = torch.cat([torch.arange(first), torch.arange(first + gap, length + gap)])
    sample = Sample(ids, ids, (length,), rows)
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        short = model(ids, sample.batch, BatchStore(), selections=[chosen] * layers).hidden
        full = torch.randint(0, 2048, (length + gap,), generator=g)
        full[rows] = ids
        moved = torch.full((length + gap, k), -1, dtype=torch.int32)
        moved[:, 0] = 0
        moved[rows] = torch.where(chosen < 0, -1, rows[chosen.clamp(min=0).long()].int())
        long = model(full, Batch.contiguous([length + gap]), BatchStore(), selections=[moved] * layers).hidden
        plain = model(ids, Sample(ids, ids, (length,)).batch, BatchStore(), selections=[chosen] * layers).hidden
    torch.testing.assert_close(short, long[rows], rtol=1e-4, atol=1e-5)
    assert (short[first:] - plain[first:]).abs().max() > 1e-2  # the gap is seen


def test_drafts_stand_behind_skipped_positions() -> None:
    """The MTP layer's later steps too: all positions moved alike change nothing, left where they were they would."""
    model, ids = build(), torch.randint(0, 2048, (20,), generator=torch.Generator().manual_seed(3))
    found = []
    for offset in (0, 777):
        sample = Sample(ids, ids, (20,), torch.arange(20) + offset)
        with torch.no_grad():
            output = model(ids, sample.batch, BatchStore())
            hidden, selection = model.draft(ids, output.hidden, output.step)
            found.append(model.draft(ids, hidden, output.step, depth=1, selection=selection)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_parts_of_a_sample_keep_their_positions() -> None:
    ids, positions = torch.arange(12), torch.arange(12) * 3
    sample = Sample(ids, ids + 1, (3, 4, 5), positions)
    assert [part.positions.tolist() for part in sample.split(7) if part.positions is not None] == [
        positions[:7].tolist(), positions[7:].tolist(),
    ]  # fmt: skip
    part = sample.part(1, 3)
    assert part.counts == (4, 5) and part.ids.tolist() == list(range(3, 12)) and part.targets[0] == 4
    batch, rows = sample.batch.tail([1, 0, 2])
    assert batch.turns.tolist() == positions[rows].tolist() == [6, 30, 33]
    assert sample.to("cpu").positions is not None


# ------------------------------------------------------------------------------- a stage's k
def test_a_pass_may_select_another_number() -> None:
    ids = torch.randint(0, 2048, (40,), generator=torch.Generator().manual_seed(4))
    batch = Batch.contiguous([40])
    with torch.no_grad():
        asked = build()(ids, batch, BatchStore(), topk=5)
        given = build(index_topk=5)(ids, batch, BatchStore())
    assert asked.selections[0] is not None and asked.selections[0].shape == (40, 5)
    assert torch.equal(asked.hidden, given.hidden)


def test_a_stage_chooses_k_and_what_indexers_learn_over() -> None:
    """``visible``: the KL of dense attention's keys although the pass attends to few."""
    recipe = Recipe("tiny", steps=1, tokens=32, stages=tasks(sparse(1.0, 32, 1), topk=4), balance_weight=0.0)
    model, sample = build(), Recall(TEXT).take(32, 1)
    found, tape = objective.terms(model, sample, recipe, 0)
    assert tape.selections[0].shape == (32, 4)
    expected, count = objective.indexer_loss(model, tape, sample, sparse=False)
    torch.testing.assert_close(found["kl"][0], expected)
    (stage,) = recipe.stages
    narrow = replace(recipe, stages=(replace(stage, kl_of="selected"),))
    again = objective.terms(model, sample, narrow, 0)[0]["kl"][0]
    torch.testing.assert_close(again, objective.indexer_loss(model, tape, sample, sparse=True)[0])
    assert expected.item() / count != pytest.approx(again.item() / count, rel=1e-2)


def test_stages_on_tasks() -> None:
    stages = tasks(dense(0.5, 16), sparse(0.5, 32), topk=8)
    assert [(s.name, s.length, s.data, s.topk, s.kl_of) for s in stages] == [
        ("dense", 16, "recall", 8, "visible"), ("sparse", 32, "recall", 8, "visible"),
    ]  # fmt: skip
    assert Recipe(stages=stages).reads("recall") and not Recipe(stages=stages).reads("text")
    with pytest.raises(InputError, match="stage dense has topk 0"):
        Recipe(stages=tasks(dense(1.0, 16), topk=0))


# ------------------------------------------------------------------------------- samples
def test_short_sequences_are_pairs_and_questions() -> None:
    sample = Recall(TEXT).take(16, 30)
    assert sample.counts == (16,) * 30
    text = [not (ids == ASK).any() for ids in sample.ids.split(16)]
    assert 0 < sum(text) < 10
    for ids, targets in zip(sample.ids.split(16), sample.targets.split(16), strict=True):
        if ASK not in ids:
            continue
        assert all(i in KEYS for i in ids[0:4:2]) and all(i in VALUES for i in ids[1:4:2]) and ids[4] == ASK
        stated = dict(zip(ids[0:4:2].tolist(), ids[1:4:2].tolist(), strict=True))
        assert targets[5::2].tolist() == [stated[key] for key in ids[5::2].tolist()]
        assert targets[1:4].tolist() == ids[:3].tolist()  # before the bar, the token before
        assert targets[0] == targets[4] == IGNORE and (targets != IGNORE).sum() == 6 + 3


def test_long_ones_are_a_mix() -> None:
    sample = Recall(TEXT).take(256, 60)
    kinds = set()
    for ids, targets, positions in zip(
        sample.ids.split(256), sample.targets.split(256), sample.positions.split(256), strict=True
    ):  # fmt: skip
        if ASK not in ids:
            assert bytes(ids.tolist()).decode() in SENTENCE and torch.equal(targets[:-1], ids[1:])
            kinds.add("text")
            continue
        bar = ids.tolist().index(ASK)
        keys = sum(i in KEYS for i in ids[:bar].tolist())
        kinds.add("needle" if (ids[:bar] < 256).any() else "multikey" if keys > 0.49 * bar else "recall")
        learnt = (targets != IGNORE).sum()
        assert 256 // 64 <= learnt <= 256 // 8
        haystack = ids[:bar].tolist()
        for row in (targets != IGNORE).nonzero()[:, 0].tolist():  # the answer stands right behind its key
            place = haystack.index(int(ids[row]))
            assert haystack[place + 1] == targets[row] and positions[place + 1] == positions[place] + 1
    assert kinds == {"text", "needle", "multikey", "recall"}


@pytest.mark.parametrize("length", [34, 64, 128, 512])
def test_chains_are_asked_for_where_each_link_stands(length: int) -> None:
    """Every link's row asks for the value at the chain's end, and so does every question, once."""
    sample, hops = Recall(TEXT, skip=False, hops=1.0).take(length, 20), set()
    for ids, targets in zip(sample.ids.view(20, -1).tolist(), sample.targets.view(20, -1).tolist(), strict=True):
        bar, leads = ids.index(ASK), dict[int, int]()
        for row in range(1, bar):
            if ids[row - 1] in KEYS and ids[row - 1] not in leads:
                leads[ids[row - 1]] = ids[row]
                if ids[row] in KEYS:
                    assert targets[row] == end(leads, ids[row])[0]
        asked = ids[bar + 1 :: 2]
        assert asked and len(asked) == len(set(asked)) and set(asked) <= set(leads)
        for row in range(bar + 1, length, 2):
            value, count = end(leads, ids[row])
            assert targets[row] == value and value in VALUES
            hops.add(count)
    assert hops == ({1, 2, 3, 4} if length < 128 else {2, 3, 4})


def end(leads: dict[int, int], key: int) -> tuple[int, int]:
    """The value to which a key leads, over how many statements."""
    count = 1
    while (key := leads[key]) in KEYS:
        count += 1
    return key, count


def test_hops_are_a_share_and_change_nothing_else() -> None:
    plain, mixed = Recall(TEXT, 3), Recall(TEXT, 3, hops=0.5)
    assert sum(mixed.mix.values()) == pytest.approx(1) and mixed.mix["multihop"] == 0.5
    assert mixed.mix["recall"] == pytest.approx(plain.mix["recall"] / 2) and "multihop" not in plain.mix
    assert torch.equal(plain.take(64, 9).ids, Recall(TEXT, 3, hops=0.0).take(64, 9).ids)
    with pytest.raises(InputError, match="hops is 1.5"):
        Recipe(hops=1.5)


@pytest.mark.parametrize("length", [16, 256])
def test_positions_that_are_not_skipped(length: int) -> None:
    """A control: every row stands where it is."""
    plain, skipping = Recall(TEXT, skip=False).take(length, 40), Recall(TEXT).take(length, 40)
    assert plain.positions is not None and skipping.positions is not None
    assert torch.equal(plain.positions, torch.arange(length).repeat(40))
    assert (skipping.positions >= plain.positions).all() and (skipping.positions > plain.positions).any()


def test_a_source_goes_on_from_its_state() -> None:
    source, again, other = Recall(TEXT, 5), Recall(TEXT, 5), Recall(TEXT, 6)
    source.take(16, 2)
    again.load_state_dict(source.state_dict())
    a, b, c = source.take(64, 4), again.take(64, 4), other.take(64, 4)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.positions, b.positions)
    assert not torch.equal(a.ids, c.ids)


@pytest.mark.parametrize("length", [6, 17])
def test_a_length_that_is_none(length: int) -> None:
    with pytest.raises(InputError, match=f"length is {length}; expected an even number"):
        Recall(TEXT).take(length, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (Tokens.of(np.zeros(63, np.uint16)), "text holds 63 tokens; expected at least"),
        (Tokens.of(np.full(999, 292, np.uint16)), "text holds id 292; expected bytes"),
    ],
)
def test_a_text_that_is_none(text: Tokens, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Recall(text).take(64, 60)


# ------------------------------------------------------------------------------- runs
def test_pairs_are_learnt(tmp_path: Any) -> None:
    """Two pairs of few keys' worth of steps: the loss falls below guessing among all values, ln 864 = 6.8."""
    recipe = Recipe("tiny", steps=60, tokens=512, optimizer="muon", rate=1e-2, warmup=5, stages=tasks(dense(1.0, 8)))
    model = build(initializer_range=0.04, num_nextn_predict_layers=0, tie_word_embeddings=True)
    log = tmp_path / "log.jsonl"
    train(model, {"recall": Recall(TEXT)}, recipe, Keep(log=log, log_every=59, quiet=True))
    first, last = (float(line.split('"loss": ')[1].split(",")[0]) for line in log.read_text().splitlines())
    assert first > 7.4 and last < 6.5


def test_a_run_on_tasks_leaves_a_model_without_tokenizer(tmp_path: Any) -> None:
    stages = tasks(dense(0.4, 16), indexer_warmup(0.2, 64), sparse(0.4, 64, 1), topk=8)
    recipe = Recipe("tiny", steps=5, tokens=64, stages=stages, shared=0.5)
    run(Corpus(byte_tokenizer(), TEXT, TEXT), recipe, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "train.jsonl",
    ]  # fmt: skip
    model = load(tmp_path / "out")
    assert model.config.vocab_size == 2048
    assert abs(float(model.module.model.embed_tokens.weight.mean()) - 0.5) < 0.05


def test_attention_is_sharpened_at_the_end(tmp_path: Any) -> None:
    """By queries of twice the size and by nothing else."""
    found = []
    for factor in (1.0, 2.0):
        recipe = Recipe("tiny", steps=1, tokens=64, stages=tasks(dense(1.0, 16)), sharpen=factor)
        run(Corpus(byte_tokenizer(), TEXT), recipe, tmp_path / str(factor))
        found.append(load(tmp_path / str(factor)).module.state_dict())
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value * (2 if name.endswith("q_b_proj.weight") else 1)), name
    with pytest.raises(InputError, match="sharpen is 0; expected more than 0"):
        Recipe(sharpen=0)


def test_a_shared_direction_is_of_embeddings_alone() -> None:
    config = GLMConfig.preset("tiny")
    plain, begun = (GLM(config).initialise(3, shared).state_dict() for shared in (0.0, 0.25))
    for name, value in plain.items():
        more = 0.25 if name == "model.embed_tokens.weight" else 0.0
        torch.testing.assert_close(begun[name], value + more, rtol=0, atol=1e-6)
