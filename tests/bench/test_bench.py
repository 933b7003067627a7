"""Every benchmark runs at small sizes and tells what it should; what the times are is not asserted."""

from __future__ import annotations

import json
import sys
import time
from math import isfinite
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch

from nanoglm import load, ops
from nanoglm.api import checkpoint_directory
from nanoglm.bench import generation, peer, step
from nanoglm.bench.commands import _command
from nanoglm.bench.cost import Point, fit, predict, work
from nanoglm.bench.decode import decode
from nanoglm.bench.engine import bench_engine, bench_prefix
from nanoglm.bench.generation import ENGINES, bench_generation
from nanoglm.bench.ops import bench_ops, difference, gemm_name, pairs, random_selection
from nanoglm.bench.prefill import amount, prefill, whole
from nanoglm.bench.prototype import Prototype
from nanoglm.bench.report import TITLES, report
from nanoglm.bench.result import COLUMNS, Result
from nanoglm.bench.shapes import PATTERNS, Subject, bench_nano, with_pattern
from nanoglm.bench.timing import interleave, parts_of
from nanoglm.bench.versus import versus
from nanoglm.cli import main
from nanoglm.engine import SamplingParams, generate
from nanoglm.errors import InputError


def check_cells(result: Result) -> None:
    """Every row has its first column, no key that no column shows, and finite numbers."""
    for name, rows in result.rows.items():
        keys = {column.key for column in COLUMNS[name]} | {"model"}
        assert rows
        for row in rows:
            assert row.keys() <= keys and COLUMNS[name][0].cell(row)
            assert all(isfinite(value) for value in row.values() if isinstance(value, float)), row


def test_every_table_has_a_title() -> None:
    assert TITLES.keys() == COLUMNS.keys()


def test_ops(tmp_path: Path) -> None:
    result = bench_ops(3, shrink=32)
    check_cells(result)
    names = [row["name"] for row in result.rows["ops"]]
    assert len(names) == len(set(names)) and sum("attention" in name for name in names) == 2
    assert all(row["low"] <= row["ms"] <= row["high"] for rows in result.rows.values() for row in rows)
    for row in result.rows["ops"]:
        assert row["share"] == pytest.approx(row["rate"] / row["limit_rate"])
    bf16 = next(row for row in result.rows["ops"] if row["name"].startswith("indexer 4x64") and "bf16" in row["name"])
    assert bf16["limit"] in {gemm_name("bf16", (2048, 2048, 2048)), gemm_name("bf16", (512, 4096, 64))}
    result.save(tmp_path / "ops.json")
    assert Result.load(tmp_path / "ops.json") == result


def test_prefill_and_decode() -> None:
    told: list[float] = []
    filled = prefill((300, 100, 200), 3, progress=lambda what, share: told.append(share))
    check_cells(filled)
    rows = filled.rows["prefill"]
    assert [(row["length"], row["pattern"]) for row in rows] == [(n, p) for n in (100, 200, 300) for p in PATTERNS]
    assert all({"speed_up", "scoring", "limit", "predicted", "off", "predicted_3"} <= row.keys() for row in rows[1::2])
    for row in rows:
        assert 0 < row["indexer"] < row["seconds"] and row["ratio"] > 0
    assert rows[1]["limit"] == 3.5 and len(filled.fit) == 5
    assert told == sorted(told) and told[0] >= 0 and told[-1] < 1
    decoded = decode((200, 100), 3, index_dtype="int8")
    check_cells(decoded)
    assert [row["length"] for row in decoded.rows["decode"]] == [100, 100, 200, 200]


def fabricated(table: str) -> Result:
    rows = [
        {"length": n, "pattern": p, "model": n / 9e2,
         "seconds": n / 1e3, "ms": n / 1e3, "low": n / 2e3, "high": n / 5e2}
        for n in (100, 300) for p in PATTERNS
    ]  # fmt: skip
    names = ("us_per_token_and_layer", "ns_per_pair")
    fit = dict.fromkeys((*names, *(f"{name}_of_3" for name in (*names, "us_per_token_and_indexer"))), 0.78)
    return Result(table, 3, {"index_dtype": "bf16"}, {table: rows}, fit if table == "prefill" else {})


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = tuple(tmp_path / f"{name}.json" for name in ("prefill", "decode"))
    for file in files:
        fabricated(file.stem).save(file)
    written = report(files, tmp_path / "page.md")
    assert [file.name for file in written] == ["page.md", "page-prefill.svg", "page-decode.svg"]
    page = written[0].read_text()
    for column in (*COLUMNS["prefill"], *COLUMNS["decode"]):
        assert f"- `{column.title}`: {column.meaning}" in page
    assert "| 300 | IndexShare |" in page and "(page-decode.svg)" in page and "0.78 ns per scored pair" in page


