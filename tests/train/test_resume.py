"""A run that stops goes on as if it had not: at every step, at stage borders, and after kill -9."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoglm import load
from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.errors import CheckpointError, InputError
from nanoglm.model import GLM
from nanoglm.train import checkpoint, trainer
from nanoglm.train.data import Tokens
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse
from nanoglm.train.trainer import Keep, train
from nanoglm.train.validate import Validation

TEXT = Tokens.of(np.random.default_rng(0).integers(32, 120, 900).astype(np.uint16))
# Dense 0 to 3, warm-up 4 and 5, sparse 6 to 9, other windows there.
STAGES = (dense(0.4, 32), indexer_warmup(0.2, 32), sparse(0.4, 64, indexer_every=2))
RECIPE = Recipe("tiny", steps=10, tokens=64, pass_tokens=32, stages=STAGES)
HELD = Validation(Tokens.of(np.random.default_rng(1).integers(32, 120, 100).astype(np.uint16)), 32)


def build() -> GLM:
    return GLM(GLMConfig.preset("tiny")).initialise(0)


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run ends with an error before it does that step."""
    real = trainer.backward

    def limited(model, sample, recipe, now):
        if now == step:
            raise RuntimeError("stopped")
        return real(model, sample, recipe, now)

    monkeypatch.setattr(trainer, "backward", limited)


def logged(log: Path | None) -> list[dict[str, float]]:
    """Its lines without the seconds, which must rise."""
    assert log is not None
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = [line.pop("seconds") for line in lines]
    assert seconds == sorted(seconds)
    return lines


@pytest.mark.parametrize(
    ("optimizer", "every", "dtype"),
    [("adamw", 1, "float32"), ("adamw", 3, "float32"), ("muon", 2, "float32"), ("muon", 3, "bfloat16")],
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, optimizer: str, every: int, dtype: str) -> None:
    """Stopped before each step in turn; with savings every 3 steps up to two steps are done again."""
    recipe = replace(RECIPE, optimizer=optimizer, dtype=dtype)
    keep = Keep(tmp_path / "whole.jsonl", log_every=3, save_every=every, validation=HELD, validate_every=4)
    whole = build()
    train(whole, TEXT, recipe, keep)
    for stop in range(1, 10):
        own = replace(keep, checkpoint=tmp_path / f"stop{stop}", log=tmp_path / f"stop{stop}.jsonl")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
            stop_before(patch, stop)
            train(build(), TEXT, recipe, own)
        again = build()
        train(again, TEXT, recipe, own)
        for name, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), (stop, name)
        assert logged(own.log) == logged(keep.log)


def test_a_checkpoint_is_a_model_like_any_other(tmp_path: Path) -> None:
    model = build()
    train(model, TEXT, RECIPE, Keep(checkpoint=tmp_path / "run", save_every=4))
    loaded = load(tmp_path / "run").module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "run" / checkpoint.NUMBERS).read_text())["step"] == 10


def test_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        stop_before(patch, 2)
        train(build(), TEXT, RECIPE, Keep(checkpoint=tmp_path, save_every=1))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"rate is 0\.1; expected 0\.008, with which the run began"):
        train(build(), TEXT, replace(RECIPE, rate=0.1), Keep(checkpoint=tmp_path))
    with pytest.raises(CheckpointError, match="holds another model"):
        other = GLM(GLMConfig.preset("tiny").replace(index_topk=8)).initialise(0)
        train(other, TEXT, RECIPE, Keep(checkpoint=tmp_path))
    numbers = tmp_path / checkpoint.NUMBERS
    for damage in ("", "{}", '{"step": 1, "seconds": 1, "sources": 3, "recipe": {}}'):
        numbers.write_text(damage)
        with pytest.raises(CheckpointError, match="damaged"):
            train(build(), TEXT, RECIPE, Keep(checkpoint=tmp_path))
    numbers.write_bytes(before[checkpoint.NUMBERS])
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_the_command_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("It was a dark evening in November. " * 60)
    command = ["train", "--text", str(tmp_path / "text.txt"), "--preset", "tiny", "--steps", "4"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        stop_before(patch, 3)
        main([*command, "--out", str(tmp_path / "a"), "--save-every", "1"])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"train.jsonl", "training"}
    with pytest.raises(SystemExit):  # not by accident over an unfinished run
        main([*command, "--out", str(tmp_path / "a")])
    assert "not empty" in capsys.readouterr().err
    main([*command, "--out", str(tmp_path / "a"), "--resume"])
    main([*command, "--out", str(tmp_path / "b")])
    for file in ("model.safetensors", "shared_indexers.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not (tmp_path / "a" / "training").exists()
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "b"), "--resume"])
    assert "holds no unfinished run" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_passes_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another try might fit another size, and other passes add in another order."""
    (tmp_path / "text.txt").write_text("It was a dark evening in November. " * 60)
    stages = ["--tokens", "1024", "--stages.2.length", "256", "--steps", "4", "--save-every", "1"]
    command = ["train", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "a"), "--preset", "tiny"]
    monkeypatch.setattr("nanoglm.train.run.fit", lambda recipe, *_: replace(recipe, pass_tokens=512))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        stop_before(patch, 2)
        main([*command, *stages, "--fit", "1GB"])
    monkeypatch.setattr("nanoglm.train.run.fit", lambda recipe, *_: replace(recipe, pass_tokens=256))
    main([*command, *stages, "--fit", "1GB", "--resume"])
    assert (tmp_path / "a" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_corrupt_nothing(tmp_path: Path) -> None:
    """kill -9 at random moments of training and saving, always resumed: the same bits at the end."""
    (tmp_path / "text.txt").write_text("It was a dark evening in November. " * 60)
    arguments = ["--text", str(tmp_path / "text.txt"), "--preset", "tiny", "--steps", "60", "--save-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from nanoglm.cli import main; main()", "train", *arguments]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    rng, kills, out = random.Random(0), 0, tmp_path / "killed"
    while True:
        begun = (out / "training" / checkpoint.NUMBERS).is_file()
        process = subprocess.Popen(
            [*command, "--out", str(out), *(["--resume"] if begun else [])], env=environment,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if kills < 20:
            # Long enough to get under way, so that most kills meet a step or a saving.
            deadline, numbers = time.time() + 60, out / "training" / checkpoint.NUMBERS
            was = numbers.stat().st_mtime_ns if begun else 0
            while time.time() < deadline and process.poll() is None:
                if numbers.is_file() and numbers.stat().st_mtime_ns != was:
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)
            if process.poll() is None:
                process.kill()
                kills += 1
                process.wait()
                continue
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
        break
    assert kills == 20
    for file in ("model.safetensors", "shared_indexers.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
