"""The receipt: all green, all faults red, and honest about what it could not run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nanoglm.cli import main
from nanoglm.verify import Row, external, receipt, verify
from nanoglm.verify.faults import FAULTS, Fault

DOCUMENT = Path(__file__).parents[2] / "docs" / "verify.md"


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict, int]:
    with pytest.raises(SystemExit) as exit_:
        main(["verify", "--json", *options])
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) == 1
    return json.loads(out), exit_.value.code


def test_every_row_is_green_and_every_fault_red(capsys: pytest.CaptureFixture[str]) -> None:
    found, code = run(capsys)
    assert (found["ok"], code, found["not_run"]) == (True, 0, [])
    assert all(row["ok"] and row["value"] <= row["limit"] for row in found["rows"])
    external_rows = {row["name"] for row in found["rows"] if row["against"] == "transformers"}
    assert len(external_rows) >= 25 and len(found["rows"]) >= 40
    assert len({row["name"] for row in found["rows"]}) == len(found["rows"])
    assert [fault["name"] for fault in found["faults"]] == [fault.name for fault in FAULTS]
    for fault in found["faults"]:
        assert fault["caught"] and fault["by"]
        assert set(fault["by"]) <= external_rows, fault
    assert found["versions"]["transformers"] == "5.23.0"
    claims = re.findall(r"`([^`\n]+)`", DOCUMENT.read_text(encoding="utf-8"))
    undocumented = {row["name"] for row in found["rows"] if "cuda" not in row["name"]} - set(claims)
    assert not undocumented  # docs/verify.md states each row's claim


def test_a_fault_that_nothing_shows_is_a_missed_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = Fault("no mistake at all", "none", ((Row, "__doc__", "the same"),))
    monkeypatch.setattr(receipt, "FAULTS", [harmless])
    found, code = run(capsys)
    assert (found["ok"], code) == (False, 1)
    assert found["faults"] == [{"name": "no mistake at all", "caught": False, "by": [], "trap": "none"}]


def test_a_mistake_in_the_code_is_a_red_row(capsys: pytest.CaptureFixture[str]) -> None:
    fault = next(f for f in FAULTS if f.name == "routed scaling 2.5 missing")
    with fault.planted():
        found, code = run(capsys, "--no-faults")
    assert (found["ok"], code) == (False, 1)
    assert any(not row["ok"] and row["against"] == "transformers" for row in found["rows"])
    assert found["faults"] == [] and found["not_run"] == ["the planted faults: left out on request"]


def test_a_refusal_is_a_red_row_without_value() -> None:
    row = Row("refused: x", float("nan"), 0)
    assert not row.ok
    made = receipt.Receipt(rows=[("transformers", row)])
    assert not made.ok and made.to_json()["rows"][0]["value"] is None


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt, "FAULTS", FAULTS[:1])
    with pytest.raises(SystemExit) as exit_:
        main(["verify"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "hidden state after layer 3 (Shared MoE)" in out and "indexer RoPE half-split" in out
    assert out.count("green") > 40 and "RED" not in out and "transformers 5.23.0" in out
    assert out.splitlines()[-1].startswith("ok: ") and out.splitlines()[-1].endswith("1 of 1 planted faults red")


def test_without_transformers_it_says_what_it_could_not_run() -> None:
    script = textwrap.dedent("""
        import importlib.util, sys
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else found(name, *rest)
        sys.modules["transformers"] = None
        from nanoglm.cli import main
        main(["verify", *sys.argv[1:]])
    """)
    plain = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert plain.returncode == 1 and plain.stderr == ""
    assert "not run: all rows against transformers, and with them all planted faults: " in plain.stdout
    assert plain.stdout.splitlines()[-1].startswith("NOT OK: ")
    done = subprocess.run([sys.executable, "-c", script, "--json"], capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and not found["ok"] and len(found["not_run"]) == 1 and found["faults"] == []
    assert found["rows"] and all(row["ok"] and row["against"] == "nanoglm" for row in found["rows"])


def test_another_version_of_transformers_is_no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt, "ORACLE", "5.12.0")
    made = verify()
    assert not made.ok and made.not_run == ["all rows against transformers 5.12.0: version 5.23.0 is installed"]


def test_chunks_of_the_decoding_row_add_up() -> None:
    assert sum(external.CHUNKS) == external.LENGTH and external.CHUNKS[0] < external.K
