"""The recipes: each is one, and the effects table says what its runs found."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from runpy import run_path

import pytest
import torch

from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.model import GLM, BatchStore
from nanoglm.train import losses
from nanoglm.train.data import Sample, Windows
from nanoglm.train.recipe import Recipe, sparse
from nanoglm.train.run import Corpus, config_of, corpus

FOLDER = Path(__file__).parents[1] / "recipes"
EFFECTS = run_path(str(FOLDER / "effects.py"))
LADDER = run_path(str(FOLDER / "mtp_ladder.py"))
SENTENCE = "It was a dark evening in November, and the lamps had been lit an hour. "


@pytest.mark.parametrize("name", ["nano", "recall", "shakespeare", "sft"])
def test_a_recipe_is_one(name: str) -> None:
    recipe = run_path(str(FOLDER / f"{name}.py"))["recipe"]()
    assert isinstance(recipe, Recipe)
    config_of(recipe, byte_tokenizer())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no function recipe"),
        ("def recipe():\n    return 3\n", "has no function recipe"),
        ("(", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "r.py").write_text(text)
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "r.py"), "--out", str(tmp_path / "out")])
    assert words in capsys.readouterr().err


def test_variants_begin_alike() -> None:
    """What a variant shares with the base model has its values, wherever random numbers are drawn for more or less."""
    config = GLMConfig.preset("tiny")
    base = EFFECTS["begin"](config, lambda c: c, 3).state_dict()
    for name in ("all-Full", "no MTP", "transformer"):
        variant = EFFECTS["begin"](config, EFFECTS["VARIANTS"][name][1], 3).state_dict()
        same = [n for n, value in variant.items() if n in base and base[n].shape == value.shape]
        assert "lm_head.weight" in same and "model.layers.1.self_attn.o_proj.weight" in same
        assert all(torch.equal(variant[n], base[n]) for n in same)


def test_the_effects_table() -> None:
    """Two seeds, paired by seed; a variant without runs has no row."""
    stages = ("dense", "indexer_warmup", "sparse")
    base = {
        seed: {"at": {name: {"val_dense": 2.0 + seed, "val_sparse": 2.5 + seed + i} for i, name in enumerate(stages)}}
        for seed in (0, 1)
    }
    full = {1: {"at": {name: {"val_dense": 3.0, "val_sparse": 5.25} for name in stages}}}
    rows = {(effect, measure): values for effect, measure, values in EFFECTS["rows"]({"base": base, "all-Full": full})}
    assert rows["warm-up", "sparse - dense loss with random indexers"] == {0: 0.5, 1: 0.5}
    assert rows["", "the same after the warm-up"] == {0: 1.5, 1: 1.5}
    assert rows["IndexShare", "4 indexers - 12"] == {1: 5.5 - 5.25}
    assert rows["DSA", "sparse - dense training, equal tokens"] == {}


@pytest.mark.slow
def test_effects_run_once_and_are_read_at_the_ends_of_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(SENTENCE * 100)
    arguments = (tmp_path / "t.txt", tmp_path / "e.jsonl", 1, ("base", "dense"), 10)
    EFFECTS["main"](*arguments)
    first = capsys.readouterr().out
    assert "| DSA | sparse - dense training, equal tokens |" in first
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 2
    EFFECTS["main"](*arguments)
    assert first.endswith(capsys.readouterr().out)  # the table alone: nothing ran again


# ------------------------------------------------------------------------------- the ladder of MTP
@pytest.fixture
def text(tmp_path: Path) -> Corpus:
    (tmp_path / "t.txt").write_text(SENTENCE * 100)
    return corpus(tmp_path / "t.txt")


@pytest.mark.parametrize("name", LADDER["RUNGS"])
def test_a_rung_trains_the_mtp_layer_alone(text: Corpus, name: str) -> None:
    model = GLM(GLMConfig.preset("tiny")).initialise(0)
    before = {n: value.clone() for n, value in model.state_dict().items()}
    recipe = Recipe("tiny", steps=2, tokens=256, warmup=1, optimizer="muon", stages=(sparse(1.0, 256),))
    LADDER["climb"](model, LADDER["RUNGS"][name], partial(Windows(text.text).take, 256, 1), recipe)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    layer = {n for n, _ in model.named_parameters() if n.startswith("model.layers.4.") and ".indexer." not in n}
    assert moved == layer


@torch.no_grad()
def test_own_keys_are_shared_ones_at_depth_one_only() -> None:
    """Deeper each depth is the layer's step 0 over what was recycled; targets are those of the likelihood."""
    model = GLM(GLMConfig.preset("tiny").replace(initializer_range=0.15)).initialise(0)
    ids = torch.randint(0, 320, (2, 25), generator=torch.Generator().manual_seed(0))
    sample = Sample.of(ids)
    output = model(sample.ids, sample.batch, BatchStore(), attention="masked")
    one, two = (LADDER["own_keys"](model, output, sample, depths) for depths in (1, 2))
    assert (float(one[0]), one[1]) == (float(losses.mtp(model, output, sample, 1)[0]), 2 * 23)
    m, _ = model.draft(ids[:, 1:].flatten(), output.hidden, output.step)
    m, _ = model.draft(torch.cat([ids[:, 2:], ids[:, :1] * 0], 1).flatten(), m, output.step)
    nats = torch.nn.functional.cross_entropy(model.logits(m).unflatten(0, (2, 24))[:, :22].flatten(0, 1),
                                             ids[:, 3:].flatten(), reduction="sum")  # fmt: skip
    assert two[1] - one[1] == 2 * 22
    assert float(two[0] - one[0]) == pytest.approx(float(nats), rel=1e-5)
    assert float(two[0]) != pytest.approx(float(losses.mtp(model, output, sample, 2)[0]), rel=1e-5)


