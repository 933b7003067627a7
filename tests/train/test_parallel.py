"""Several processes train what one trains: losses and parameters, in fp64 to 1e-9; tokens really travel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.train import trainer
from nanoglm.train.data import Sample, Tokens
from nanoglm.train.parallel import Ranks, check_pipeline, leave, parallelise
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse
from nanoglm.train.trainer import Keep, train

TEXT = Tokens.of(np.random.default_rng(0).integers(32, 120, 3000).astype(np.uint16))
STAGES = (dense(0.4, 32), indexer_warmup(0.2, 32), sparse(0.4, 32, indexer_every=2))
RECIPE = Recipe("tiny", steps=5, tokens=256, pass_tokens=64, stages=STAGES, warmup=2, optimizer="muon")


def build(dtype: torch.dtype) -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.15)).initialise(0).to(dtype)


def record(patch: pytest.MonkeyPatch | None = None) -> list[dict[str, float]]:
    """Collects each step's mean losses, unrounded, from now on; of this process for good, if nothing undoes it."""
    means: list[dict[str, float]] = []
    real = trainer.backward

    def recorded(*arguments: Any, **options: Any) -> Any:
        done = real(*arguments, **options)
        means.append({name: float(value) for name, value in done.means.items()})
        return done

    (patch or pytest.MonkeyPatch()).setattr(trainer, "backward", recorded)
    return means


def whole(model: GLM) -> dict[str, Tensor]:
    """Parameters and buffers, each gathered from all ranks."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def _work(rank: int, world: int, expert: int, recipe: Recipe, dtype: torch.dtype, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    ranks = Ranks(expert)
    model = parallelise(build(dtype), ranks)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    means = record()
    train(model, TEXT, recipe, Keep(quiet=True), ranks)
    state = whole(model)
    found: list[Any] = [None] * world
    dist.all_gather_object(found, (held, ranks.sent))
    if rank == 0:
        torch.save({"state": state, "ranks": found, "means": means}, f"{folder}/found.pt")
    leave()


def together(world: int, expert: int, recipe: Recipe, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    spawn(_work, (world, expert, recipe, dtype, str(folder)), world)
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


def check(world: int, expert: int, recipe: Recipe, dtype: torch.dtype, folder: Path) -> None:
    alone = build(dtype)
    with pytest.MonkeyPatch.context() as patch:
        means = record(patch)
        train(alone, TEXT, recipe, Keep(quiet=True))
    found = together(world, expert, recipe, dtype, folder)
    limit = 1e-9 if dtype is torch.float64 else 1e-5
    assert len(means) == recipe.steps
    for step, (one, many) in enumerate(zip(means, found["means"], strict=True)):
        assert many.keys() == one.keys()
        for name in one:
            assert many[name] == pytest.approx(one[name], abs=limit), (step, name)
    if dtype is torch.float64:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(found["state"][name], value, rtol=limit, atol=limit, msg=name)
    parameters = sum(p.numel() for p in alone.parameters())
    for held, sent in found["ranks"]:
        assert held == pytest.approx(parameters / world, rel=0.1)
        assert (sent > 0) == (expert > 1)


@pytest.mark.parametrize("expert", [1, 2], ids=["fsdp", "expert"])
def test_two_processes_are_one(expert: int, tmp_path: Path) -> None:
    check(2, expert, RECIPE, torch.float64, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("world", "expert"), [(2, 1), (2, 2), (4, 2)])
def test_twenty_steps(world: int, expert: int, dtype: torch.dtype, tmp_path: Path) -> None:
    check(world, expert, replace(RECIPE, steps=20), dtype, tmp_path)


def test_experts_that_nobody_visits_hang_nothing(tmp_path: Path) -> None:
    """One expert of eight a token, and few tokens: ranks own experts without a token, and send none."""
    spawn(_lonely, (str(tmp_path),), 2)


def _lonely(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    config = GLMConfig.preset("tiny").replace(num_experts_per_tok=1)
    model = GLM(config).initialise(0)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[0] = 100.0  # all tokens choose expert 0
    train(parallelise(model, ranks := Ranks(2)), TEXT, replace(RECIPE, steps=2), Keep(quiet=True), ranks)
    assert (ranks.sent > 0) == (rank == 1)
    leave()


def test_what_several_processes_cannot_do_is_refused(tmp_path: Path) -> None:
    spawn(_refused, (str(tmp_path),), 2)


def _refused(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    ranks, part = Ranks(), Sample(torch.zeros(6).long(), torch.zeros(6).long(), (3, 2, 1))
    with pytest.raises(InputError, match="step has 3 sequences; expected a multiple of the 2 processes"):
        ranks.share(part, None)
    with pytest.raises(InputError, match="pass_tokens is 4; expected none on several processes"):
        ranks.share(Sample(part.ids[:5], part.targets[:5], (3, 2)), 4)
    with pytest.raises(InputError, match="expert is 3; expected a divisor of the 2 processes"):
        Ranks(3)
    with pytest.raises(InputError, match="checkpoint is .*; expected none, several processes cannot keep a run yet"):
        train(build(torch.float32), TEXT, RECIPE, Keep(checkpoint=Path(folder)), ranks)
    leave()


# ------------------------------------------------------------------------------- the pipeline's rule
def test_a_pipeline_stage_begins_with_a_full_layer() -> None:
    pattern = GLMConfig.preset("glm-5.2").pattern
    check_pipeline(pattern, (14, 12, 12, 12, 12, 16))
    check_pipeline(pattern, (14, *[8] * 6, 16))  # training spec 1.6
    with pytest.raises(InputError, match="stage 1 begins with layer 13, which is Shared; expected a Full one"):
        check_pipeline(pattern, (13, *[13] * 5))
    with pytest.raises(InputError, match="stages have 14, 8 layers; expected 78 together"):
        check_pipeline(pattern, (14, 8))