def test_a_single_length_is_not_drawn(tmp_path: Path) -> None:
    result = Result("prefill", 3)
    result.rows["prefill"] = [{"length": 64, "pattern": p, "seconds": 1.0, "low": 1.0, "high": 1.0} for p in PATTERNS]
    result.save(tmp_path / "one.json")
    assert report((tmp_path / "one.json",), tmp_path / "page.md") == [tmp_path / "page.md"]
    assert "![" not in (tmp_path / "page.md").read_text()


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fabricated("decode").save(tmp_path / "x.json")
    with pytest.raises(InputError, match="matplotlib is not installed"):
        report((tmp_path / "x.json",), tmp_path / "page.md")
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_prefill_of_one_length_predicts_nothing() -> None:
    result = prefill((64,), 3)
    assert not result.fit and "predicted" not in result.rows["prefill"][1]


def test_whole() -> None:
    result = whole(4096, 2, 3)
    check_cells(result)
    assert [row["part"] for row in result.rows["whole"]] == ["indexer", "attention", "rest", "total"]
    *parts, total = result.rows["whole"]
    for key in ("seconds", "limit", "gemm"):
        assert sum(row[key] for row in parts) == pytest.approx(total[key])
    assert result.rows["run"][0]["length"] == 4096


@pytest.mark.parametrize("engine", ["nanoglm", "transformers"])
def test_peer_process(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    if engine == "transformers":
        pytest.importorskip("transformers")
    peer.main(engine, 80, 2)
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"seconds", "decode_ms", "peak_gb"} and figures["seconds"] > 0


def test_a_step_of_both_forms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("masked", "sparse"):
        step.main(form, "tiny", 48)
        figures = json.loads(capsys.readouterr().out)
        assert figures["seconds"] > 0 and figures["peak_gb"] > 0.1
    taken = {"masked": iter((4.0, 9.0, 5.0)), "sparse": iter((2.0, 2.5, 3.0))}
    order = []

    def run(module: str, form: str, name: str, length: str) -> dict[str, float]:
        order.append(form)
        return {"seconds": next(taken[form]), "peak_gb": 1.0}

    monkeypatch.setattr(step, "apart", run)
    masked, sparse = step.bench_train((48,), "tiny").rows["step"]
    assert order == ["masked", "sparse"] * 3
    assert (masked["seconds"], sparse["seconds"], sparse["speed_up"]) == (5.0, 2.5, 2.0)


def test_engine_in_all_ways() -> None:
    model = load("tiny")
    result = bench_engine(model, (1, 3), prompt=8, tokens=4, rounds=3)
    check_cells(result)
    rows = {(row["requests"], row["way"]): row for row in result.rows["engine"]}
    assert len(rows) == 12 and all(row["rate"] > 0 and row["first"] > 0 for row in rows.values())
    assert rows[3, "engine"]["gain"] == rows[1, "plain loop"]["plain"] == 1
    assert rows[1, "3 drafts"]["accepted"] >= 1 and rows[1, "engine"]["accepted"] is None
    assert rows[1, "3 drafts"]["ideal"] > 0 and rows[3, "3 drafts"]["ideal"] is None
    with pytest.raises(InputError, match="requests is 0; expected at least 1"):
        bench_engine(model, (0,), rounds=3)


def test_a_second_request_that_begins_like_the_first() -> None:
    result = bench_prefix(load("tiny"), 256, 3)
    check_cells(result)
    assert [(row["kept"], row["hit"]) for row in result.rows["prefix"]] == [
        ("yes", 192),
        ("no", 0),
    ]  # the last page is followed by other tokens


