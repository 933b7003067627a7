"""The recipes: each is one, and the effects table says what its runs found."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest

from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.cli import main
from nanoglm.train.recipe import Recipe
from nanoglm.train.run import config_of

FOLDER = Path(__file__).parents[1] / "recipes"
EFFECTS = run_path(str(FOLDER / "effects.py"))


@pytest.mark.parametrize("name", ["nano", "shakespeare", "sft"])
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
    (tmp_path / "t.txt").write_text("It was a dark evening in November, and the lamps had been lit an hour. " * 100)
    arguments = (tmp_path / "t.txt", tmp_path / "e.jsonl", 1, ("base", "dense"), 10)
    EFFECTS["main"](*arguments)
    first = capsys.readouterr().out
    assert "| DSA | sparse - dense training, equal tokens |" in first
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 2
    EFFECTS["main"](*arguments)
    assert first.endswith(capsys.readouterr().out)  # the table alone: nothing ran again
