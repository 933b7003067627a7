"""Damaged input of every kind: one sentence or a right answer, never a traceback, a hang or half a file.

Each example takes a good checkpoint (plain shards, FP8, stacked), damages its config.json, index file or a
shard at random, and runs a command on it. 500 examples here, 10,000 as ``slow``.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.model import GLM
from nanoglm.weights import Checkpoint, fp8, save

SECONDS = 10  # that one command may take; they take 0.05
INDEX = "model.safetensors.index.json"
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 64, 999, 2**20, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-300,
    1e308, float("nan"), float("inf"), "", "x", "full", "FSFS", "0", "../x", "\0", "é" * 50, [], [1], [None], ["full"],
    ["full", "shared"] * 2, ["sparse"] * 4, [[1]], [0] * 1000, {}, {"a": 1}, {"rope_theta": 1e4}, {"rope_theta": "x"},
    {"quant_method": "fp8"}, {"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]},
)  # fmt: skip


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three sound checkpoints of a few kilobytes."""
    folder = tmp_path_factory.mktemp("good")
    config = GLMConfig.preset("tiny").replace(
        hidden_size=16, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        index_n_heads=2, index_head_dim=4, index_topk=4, n_routed_experts=3, moe_intermediate_size=4,
        intermediate_size=8,
    )  # fmt: skip
    model = GLM(config).initialise(1)

    def beside(into: Path) -> None:
        byte_tokenizer().save(into / "tokenizer.json")

    save(model, folder / "plain", shard_bytes=8_000, beside=beside)
    save(model, folder / "fp8", dtype=fp8.DTYPE, scale_dtype=torch.float8_e8m0fnu, shard_bytes=8_000, beside=beside)
    save(model, folder / "stacked", dtype=torch.float32, layout="stacked", beside=beside)
    return [folder / name for name in ("plain", "fp8", "stacked")]


# ------------------------------------------------------------------------------- damage
def damage_json(value: Any, rng: random.Random) -> Any:
    """One change somewhere inside a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.25:
            other = rng.choice(list(value))
            return value | {key: value[other], other: value[key]}
        if kind < 0.35:
            return {(k + rng.choice("x.0") if k == key else k): v for k, v in value.items()}
        return value | {key: damage_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return rng.choice([value[:at], value + value[:1], [*value[:at], rng.choice(VALUES), *value[at + 1 :]]])
    if type(value) is int and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, value * 2, value * 1000, -value, float(value), str(value)])
    return rng.choice(VALUES)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """One change in raw bytes."""
    at = rng.randrange(len(data) + 1)
    near = rng.randrange(min(len(data), 400))  # where headers are
    return rng.choice([
        lambda: data[:at], lambda: data[:near], lambda: b"", lambda: data + rng.randbytes(rng.randrange(1, 40)),
        lambda: data[:near] + rng.randbytes(1) + data[near + 1 :],
        lambda: data[:at] + rng.randbytes(8) + data[at + 8 :], lambda: data[:near] + data[near + 3 :],
        lambda: b"[" * 100_000, lambda: rng.randbytes(200), lambda: b"\xef\xbb\xbf" + data,
        lambda: rng.randbytes(8) + data[8:],
    ])()  # fmt: skip


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is JSON still, and says something else."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    kind = rng.random()
    if kind < 0.3:
        header[name]["dtype"] = rng.choice(
            ["F64", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "U8", "F4", "BF16", "F32", 3, None]
        )
    elif kind < 0.6:
        header[name]["shape"] = damage_json(header[name]["shape"], rng)
    elif kind < 0.8:
        header[name]["data_offsets"] = damage_json(header[name]["data_offsets"], rng)
    else:
        header = damage_json(header, rng)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file of the checkpoint; returns what was done."""
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    index = [INDEX] if (folder / INDEX).exists() else []
    name = rng.choice(["config.json", "config.json", *index, rng.choice(shards)])
    file = folder / name
    kind = rng.random()
    if kind < 0.05:
        file.unlink()
        if rng.random() < 0.3:
            file.mkdir()
        return f"{name} removed"
    if kind < 0.3:
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    elif name.endswith(".json"):
        value = json.loads(file.read_text())
        for _ in range(rng.choice([1, 1, 2, 4])):
            value = damage_json(value, rng)
        file.write_text(json.dumps(value))
    else:
        file.write_bytes(damage_header(file.read_bytes(), rng))
    return name


# ------------------------------------------------------------------------------- commands
@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(arguments: list[str]) -> int:
    """The command's exit code; whatever it raises but SystemExit comes through."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within(SECONDS):
        try:
            main(arguments)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    assert code in (0, 2), err.getvalue()
    lines = err.getvalue().splitlines()
    assert (code == 0) == (not lines) and len(lines) <= 1, err.getvalue()
    assert all(line.startswith("nanoglm: ") and len(line) < 2000 for line in lines)
    return code


COMMANDS: tuple[Callable[[Path, Path], list[str]], ...] = (
    lambda model, out: ["generate", "ab", "--model", str(model), "--max-tokens", "2"],
    lambda model, out: ["inspect", str(model)],
    lambda model, out: ["slice", str(model), str(out), "--layers", "0-1", "--experts", "0-1"],
    lambda model, out: ["slice", str(model), str(out)],
    lambda model, out: ["plan", str(model), "--length", "4096", "--json", "--ram", "1GB"],
)


def survive(good: list[Path], folder: Path, seeds: range) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        model, out = folder / "model", folder / "out"
        shutil.copytree(rng.choice(good), model)
        what = damage(model, rng)
        before = {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}
        command = rng.choice(COMMANDS)(model, out)
        try:
            code = run(command)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {command[0]} after {what}: {error!r}") from error
        assert before == {p: p.read_bytes() for p in model.rglob("*") if p.is_file()}, seed
        assert {p.name for p in folder.iterdir()} <= {"model", "out"}, seed  # no temporary folder
        if out.exists():
            assert code == 0, seed
            Checkpoint(out).load()  # what was written is whole
            shutil.rmtree(out)
        seen[f"{command[0]} {'refused' if code else 'accepted'}"] += 1
        shutil.rmtree(model)
    print(f"\n{dict(seen)}")
    return seen


@pytest.mark.parametrize("part", range(2))
def test_damaged_checkpoints(good: list[Path], tmp_path: Path, part: int) -> None:
    seen = survive(good, tmp_path, range(250 * part, 250 * (part + 1)))
    refused = sum(n for name, n in seen.items() if name.endswith("refused"))
    assert refused >= 0.5 * 250 and seen["inspect accepted"] > 0  # both happen


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_damaged_checkpoints(good: list[Path], tmp_path: Path, part: int) -> None:
    survive(good, tmp_path, range(1000 + 2500 * part, 1000 + 2500 * (part + 1)))