def test_the_ladder_table() -> None:
    """1 + what is accepted, over two seeds; gains are seed by seed over the first rung as it was trained."""

    def run(rung: str, share: bool, seed: int, first: float) -> dict[str, object]:
        return {"rung": rung, "share": share, "seed": seed, "accepted": {"greedy": [first] + [0.1] * 6}}

    done = [run("depth 1", False, seed, 0.4) for seed in (0, 1)] + [run("depth 1", True, 0, 0.3)]
    done += [run("+ TV loss", True, 0, 0.8), run("+ TV loss", True, 1, 0.6)]
    lines = LADDER["table"](done, "greedy")
    assert lines[2] == (
        "| depth 1 | 1.600 ± 0.000 | 1.700 ± 0.000 | 1.800 ± 0.000 | 1.900 ± 0.000 | 2.000 ± 0.000 | 0.0 ± 0.0 % |"
    )
    assert lines[3] == "| depth 1, decoded shared | 1.500 | 1.600 | 1.700 | 1.800 | 1.900 | -5.0 % |"
    assert lines[4].endswith("| 2.300 ± 0.100 | 15.0 ± 5.0 % |")


@torch.no_grad()
def test_what_the_model_says_is_sampled_from_it(text: Corpus) -> None:
    """Behind the beginnings, nearly all tokens of a sharp model are its first choice; the text's are not."""
    model = GLM(GLMConfig.preset("tiny").replace(initializer_range=0.15)).initialise(0)
    model.lm_head.weight *= 20
    said = LADDER["said"](model, text, Recipe("tiny", steps=2, tokens=256, stages=(sparse(1.0, 256),)))
    assert text.text is not None and said.shape == (2, 257)
    assert torch.equal(said[:, :32], Windows(text.text, 1000).take(32, 2).ids.view(2, 32))
    sample = Sample.of(said)
    hidden = model(sample.ids, sample.batch, BatchStore(), attention="masked").hidden
    chosen = (model.logits(hidden).argmax(-1) == sample.targets).view(2, 256)
    assert chosen[:, 31:].double().mean() > 0.7 > 0.3 > chosen[:, :31].double().mean()


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_the_ladder_is_climbed_once(
    tmp_path: Path, text: Corpus, capsys: pytest.CaptureFixture[str], own: bool
) -> None:
    rungs = ("depth 1", "+ TV loss")
    arguments = (tmp_path / "t.txt", tmp_path / "out", 1, rungs, 4, 2, 3, own, tmp_path / "report.json")
    LADDER["main"](*arguments)
    first = capsys.readouterr().out
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert [(run["rung"], run["share"]) for run in runs] == [("depth 1", False), ("depth 1", True), ("+ TV loss", True)]
    assert all(len(a) == 7 and 0 < a[0] <= 1 for run in runs for a in [run["accepted"]["rejection sampling"]])
    LADDER["main"](*arguments)
    assert first.endswith(capsys.readouterr().out)  # the tables alone: nothing ran again
