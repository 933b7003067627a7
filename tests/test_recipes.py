"""The recipes: each is one, and the effects table says what its runs found."""

from __future__ import annotations

import json
import os
import subprocess
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


@pytest.mark.parametrize("name", ["nano", "recall", "indexcache", "shakespeare", "sft", "assistant"])
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


# ------------------------------------------------------------------------------- the pattern lab
TABLES = run_path(str(FOLDER / "indexcache_tables.py"))


def searched(out: Path, name: str, losses: dict[str, list[float]], rows: list[tuple[str, str]]) -> None:
    """What nanoglm indexcache search would have left."""
    (out / name).mkdir(parents=True)
    lines = [json.dumps({"pattern": p, "loss": values, "right": values}) for p, values in losses.items()]
    (out / name / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    base, result = losses["FFFF"], []
    for method, pattern in rows:
        mean = sum(losses[pattern]) / 2
        result.append({
            "method": method, "pattern": pattern, "full": pattern.count("F"), "loss": mean,
            "difference": mean - sum(base) / 2, "error": 0.0, "right": {"recall": 0.5},
        })  # fmt: skip
    settings = {"sequences": 2, "length": 8}
    (out / name / "result.json").write_text(json.dumps({"full": 3, "settings": settings, "rows": result}))


def test_tables_of_the_pattern_lab(tmp_path: Path) -> None:
    """Uniform loses 1.0, greedy 0.2, the optimum 0.1: greedy recovers 0.8 of 0.9."""
    losses = {"FFFF": [1.0, 3.0], "FSFF": [2.0, 4.1], "FFSF": [1.2, 3.2], "FFFS": [1.1, 3.1]}
    rows = [("all", "FFFF"), ("greedy", "FFFF"), ("greedy", "FFSF"), ("uniform (paper)", "FSFF"), ("random", "FSFF")]
    rows += [(method, "FFFS") for method in ("swap", "beam", "exhaustive", "similarity", "overlap")]
    searched(tmp_path, "search-0-3", losses, rows)
    searched(tmp_path, "test-0", losses, rows)
    searched(tmp_path, "test-own4-0", {"FFFF": [1.5, 3.5]}, [("all", "FFFF")])
    bands = [{"overlap": [[0.1 * abs(i - j) for j in range(4)] for i in range(4)]}]
    (tmp_path / "search-0-3" / "overlap.json").write_text(json.dumps({"bands": bands}))
    (tmp_path / "seconds.txt").write_text("dense-0 1800\nfull-0 1800\n")
    found = TABLES["tables"](tmp_path)
    assert "| greedy | FFSF | +0.2000 +- 0.0000 | +0.2000 +- 0.0000 | 89.47% | 89.47% | 2 of 3 |" in found
    assert "| exhaustive | FFFS | +0.1000 +- 0.0000 | +0.1000 +- 0.0000 | 100.00% | 100.00% | 1 of 3 |" in found
    assert "| own4 | 1 | 0.5000 | recall 50.0% |" in found and "2 trainings, 1.0 hours" in found
    assert TABLES["pattern_of"](tmp_path / "search-0-3", "greedy", 3) == "FFSF"
    assert TABLES["spearman"]([1.0, 2.0, 3.0], [10.0, 20.0, 5.0]) == pytest.approx(-0.5)


def test_the_plain_transformer_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps, then dense, oracle and search; a second run takes the weights that are there."""
    (tmp_path / "text.txt").write_text(SENTENCE * 40)
    main_of = run_path(str(FOLDER / "indexcache_plain.py"))["main"]
    main_of.__globals__.update(LAYERS=3, TOPK=8, of_tasks=partial(few, main_of.__globals__["of_tasks"]))
    for _ in range(2):
        main_of(tmp_path / "text.txt", tmp_path / "out", steps=10)
    shown = capsys.readouterr().out
    assert shown.count("step 0") == 1 and "| exhaustive | 3 | FFF |" in (tmp_path / "out" / "tables.md").read_text()


def few(draw, tasks, length, sequences, seed=0):  # noqa: ANN001, ANN201  # type: ignore[no-untyped-def]
    """Smaller calibration."""
    return draw(tasks[:1], 64, 2, seed)


@pytest.mark.slow
def test_costs_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ways agree; a checkpoint larger than the budget is searched within it."""
    cost = run_path(str(FOLDER / "indexcache_cost.py"))
    cost["main"](tmp_path, rounds=1, layers=6, width=128, budget=250_000_000)
    rows = json.loads((tmp_path / "cost.json").read_text())
    assert rows[0]["ratio"] > 1.2 and rows[1]["ratio"] > 1.2
    capsys.readouterr()
    folder = tmp_path / "model"
    cost["save"](cost["random_model"](24, 768), folder, dtype=torch.float32)
    found = cost["within"](folder, 24, 400_000_000)
    assert found["bytes"] > 2 * found["budget"] and found["more"] * 1e6 < found["budget"]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_pattern_lab_in_ten_minutes(tmp_path: Path) -> None:
    """QUICK: one model, its search beside the optimum, distilled arms, and the tables of them; then nothing is left."""
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 400)
    environment = os.environ | {"QUICK": "1", "OMP_NUM_THREADS": "2"}
    command = ["sh", str(FOLDER / "indexcache_nano.sh"), str(text), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert (tmp_path / "out" / "tables.md").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    found = (tmp_path / "out" / "tables.md").read_text()
    assert "| 0 | 3 | exhaustive |" in found and "| uniform4 | 1 |" in found and "dense" in found
    assert (tmp_path / "out" / "search-0-3" / "report.html").exists()
    again = subprocess.run([*command, "dense", "full"], env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0  # all is kept
