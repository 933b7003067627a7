"""A run of several processes goes on on one, and the other way, and so does one with other groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn

from nanoglm import load
from nanoglm.config import GLMConfig
from nanoglm.errors import CheckpointError, InputError
from nanoglm.model import GLM
from nanoglm.train import checkpoint, trainer
from nanoglm.train.data import Tokens
from nanoglm.train.parallel import Ranks, gathered, leave, parallelise
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, long
from nanoglm.train.trainer import Keep, train

TEXT = Tokens.of(np.random.default_rng(0).integers(32, 120, 3000).astype(np.uint16))
STAGES = (dense(0.34, 32), indexer_warmup(0.33, 32), long(0.33, 64))
RECIPE = Recipe("tiny", steps=6, tokens=128, stages=STAGES, warmup=2, optimizer="muon")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def build(dtype: torch.dtype = torch.float64) -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.15)).initialise(0).to(dtype)


def go(
    folder: Path | None, ranks: Ranks | None = None, stop: int | None = None, dtype=torch.float64
) -> dict[str, Tensor]:
    """Trains, up to a step, and keeps the run there; what it ends with, whole."""
    model = build(dtype) if ranks is None else parallelise(build(dtype), ranks)
    real = trainer.backward

    def limited(model, sample, recipe, now, *rest, **options):
        if now == stop:
            raise RuntimeError("stopped")
        return real(model, sample, recipe, now, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "backward", limited)
        try:
            train(model, TEXT, RECIPE, Keep(checkpoint=folder, save_every=stop or 99, quiet=True), ranks)
        except RuntimeError as error:
            assert str(error) == "stopped"
    state = model.state_dict()
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in state.items()}


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found, shared = {}, Ranks(2, 2)
    go(folder / "two-one", shared, stop=3)
    go(folder / "two-two", shared, stop=4)
    found["other groups"] = go(folder / "two-two", Ranks())
    found["never stopped"] = go(None, shared)
    go(folder / "same", shared, stop=3)
    found["same groups"] = go(folder / "same", shared)
    found["one-two"] = go(folder / "one-two", shared, dtype=torch.float32)
    with pytest.raises(InputError, match="cannot be written"):
        go(folder / "store" / "under a file", shared)
    whole = gathered(parallelise(build(), shared), shared)
    assert (whole is None) == (rank == 1)
    if whole is not None:
        torch.save(found, folder / "found.pt")
        torch.testing.assert_close(whole.state_dict(), build().float().state_dict())
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left there. Before them, one began ``one-two``."""
    path = tmp_path_factory.mktemp("two")
    go(path / "one-two", stop=3, dtype=torch.float32)
    spawn(_work, (path,), 2)
    return path


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return go(None)


def test_two_then_one(folder: Path, alone: dict[str, Tensor]) -> None:
    assert json.loads((folder / "two-one" / checkpoint.NUMBERS).read_text())["step"] == 3
    torch.testing.assert_close(go(folder / "two-one"), alone, **EXACT)


def test_one_then_two(folder: Path) -> None:
    found = torch.load(folder / "found.pt")["one-two"]
    torch.testing.assert_close(found, go(None, dtype=torch.float32), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(go(folder / "one-two", dtype=torch.float32), found, rtol=0, atol=0)  # finished, by two


def test_two_then_two(folder: Path, alone: dict[str, Tensor]) -> None:
    found = torch.load(folder / "found.pt")
    torch.testing.assert_close(found["other groups"], alone, **EXACT)
    torch.testing.assert_close(found["same groups"], found["never stopped"], rtol=0, atol=0)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]  # nothing half-written


def test_another_run_and_damage_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"rate is 0\.1; expected 0\.008, with which the run began"):
        train(build(), TEXT, replace(RECIPE, rate=0.1), Keep(checkpoint=folder / "two-two"))
    with pytest.raises(CheckpointError, match="holds another model"):
        other = GLM(GLMConfig.preset("tiny").replace(index_topk=8)).initialise(0)
        train(other, TEXT, RECIPE, Keep(checkpoint=folder / "two-two"))
    shard = next((folder / "two-two").glob("__0_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        train(build(), TEXT, RECIPE, Keep(checkpoint=folder / "two-two"))


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command on two processes, stopped and gone on with; one process writes as much."""
    (tmp_path / "text.txt").write_text("It was a dark evening in November. " * 80)
    command = [
        "-m", "nanoglm.cli", "train", "--text", str(tmp_path / "text.txt"), "--preset", "tiny", "--steps", "6",
        "--tokens", "512", "--stages.0.length", "128", "--stages.1.length", "128", "--stages.2.length", "128",
        "--validate-every", "3", "--save-every", "2", "--warmup", "2",
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *command]
    shared = ["--expert-ranks", "2", "--context-ranks", "2"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    two = run(*torchrun, *shared, "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr[-3000:]
    one = run(*command, "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-3000:]
    lines = [[json.loads(line) for line in (tmp_path / name / "train.jsonl").open()] for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 4  # first and last step, two validations: one rank alone writes
    for a, b in zip(*lines, strict=True):
        assert a.pop("seconds") and b.pop("seconds")
        assert a == {name: pytest.approx(value, abs=2e-3) for name, value in b.items()}
    assert two.stderr.count("peak memory") == 1
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert written == {path.name for path in (tmp_path / "one").iterdir()} - {"shared_indexers.safetensors"}
    load(tmp_path / "two")

    again = run(*torchrun, *shared, "--out", str(tmp_path / "two"))
    assert again.returncode != 0 and again.stderr.count("exists and is not empty") == 1
    odd = run(*torchrun, "--expert-ranks", "3", "--out", str(tmp_path / "odd"))
    assert "expert_ranks is 3; expected a divisor of the 2 processes" in odd.stderr
    alone = run(*command, *shared, "--out", str(tmp_path / "alone"))
    assert alone.returncode == 2
    assert "expert_ranks is 2 and context_ranks 2; expected 1 without torchrun" in alone.stderr
