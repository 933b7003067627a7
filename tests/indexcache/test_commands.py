"""``nanoglm indexcache``: the verbs from the command line, their files, and what they refuse."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from pattern_models import small

from nanoglm.api import DEFAULT_MODEL, Model
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.cli import main
from nanoglm.indexcache.commands import DEFAULT
from nanoglm.indexcache.report import plots_of
from nanoglm.model import GLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "six"
    config = small(6).config.replace(vocab_size=320)
    Model(GLM(config).initialise(0), byte_tokenizer()).save(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    words = random.Random(0)
    file.write_text(" ".join(words.choice(["one", "two", "three", "four", "five"]) for _ in range(800)))
    return file


def search(model: Path, text: Path, out: Path, *more: str) -> None:
    main([
        "indexcache", "search", str(model), "--data", str(text), "--length", "32", "--sequences", "7", "--keep", "1/3",
        "--out", str(out), *more,
    ])  # fmt: skip


def test_search_writes_what_report_draws(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ["greedy", "swap", "beam", "exhaustive", "uniform", "random", "similarity", "overlap"]
    search(model, text, tmp_path, "--method", *every, "--patterns", "FFSSSS")
    shown = capsys.readouterr()
    assert "exhaustive: about 5 patterns" in shown.err and "FFSSSS" in shown.out
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["rows"]
    assert result["full"] == 2 and {row["method"].split(" ")[0] for row in rows} == {"all", "given", *every}
    best = next(row for row in rows if row["method"] == "exhaustive")
    assert all(row["loss"] >= best["loss"] - 1e-9 for row in rows if row["full"] == 2)
    assert [row["full"] for row in rows if row["method"] == "greedy"] == [6, 5, 4, 3, 2]

    drawn = ["--length", "64", "--sequences", "7", "--out", str(tmp_path)]
    main(["indexcache", "overlap", str(model), "--data", str(text), *drawn])
    speed = {"length": 4096, "speed_up": 1.2, "scoring": 1.1}
    (tmp_path / "speed.json").write_text(json.dumps({"rows": {"prefill": [{"length": 4096}, speed]}}))
    main(["indexcache", "report", str(tmp_path)])
    names = ["overlap-8", "overlap-16", "overlap-32", "loss", "patterns", "tasks", "speed"]
    assert [plot.name for plot in plots_of(tmp_path)] == names
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("Plotly.newPlot") >= 5 and 'src="http' not in page
    grid = plots_of(tmp_path)[0].grid
    assert grid is not None and all(row[i] == pytest.approx(1) for i, row in enumerate(grid))


def test_a_search_goes_on_and_keeps_to_its_settings(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(model, text, tmp_path, "--method", "greedy")
    before = (tmp_path / "evaluations.jsonl").read_text()
    search(model, text, tmp_path, "--method", "greedy", "exhaustive")
    assert (tmp_path / "evaluations.jsonl").read_text().startswith(before)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        search(model, text, tmp_path, "--sequences", "8")
    assert "is of a search with sequences 7; expected 8" in capsys.readouterr().err


def test_reading_layers_when_needed_finds_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    search(model, text, tmp_path / "a", "--method", "greedy", "exhaustive")
    search(model, text, tmp_path / "b", "--method", "greedy", "exhaustive", "--stream", "--memory", "500KB")
    a, b = ((tmp_path / name / "evaluations.jsonl").read_text().splitlines() for name in "ab")
    assert sorted(a) == sorted(b)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--keep", "1/7"], None),
        (["--keep", "9"], "keep is '9'"),
        (["--tasks", "recall"], "data and tasks are both given"),
        (["--patterns", "FFXSSS"], "pattern is 'FFXSSS'"),
        (["--length", "4000"], "text holds"),
        (["--memory", "lots"], "memory is 'lots'"),
        (["--memory", "1KB"], "memory is 1,000 bytes; expected at least"),
        (["--length", "4"], "length is 4; expected some times the 4 tokens"),
        (["--blocks", "2", "--method", "beam"], "blocks is 2 with method beam"),
        (["--blocks", "3"], "in 3 blocks"),
    ],
)
def test_what_is_refused(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str | None,
) -> None:
    if sentence is None:  # a seventh of six layers is one indexer
        search(model, text, tmp_path / "out", *options)
        return
    with pytest.raises(SystemExit, match="2"):
        search(model, text, tmp_path / "out", *options)
    assert sentence in capsys.readouterr().err


def test_tasks_need_their_vocabulary(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("search", "overlap", "gates"):
        with pytest.raises(SystemExit, match="2"):
            main(["indexcache", verb, str(model)])
        assert "vocabulary 320; expected the tasks' 2048" in capsys.readouterr().err


def test_gates_end_with_their_verdict(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["indexcache", "gates", str(model), "--data", str(text), "--length", "32", "--sequences", "4"])
    assert "SHUT" in capsys.readouterr().out


def test_a_report_needs_something_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["indexcache", "report", str(tmp_path)])
    assert "nothing to draw" in capsys.readouterr().err


def test_a_report_bears_half_a_line_and_rows_add_up(model: Path, text: Path, tmp_path: Path) -> None:
    search(model, text, tmp_path, "--method", "greedy")
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"pattern": "FSS')
    main(["indexcache", "report", str(tmp_path)])
    search(model, text, tmp_path, "--method", "exhaustive")
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["all"] + ["greedy"] * 5 + ["exhaustive"]


def test_other_windows_of_a_text(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(model, text, tmp_path / "a", "--method", "greedy")
    search(model, text, tmp_path / "b", "--method", "greedy", "--held-out")
    a, b = (json.loads((tmp_path / name / "settings.json").read_text())["data"] for name in "ab")
    assert a != b
    with pytest.raises(SystemExit, match="2"):
        main(["indexcache", "gates", "--held-out"])
    assert "expected another seed" in capsys.readouterr().err


def test_shared_layers_own_indexers_can_be_taken_along(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled nano has 4 of 12, and the others beside it; both ways to load find the same."""
    options = ["--data", str(text), "--length", "128", "--sequences", "2", "--keep", "11", "--method", "greedy"]
    for name, more in (("a", []), ("b", ["--stream"])):
        main(["indexcache", "search", str(DEFAULT_MODEL), *options, "--all-full", *more, "--out", str(tmp_path / name)])
    found = [json.loads((tmp_path / name / "result.json").read_text())["rows"] for name in "ab"]
    assert found[0] == found[1] and found[0][0]["pattern"] == "F" * 12 and found[0][-1]["full"] == 11
    with pytest.raises(SystemExit, match="2"):
        main(["indexcache", "search", "tiny", *options, "--stream"])
    with pytest.raises(SystemExit, match="2"):
        main(["indexcache", "overlap", DEFAULT, "--all-full"])
    assert "has no shared_indexers.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_a_search(model: Path, text: Path, tmp_path: Path) -> None:
    """Two processes, an odd number of sequences: every score is the one that one process finds."""
    search(model, text, tmp_path / "one", "--method", "greedy", "exhaustive", "similarity", "overlap")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "nanoglm.cli"]
    command += ["indexcache", "search", str(model), "--data", str(text), "--length", "32", "--sequences", "7"]
    command += [
        "--keep",
        "1/3",
        "--method",
        "greedy",
        "exhaustive",
        "similarity",
        "overlap",
        "--out",
        str(tmp_path / "two"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / name / "evaluations.jsonl").read_text() for name in ("one", "two"))
    assert one == two
