"""The command: what each verb prints, and every mistake as one sentence with exit code 2."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanoglm
from nanoglm.api import DEFAULT_MODEL, Model
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.eval.perplexity import evaluate
from nanoglm.model import GLM
from nanoglm.ops import cpu
from nanoglm.weights import Checkpoint, save

TEXT = "She said — quite softly — that the evening was dark, and that nobody in the café had seen it.\n"
INDEX = "model.safetensors.index.json"


def write(directory: Path, *, shard_bytes: int = 10**9, **changes: object) -> Path:
    """A tiny checkpoint with random weights; wide ones, so that its logits are far from flat."""
    model = GLM(GLMConfig.preset("tiny").replace(initializer_range=0.3, **changes)).initialise(3)
    save(
        model, directory, dtype=torch.float32, shard_bytes=shard_bytes,
        beside=lambda folder: byte_tokenizer().save(folder / "tokenizer.json"),
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``nanoglm train`` leaves after eight steps through all three stages."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    main(
        ["train", "--text", str(folder / "text.txt"), "--out", str(folder / "out"), "--preset", "tiny", "--steps", "8"]
    )
    return folder / "out"


@pytest.fixture
def generate(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``nanoglm generate`` on the tiny checkpoint; returns what it prints, without the last newline."""

    def run(*options: str, prompt: str = TEXT[:40]) -> str:
        main(["generate", prompt, "--model", checkpoint, "--max-tokens", "48", *options])
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.endswith("\n")
        return captured.out[:-1]

    return run


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*")}


# ------------------------------------------------------------------------------- generate
def test_greedy_is_repeatable_and_is_what_the_api_says(generate: Callable[..., str], checkpoint: str) -> None:
    first = generate("--temperature", "0")
    assert generate("--temperature", "0", "--seed", "5") == first
    params = nanoglm.SamplingParams(max_tokens=48)
    assert nanoglm.load(checkpoint).generate(TEXT[:40], params) == [first]
    assert first


def test_a_seed_is_repeatable_and_seeds_differ(generate: Callable[..., str]) -> None:
    texts = [generate("--seed", seed) for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]
    assert generate("--seed", "7", "--top-k", "1") == generate("--temperature", "0")
    assert generate("--seed", "7", "--top-k", "3") != texts[0]


def test_stop_ends_before_the_first_of_the_texts(generate: Callable[..., str]) -> None:
    whole = generate("--seed", "7")
    words = re.findall(r"[A-Za-z0-9]{2}", whole)
    assert len(words) >= 2
    late, early = words[-1], words[0]
    assert generate("--seed", "7", "--stop", late) == whole[: whole.index(late)]
    assert (
        generate("--seed", "7", "--stop", late, early, "never") == whole[: min(whole.index(late), whole.index(early))]
    )
    # The beginning of a stop text that does not come is not lost.
    assert generate("--seed", "7", "--stop", whole[-1] + "never") == whole


def test_prompt_from_standard_input(generate: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT[:40]))
    assert generate("--seed", "7", prompt="-") == generate("--seed", "7")


