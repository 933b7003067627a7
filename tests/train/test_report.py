"""The report of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoglm.cli import main
from nanoglm.errors import InputError
from nanoglm.train.report import read_log, report, stages

LINES = [
    {"step": 0, "stage": "dense", "loss": 5.7, "mtp": 5.8, "seconds": 1.0},
    {"step": 19, "stage": "dense", "val_dense": 3.5, "mass": 0.5, "accepted": 1.2, "seconds": 2.0},
    {"step": 20, "stage": "indexer_warmup", "loss": 3.4, "kl": 1.1, "seconds": 3.0},
    {"step": 30, "stage": "sparse", "loss": 3.3, "kl": 0.3, "seconds": 4.0},
    {"step": 39, "stage": "sparse", "val_dense": 3.25, "val_sparse": 3.26, "load": 1.4, "seconds": 5.0},
]


def test_stages_follow_each_other() -> None:
    assert stages(LINES) == [("dense", 0, 20), ("indexer_warmup", 20, 30), ("sparse", 30, 39)]


def test_the_page_needs_nothing_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a<b"
    run.mkdir()
    (run / "train.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    main(["report", str(run)])
    assert capsys.readouterr().out.split() == [str(run / "report.png"), str(run / "report.html")]
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "<td>3.26</td>" in page and "<h1>a&lt;b</h1>" in page and 'src="data:image/png;base64,' in page
    assert "http" not in page  # no other address


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"loss": 1}'])
def test_a_log_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        report(tmp_path)
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"log .*train\.jsonl (cannot be read|holds no steps)"):
        read_log(tmp_path / "train.jsonl")