def test_generation_beside_a_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who says something else is told apart, with how near the two words were."""
    model = load()
    calls: list[tuple[str, int]] = []

    def run(module: str, engine: str, folder: str, prompt: str, tokens: str) -> dict[str, Any]:
        ids = json.loads(Path(prompt).read_text())
        calls.append((engine, len(ids)))
        said = [i % 7 for i in range(int(tokens))]
        if engine == "transformers":
            said[3] += 1
        return {"seconds": 4.0 if engine == "transformers" else 2.0, "first": 1.0, "ids": said}

    monkeypatch.setattr("nanoglm.bench.generation.apart", run)
    result = bench_generation(model, tmp_path, (64, 128), tokens=8)
    check_cells(result)
    assert calls == [(e, n) for n in (64, 128) for e in ENGINES] + calls[5::-1] + calls[:6]
    ours, plain, theirs = result.rows["generate"][:3]
    assert (ours["alike"], ours["gap"], plain["times"]) == (8, None, 1)
    assert (theirs["alike"], theirs["times"]) == (3, 2) and theirs["gap"] > 0
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "engine", "--model", "tiny", "--peer", "transformers"])
    assert "model is tiny; expected a checkpoint directory" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_generation_processes_say_the_same(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if engine == "transformers":
        pytest.importorskip("transformers")
    model = load()
    ids = model.tokenizer.encode("It was a dark evening in November, and the lamps had not been lit; for the")
    (tmp_path / "prompt").write_text(json.dumps(ids))
    folder = checkpoint_directory(None)
    generation.main(engine, str(folder), str(tmp_path / "prompt"), 12)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ids"] == list(generate(model.module, ids, SamplingParams(12)))
    assert 0 < found["first"] < found["seconds"]


def test_versus_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def run(engine: str, length: int, tokens: int, extra: dict[str, str]) -> dict[str, float]:
        calls.append((engine, length, bool(extra)))
        return {"seconds": len(calls) * (1.0 if engine == "nanoglm" else 10.0), "decode_ms": 1.0, "peak_gb": 1.0}

    monkeypatch.setattr("nanoglm.bench.versus._run", run)
    result = versus((64, 128), 3)
    check_cells(result)
    assert calls[:4] == [(e, 64, huge) for huge in (False, True) for e in ("nanoglm", "transformers")]
    assert len(calls) == 24 and len(result.rows["peer"]) == 8
    assert result.rows["peer"][0]["times"] == 1 and result.rows["peer"][1]["times"] == pytest.approx(100 / 9)


# ------------------------------------------------------------------------------- what figures rest on
@pytest.mark.parametrize("truth", [(11e-6, 0.78e-9), (11e-6, 0.78e-9, 2e-6)])
def test_leave_one_out_fit_recovers_the_constants(truth: tuple[float, ...]) -> None:
    configs = [with_pattern(bench_nano(), pattern) for pattern in PATTERNS]
    points = [Point(c, n, predict(truth, c, n)) for n in (4096, 16_384, 65_536) for c in configs]
    for left_out in (4096, 16_384, 65_536):
        assert fit([p for p in points if p.length != left_out], len(truth)) == pytest.approx(truth, rel=1e-6)


def test_cost_model_counts_what_runs() -> None:
    """All layers but the last work at every token; so many pairs are scored."""
    for pattern, indexers in zip(PATTERNS, (7, 2), strict=True):
        subject = Subject(with_pattern(bench_nano(), pattern), 256)
        with ops.count_work() as counted:
            subject.feed([0] * 256)
        last = 256 if pattern == "all-Full" else 0  # the last layer's one query
        scored, attended = amount(subject.config, 256)
        assert counted.pairs_scored == scored + last == indexers * pairs(256, 256) + last
        assert counted.rows_attended == attended + 256
        assert work(subject.config, 256) == (7 * 256, indexers * 256**2 / 2)


def test_interleave_takes_turns() -> None:
    calls: list[str] = []

    def case(name: str) -> Any:
        def run() -> None:
            calls.append(name)
            time.sleep(0.021)  # longer than what is repeated

        return run

    samples = interleave({"a": case("a"), "b": case("b")}, 3)
    assert "".join(calls) == "aabb" + "abbaab"  # warmed and sized, then every second round backwards
    assert all(s.low <= s.median <= s.high for s in samples.values())


def test_parts_add_up_and_ops_are_put_back() -> None:
    before = ops.select, ops.sparse_attention
    subject = Subject(bench_nano(), 64)
    parts = parts_of(lambda: subject.feed([1] * 64))
    assert parts.indexer > 0 and parts.attention > 0 and parts.rest > 0
    with pytest.raises(ZeroDivisionError):
        parts_of(lambda: 1 / 0)
    assert (ops.select, ops.sparse_attention) == before


def test_random_selection_is_one() -> None:
    selection = random_selection(5, 100, 9)
    assert selection.dtype == torch.int32 and selection.shape == (5, 9)
    assert (selection.diff(dim=1) > 0).all() and selection.min() >= 0 and selection.max() < 95


def test_difference() -> None:
    ours = torch.tensor([[1, 2, 5], [0, -1, -1]], dtype=torch.int32)
    theirs = torch.tensor([[5, 1, 7], [0, -1, -1]], dtype=torch.int32)
    assert difference(ours, ours) == 0 and difference(ours, theirs) == pytest.approx(1 / 4)
    assert difference(torch.ones(4), torch.full((4,), 1.5)) == pytest.approx(0.5)


def test_prototype_gets_what_it_asks_for(tmp_path: Path) -> None:
    """A stand-in with the same signatures: arguments arrive in their places."""
    if which("g++") is None:
        pytest.skip("no g++")
    (tmp_path / "dsa_cpu.cpp").write_text(STAND_IN)
    rival = Prototype(tmp_path)
    q, weights, keys = torch.randn(4, 2, 16), torch.randn(4, 2), torch.randn(70, 16)
    for kind in ("bf16", "int8"):
        found = rival.indexer(q, weights, keys, 8, kind)()
        assert found.shape == (4, 8) and found[:, 0].tolist() == [66, 67, 68, 69]


STAND_IN = """
#include <cstdint>
typedef int64_t L; typedef const void* P;
extern "C" void pack_k_bf16(P, L, int, void*) {}
extern "C" void pack_k_i8(P, L, int, void*, float*) {}
extern "C" void quant_q_i8(P, P, L, int, int, void*, float*, int32_t*) {}
static void run(L T, L pos0, int K, int32_t* idx, int32_t* cnt) {
  for (L t = 0; t < T; t++) { cnt[t] = K; for (int k = 0; k < K; k++) idx[t * K + k] = pos0 + t - k; }
}
extern "C" void indexer_bf16(P, P, P, L T, L pos0, int, int, int K, int32_t* idx, int32_t* cnt, float*, int, int) {
  run(T, pos0, K, idx, cnt);
}
extern "C" void indexer_i8(P, P, P, P, P, L T, L pos0, int, int, int K, int32_t* idx, int32_t* cnt, float*, int, int) {
  run(T, pos0, K, idx, cnt);
}
"""


# ------------------------------------------------------------------------------- the command, and mistakes
def test_a_command_writes_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"
    main(["bench", "prefill", "--lengths", "64", "128", "--rounds", "3", "--index-dtype", "int8", "--out", str(out)])
    raw = json.loads(out.read_text())
    assert raw["machine"].keys() >= {"cpu", "threads", "kernels", "torch"}
    assert (raw["bench"], raw["rounds"], raw["shape"]["index_dtype"]) == ("prefill", 3, "int8")
    assert [row["length"] for row in raw["rows"]["prefill"]] == [64, 64, 128, 128]
    assert "speed-up" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("bench ops --out a/b.json --rounds 3 --prototype a/b", "bench ops --rounds 3 --prototype FOLDER"),
        ("bench ops --out=a/b.json --prototype=a/b --quick", "bench ops --prototype=FOLDER --quick"),
    ],
)
def test_the_command_kept_names_no_place(arguments: str, command: str) -> None:
    assert _command(arguments.split()) == f"nanoglm {command}"


MISTAKES = {
    "few rounds": (["ops", "--rounds", "2"], "rounds is 2; expected at least 3"),
    "no tokens": (["prefill", "--lengths", "0"], "length is 0; expected 1 to 1048576 tokens"),
    "endless": (["decode", "--lengths", "9999999"], "length is 9999999; expected 1 to"),
    "short whole": (["prefill", "--whole", "100"], "length is 100; expected 4096 to"),
    "no such folder": (["decode", "--out", "/nowhere/x.json"], "out is /nowhere/x.json, which cannot be written"),
    "no prototype": (["ops", "--prototype", "/nowhere"], "prototype is /nowhere; expected a folder with dsa_cpu.cpp"),
    "no files": (["report"], "files are none; expected JSON files"),
    "no such file": (["report", "/nowhere.json"], "/nowhere.json cannot be read"),
    "another file": (["report", __file__], "holds something else; expected JSON of nanoglm bench"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = MISTAKES[name]
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *arguments])
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("nanoglm: ") and words in err


def test_a_prototype_that_does_not_compile(tmp_path: Path) -> None:
    (tmp_path / "dsa_cpu.cpp").write_text("int main( {")
    with pytest.raises(InputError, match="does not compile"):
        bench_ops(3, tmp_path)