def test_the_real_command_reads_a_pipe_in_utf8(checkpoint: str) -> None:
    arguments = [sys.executable, "-m", "nanoglm.cli", "generate", "--model", checkpoint, "--max-tokens", "8"]
    done = subprocess.run(arguments, input=TEXT.encode(), capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    want = nanoglm.load(checkpoint).generate(TEXT, nanoglm.SamplingParams(8, 0.8))
    assert done.stdout.decode() == want[0] + os.linesep


def test_a_reader_that_has_enough_is_no_error(checkpoint: str) -> None:
    """``nanoglm generate | head -c 1``"""
    arguments = [sys.executable, "-m", "nanoglm.cli", "generate", "A", "--model", checkpoint, "--max-tokens", "400"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_generate(generate: Callable[..., str], dtype: str) -> None:
    assert generate("--dtype", dtype)


def test_an_end_token_ends_and_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x", eos_token_id=tuple(range(320)))
    main(["generate", "A", "--model", str(tmp_path / "x")])
    assert capsys.readouterr().out == "\n"


# ------------------------------------------------------------------------------- inspect
def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    main(["inspect", *arguments])
    lines = capsys.readouterr().out.splitlines()
    pairs = [re.split(r"\s{2,}", line, maxsplit=1) for line in lines]
    assert all(len(pair) == 2 for pair in pairs), lines
    return {name: value for name, value in pairs}


def test_inspect_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(capsys, "glm-5.2")
    assert shown["layers"] == "78: 21 Full, 57 Shared"
    assert shown["schedule"] == "FFF" + "SSSF" * 18 + "SSS"
    assert shown["tensors"] == "59,585"
    assert shown["parameters"] == "753,329,940,480 with MTP, 743,377,019,904 without"
    assert shown["experts"] == "75 layers of 256 + 1 shared, 8 per token"
    assert shown["indexer"] == "32 heads of 128, top 2048"
    assert shown["head nope, rope, value"] == "192, 64, 256"
    assert shown["positions"] == "1,048,576, RoPE base 8,000,000"


def test_inspect_a_checkpoint(tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(capsys, checkpoint)
    assert shown["checkpoint"] == checkpoint
    assert shown["schedule"] == "FSFS"
    assert shown["parameters"] == "403,344 with MTP, 314,840 without"
    assert shown["values by dtype"] == "F32 403,344"
    assert (shown["missing"], shown["unexpected"]) == ("0", "0")
    assert shown["size"] == "1,613,376 bytes (0.00 GB)"
    assert "ignored" not in shown
    write(tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    tensors = {n: t.bfloat16() for n, t in load_file(file).items() if not n.startswith("model.layers.4.")}
    tensors |= {
        n.replace(".0.", ".1.", 1): t.clone() for n, t in tensors.items() if ".layers.0.self_attn.indexer." in n
    }
    save_file(tensors, file)
    shown = inspected(capsys, str(tmp_path / "x"))
    assert shown["parameters"] == "314,840 (no MTP layer)"
    assert shown["ignored"] == "5 indexer tensors on Shared layers"
    assert shown["values by dtype"].startswith("BF16 ")


def test_doctor_tells_which_kernels_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    out = capsys.readouterr().out
    best = cpu.best()
    assert (f"C++ kernels, {best.name}" if best else "PyTorch, no C++ kernels") in out
    for name in cpu.SETS:
        assert re.search(rf"^ +{name}: .+$", out, re.MULTILINE)


# ------------------------------------------------------------------------------- eval and train
def table(out: str) -> dict[str, list[str]]:
    """Rows of the printed table by the first word of their name."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    return {row[0].split()[0]: row[1:] for row in rows if any(row[1:])}


def test_eval_of_a_checkpoint(tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    main(["eval", "--text", str(tmp_path / "text.txt"), "--model", checkpoint, "--context", "40", "--tokens", "60"])
    out = capsys.readouterr().out
    rows = table(out)
    assert list(rows) == ["dense", "IndexShare"]
    assert "all-Full sparse: not to be had" in out
    for row in evaluate(nanoglm.load(checkpoint), TEXT, context=40, tokens=60):
        numbers = [row.nats_per_token, row.nats_per_byte, row.bits_per_byte]
        counts = [row.pairs_scored, row.rows_attended]
        assert rows[row.name] == [f"{x:.4f}" for x in numbers] + [f"{n:,}" for n in counts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_beside_all_full(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    main(["eval", "--text", str(tmp_path / "text.txt"), "--model", str(trained), "--dtype", dtype])
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["dense", "all-Full", "IndexShare"]
    kind = getattr(torch, dtype)
    full, _ = Checkpoint(trained, all_full=True).load(dtype=kind)
    for row in evaluate(nanoglm.load(trained, dtype=kind), TEXT, full=Model(full, None)):
        assert rows[row.name.split()[0]][0] == f"{row.nats_per_token:.4f}"
    scored, shared = (int(rows[name][3].replace(",", "")) for name in ("all-Full", "IndexShare"))
    assert scored == 2 * shared  # four indexers against two


def test_train_end_to_end(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {p.name for p in trained.iterdir()}
    text = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert files == text | {"config.json", "model.safetensors", "shared_indexers.safetensors", "train.jsonl"}
    assert len({p.stat().st_mode for p in trained.iterdir()}) == 1  # as readable as any other file
    lines = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in lines] == [(0, "dense"), (7, "sparse")]
    assert lines[0].keys() >= {"loss", "mtp", "seconds"}
    assert lines[-1]["loss"] < lines[0]["loss"]
    model = nanoglm.load(trained)
    assert model.config.replace(extra={}) == GLMConfig.preset("tiny").replace(extra={})
    assert model.report is not None and model.report.ignored == []
    indexers = load_file(trained / "shared_indexers.safetensors")
    assert {name.split(".self_attn.indexer.")[0] for name in indexers} == {"model.layers.1", "model.layers.3"}
    main(["generate", "She", "--model", str(trained), "--max-tokens", "5"])
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(not DEFAULT_MODEL.is_dir(), reason="the bundled model is not there")
def test_a_demo_prompt_is_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "[/bold] [red]", "--max-tokens", "2"])
    assert capsys.readouterr().out.startswith("[/bold] [red]")


# ------------------------------------------------------------------------------- mistakes
def truncated_shard(folder: Path) -> list[str]:
    write(folder / "x", shard_bytes=200_000)
    file = sorted((folder / "x").glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    return ["generate", "A", "--model", str(folder / "x")]


def wrong_dtype(folder: Path) -> list[str]:
    write(folder / "x")
    file = folder / "x" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    return ["eval", "--text", __file__, "--model", str(folder / "x")]


def missing_index(folder: Path) -> list[str]:
    write(folder / "x", shard_bytes=200_000)
    (folder / "x" / INDEX).unlink()
    return ["inspect", str(folder / "x")]


def config_with(**changes: object) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        file = write(folder / "x") / "config.json"
        raw = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
        return ["inspect", str(folder / "x")]

    return make


def pattern(letters: str) -> Callable[[Path], list[str]]:
    dropped = dict.fromkeys(("indexer_types", "index_topk_freq", "index_skip_topk_offset"), ...)
    return config_with(index_topk_pattern=letters, **dropped)


def short_context(*options: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        write(folder / "x", max_position_embeddings=32)
        return ["generate", "--model", str(folder / "x"), *options]

    return make


def damaged_tokenizer(folder: Path) -> list[str]:
    (write(folder / "x") / "tokenizer.json").write_text("{")
    return ["generate", "A", "--model", str(folder / "x")]


def no_tokenizer(folder: Path) -> list[str]:
    (write(folder / "x") / "tokenizer.json").unlink()
    return ["generate", "A", "--model", str(folder / "x")]


def text_file(content: bytes, *arguments: str) -> Callable[[Path], list[str]]:
    """Arguments in which TEXT is a file of that content, OUT a folder that is not there, FOLDER one that is."""

    def make(folder: Path) -> list[str]:
        (folder / "text.txt").write_bytes(content)
        places = {"TEXT": folder / "text.txt", "OUT": folder / "out", "FOLDER": folder, "NOWHERE": folder / "nowhere"}
        return [str(places.get(a, a)) for a in arguments]

    return make


def plain(*arguments: str) -> Callable[[Path], list[str]]:
    return text_file(b"", *arguments)


LATIN = "café".encode("latin-1") * 300
MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "truncated shard": (truncated_shard, r"model-00002-of-\d+\.safetensors cannot be read .* truncated"),
    "wrong dtype": (wrong_dtype, r"lm_head\.weight has dtype F8_E4M3; expected one of F32, BF16, F16"),
    "slice of layers that are none": (
        plain("slice", "FOLDER", "OUT", "--layers", "0-x"),
        r"layers is '0-x'; expected numbers and ranges such as 0-3,6",
    ),
    "slice of nothing": (plain("slice", "FOLDER", "OUT"), r"config\.json cannot be read"),
    "missing index": (missing_index, rf"shards without it; expected model\.safetensors or {re.escape(INDEX)}"),
    "negative rank": (config_with(kv_lora_rank=-32), r"kv_lora_rank is -32; expected a positive integer"),
    "short pattern": (pattern("FSF"), r"index_topk_pattern has 3 letters; expected num_hidden_layers \(4\)"),
    "pattern begins with S": (pattern("SFSF"), r"pattern SFSF begins with S; .* expected first"),
    "disagreeing schedules": (config_with(index_topk_pattern="FFSS"), r"indexer_types and index_topk_pattern disagree"),
    "no config": (plain("inspect", "FOLDER"), r"config\.json cannot be read"),
    "a file as model": (plain("inspect", "TEXT"), r"is a file; expected the directory"),
    "long prompt": (
        short_context("x" * 33, "--max-tokens", "1"),
        r"prompt has 33 tokens .* max_position_embeddings \(32\)",
    ),
    "long continuation": (short_context("x" * 30, "--max-tokens", "3"), r"prompt has 30 tokens and 3 new ones"),
    "empty prompt": (short_context("", "--max-tokens", "3"), r"prompt is empty"),
    "prompt is no Unicode": (short_context("a\udcff", "--max-tokens", "3"), r"lone surrogate U\+DCFF"),
    "unknown model": (
        plain("generate", "A", "--model", "huge"),
        r"'huge' is neither a checkpoint directory nor a preset",
    ),
    "unknown preset": (
        text_file(b"x" * 999, "train", "--text", "TEXT", "--out", "OUT", "--preset", "huge"),
        r"preset 'huge' is unknown; expected one of tiny, nano",
    ),
    "preset of another vocabulary": (
        text_file(b"x" * 999, "train", "--text", "TEXT", "--out", "OUT", "--preset", "glm-5.2"),
        r"preset glm-5\.2 has vocabulary 154880; expected",
    ),
    "model without weights": (plain("generate", "A", "--model", "recall"), r"no tokenizer\.json"),
    "no tokenizer": (no_tokenizer, r"no tokenizer\.json; expected token ids"),
    "damaged tokenizer": (damaged_tokenizer, r"tokenizer\.json is damaged"),
    "unreadable text": (
        text_file(LATIN, "eval", "--text", "TEXT", "--model", "tiny"),
        r"text\.txt cannot be read as UTF-8",
    ),
    "no text": (plain("eval", "--text", "NOWHERE", "--model", "tiny"), r"nowhere cannot be read .*No such file"),
    "a folder as text": (plain("eval", "--text", "FOLDER", "--model", "tiny"), r"cannot be read"),
    "empty text": (plain("eval", "--text", "TEXT", "--model", "tiny"), r"text holds 0 tokens; expected at least 2"),
    "context of one": (
        text_file(b"some text", "eval", "--text", "TEXT", "--model", "tiny", "--context", "1"),
        r"context is 1; expected 2 to 1048576",
    ),
    "fewer than no tokens": (
        text_file(b"some text", "eval", "--text", "TEXT", "--model", "tiny", "--tokens", "-3"),
        r"tokens is -3; expected at least 2",
    ),
    "negative training seed": (
        text_file(b"x" * 999, "train", "--text", "TEXT", "--out", "OUT", "--preset", "tiny", "--seed", "-1"),
        r"seed is -1; expected 0 to",
    ),
    "unreadable training text": (
        text_file(LATIN, "train", "--text", "TEXT", "--out", "OUT", "--preset", "tiny"),
        r"cannot be read as UTF-8",
    ),
    "no training text": (plain("train", "--text", "NOWHERE", "--out", "OUT"), r"nowhere cannot be read"),
    "short training text": (
        text_file(b"x" * 100, "train", "--text", "TEXT", "--out", "OUT", "--preset", "tiny"),
        r"text holds 91 tokens; expected more than one window",
    ),
    "text too short for the last stage": (
        text_file(b"x" * 300, "train", "--text", "TEXT", "--out", "OUT", "--preset", "tiny", "--steps", "2"),
        r"text holds 271 tokens; expected more than one window of 512",
    ),
    "no steps": (
        text_file(b"x" * 999, "train", "--text", "TEXT", "--out", "OUT", "--preset", "tiny", "--steps", "0"),
        r"steps is 0; expected at least 1",
    ),
    "a file as output": (
        text_file(b"x" * 999, "train", "--text", "TEXT", "--out", "TEXT", "--preset", "tiny"),
        r"text\.txt exists and is not empty; expected a new directory",
    ),
    "negative temperature": (plain("generate", "A", "--temperature", "-1"), r"temperature is -1\.0; expected"),
    "temperature that is no number": (plain("generate", "A", "--temperature", "nan"), r"temperature is nan; expected"),
    "infinite temperature": (plain("generate", "A", "--temperature", "inf"), r"temperature is inf; expected"),
    "no tokens": (plain("generate", "A", "--max-tokens", "0"), r"max_tokens is 0; expected at least 1"),
    "top none": (plain("generate", "A", "--top-k", "0"), r"top_k is 0; expected at least 1"),
    "seed too large": (
        plain("generate", "A", "--model", "tiny", "--seed", str(2**64)),
        r"seed is 18446744073709551616",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = MISTAKES[name]
    arguments = make(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1 and err.endswith("\n")
    assert err.startswith("nanoglm: ") and re.search(words, err), err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["truncated shard", "pattern begins with S"])
def test_a_mistake_through_the_real_command(name: str, tmp_path: Path) -> None:
    make, words = MISTAKES[name]
    arguments = make(tmp_path)
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "nanoglm.cli", *arguments], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"nanoglm: .*{words}.*\n", done.stderr), done.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code in (0, None)
    assert "usage: nanoglm" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sing"], ["generate", "--temperature", "warm"], ["eval"]])
def test_usage_errors_have_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------- the bundled model
@pytest.fixture
def bundled() -> Iterator[None]:
    if not (DEFAULT_MODEL / "config.json").is_file():
        pytest.skip("the bundled model is not in this tree (nanoglm/assets/nano)")
    yield


def test_demo_tells_what_index_share_saved(bundled: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "It was a dark evening", "--max-tokens", "24"])
    out = capsys.readouterr().out
    assert out.startswith("It was a dark evening")
    assert "4 Full + 8 Shared (FFSSSFSSSFSS)" in out
    found = re.search(r"IndexShare +([\d.]+)% of the indexer work removed \(([\d,]+) of ([\d,]+) pairs scored\)", out)
    assert found is not None
    share, scored, everywhere = (float(group.replace(",", "")) for group in found.groups())
    assert share == pytest.approx(100 * (1 - scored / everywhere), abs=0.06)
    # 21 bytes of prompt, 23 tokens fed back, and refused drafts: each sees itself and those before, in 8 layers less.
    pairs = (everywhere - scored) / 8
    assert pairs >= 44 * 45 // 2
    # 4 layers score them, and the MTP layer what it read: not more than they.
    assert 4 * pairs + 21 * 22 // 2 <= scored <= 5 * pairs
    accepted, drafted = map(int, re.search(r"\((\d+) of (\d+) drafts accepted\)", out).groups())
    assert 0 < accepted <= drafted
    assert re.search(r"speed\s+[\d.]+ tokens/s", out)
    assert re.search(r"cache\s+[\d,]+ bytes per token", out)
