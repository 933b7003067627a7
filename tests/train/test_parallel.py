"""Several processes train what one trains: losses and parameters, in fp64 to 1e-9; tokens and keys really travel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn

from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.train import trainer
from nanoglm.train.data import Sample, Tokens
from nanoglm.train.parallel import Ranks, check_pipeline, leave, parallelise
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, long, sparse
from nanoglm.train.trainer import Keep, train

TEXT = Tokens.of(np.random.default_rng(0).integers(32, 120, 3000).astype(np.uint16))
STAGES = (dense(0.2, 32), indexer_warmup(0.2, 32), sparse(0.4, 32, indexer_every=2), long(0.2, 64, rope_theta=2e4))
RECIPE = Recipe(
    "tiny", steps=5, tokens=256, pass_tokens=64, stages=STAGES, warmup=2, optimizer="muon", balance_weight=0.1,
    late=0.5, late_drafts="total_variation",
)  # fmt: skip
WHOLE = replace(RECIPE, pass_tokens=None)  # sequences of unlike lengths are not accumulated
LAYOUTS = {"fsdp": (1, 1), "expert": (2, 1), "context": (1, 2), "expert-context": (2, 2)}  # ranks that share


class Ragged:
    """A source of packed sequences of unlike lengths, one of a single token: some ranks have nothing of it."""

    def __init__(self) -> None:
        self.counts, self.taken = (40, 1, 9, 14), 0

    def take(self, length: int, count: int) -> Sample:
        ids = torch.from_numpy(TEXT.read(self.taken * 70, sum(self.counts) + 1).astype(np.int64))
        self.taken += 1
        return Sample(ids[:-1], ids[1:].where(torch.arange(64) % 5 > 0, -100), self.counts)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@dataclass
class Found:
    """What a run left: mean losses by step, tensors at its end; of each rank the parameters that it holds, the bytes
    that it sent for experts and for context, and the rows that it had in each step."""

    means: list[dict[str, float]]
    state: dict[str, Tensor]
    ranks: list[tuple[int, int, int, list[int]]]


def build(dtype: torch.dtype) -> GLM:
    return GLM(GLMConfig.preset("tiny").replace(initializer_range=0.15)).initialise(0).to(dtype)


def whole(model: GLM) -> dict[str, Tensor]:
    """Parameters and buffers, each gathered from all ranks."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def go(model: GLM, recipe: Recipe, ragged: bool = False, ranks: Ranks | None = None) -> Found:
    """Trains and collects, the losses unrounded."""
    means: list[dict[str, float]] = []
    rows: list[int] = []
    real = trainer.backward

    def recorded(model: GLM, sample: Sample, *arguments: Any, **options: Any) -> Any:
        done = real(model, sample, *arguments, **options)
        means.append({name: float(value) for name, value in done.means.items()})
        rows.append(len(sample.ids))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "backward", recorded)
        train(model, {"text": Ragged()} if ragged else TEXT, recipe, Keep(quiet=True), ranks)
    if ranks is None:
        return Found(means, whole(model), [])
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    each: list[Any] = [None] * ranks.world
    dist.all_gather_object(each, (held, ranks.sent, ranks.context.sent if ranks.context else 0, rows))
    return Found(means, whole(model), each)


@cache
def alone(recipe: Recipe, dtype: torch.dtype, ragged: bool = False) -> Found:
    return go(build(dtype), recipe, ragged)


def _work(rank: int, world: int, jobs: Mapping[str, Any], dtype: torch.dtype, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    found = {}
    for name, (layout, recipe, ragged) in jobs.items():
        ranks = Ranks(*layout)
        found[name] = go(parallelise(build(dtype), ranks), recipe, ragged, ranks)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    leave()


def together(world: int, jobs: Mapping[str, Any], dtype: torch.dtype, folder: Path) -> dict[str, Found]:
    """Runs each (layout, recipe, whether it is ragged) on so many processes."""
    spawn(_work, (world, jobs, dtype, str(folder)), world)
    found: dict[str, Found] = torch.load(folder / "found.pt", weights_only=False)
    return found


def check(one: Found, many: Found, layout: tuple[int, int], world: int) -> tuple[float, float]:
    """Asserts that both are one and returns how far apart losses and parameters are at most."""
    expert, context = layout
    assert len(one.means) == len(many.means) > 0
    assert all(a.keys() == b.keys() for a, b in zip(one.means, many.means, strict=True))
    exact = next(iter(one.state.values())).dtype is torch.float64
    losses = max(abs(a[name] - b[name]) for a, b in zip(one.means, many.means, strict=True) for name in a)
    parameters = max(float((many.state[name] - value).abs().max()) for name, value in one.state.items())
    assert losses <= (1e-9 if exact else 1e-5)
    assert parameters <= 1e-9 or not exact
    total = sum(value.numel() for name, value in one.state.items() if not name.endswith("correction_bias"))
    for held, tokens, keys, _ in many.ranks:
        assert held == pytest.approx(total / world, rel=0.1)
        assert (tokens > 0) == (expert > 1) and (keys > 0) == (context > 1)
    return losses, parameters


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """All layouts of two processes: they start once."""
    jobs: dict[str, Any] = {name: (layout, RECIPE, False) for name, layout in LAYOUTS.items()}
    jobs |= {f"ragged-{name}": (layout, WHOLE, True) for name, layout in LAYOUTS.items()}
    return together(2, jobs, torch.float64, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_are_one(name: str, two: dict[str, Found]) -> None:
    check(alone(RECIPE, torch.float64), two[name], LAYOUTS[name], 2)
    for *_, rows in two[name].ranks:
        assert rows == [RECIPE.tokens // 2] * RECIPE.steps


@pytest.mark.parametrize("name", LAYOUTS)
def test_sequences_of_unlike_lengths(name: str, two: dict[str, Found]) -> None:
    """Stretches that differ by a row, and a sequence of which one rank has none."""
    check(alone(WHOLE, torch.float64, True), two[f"ragged-{name}"], LAYOUTS[name], 2)
    rows = [rows for *_, rows in two[f"ragged-{name}"].ranks]
    assert [sum(each) for each in zip(*rows, strict=True)] == [64] * WHOLE.steps
    assert rows[0] == [31 if "context" in name else 41] * WHOLE.steps  # 20 + 0 + 4 + 7 of 40, 1, 9, 14


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("world", "layout"),
    [*((2, layout) for layout in LAYOUTS.values()), (4, (2, 1)), (4, (1, 2)), (4, (2, 2)), (4, (2, 4))],
)
def test_twenty_steps(world: int, layout: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=20)
    if dtype is torch.float32:  # at the full rate a rounding soon moves a choice of experts or keys, and all behind it
        recipe = replace(recipe, rate=3e-4, indexer_rate=3e-4)
    many = together(world, {"": (layout, recipe, False)}, dtype, tmp_path)[""]
    losses, parameters = check(alone(recipe, dtype), many, layout, world)
    print(f"{world} processes, (expert, context) {layout}, {dtype}: losses {losses:.1e}, parameters {parameters:.1e}")


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
    with pytest.raises(InputError, match="expert_ranks is 3; expected a divisor of the 2 processes"):
        Ranks(3)
    with pytest.raises(InputError, match="context_ranks is 0; expected a divisor of the 2 processes"):
        Ranks(1, 0)
    ranks = Ranks(1, 2)
    with pytest.raises(InputError, match="sequences have at most 1 tokens; expected at least 2, one for each rank"):
        ranks.share(Sample(part.ids[:2], part.targets[:2], (1, 1)), None)
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


# ------------------------------------------------------------------------------- the page
def test_launch_lines_of_the_page_are_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line's options exist, and ranks share nothing where there is no torchrun."""
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr("nanoglm.train.run.corpus", lambda *_: None)
    monkeypatch.setattr("nanoglm.train.run.run", lambda *_, **options: called.append((*shared, options["ranks"])))
    monkeypatch.setattr("nanoglm.train.parallel.launched", lambda e, c, _: nullcontext(shared.extend((e, c))))
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    lines = re.findall(r"`([^`|]*(?:nanoglm|nanoglm\.cli) train [^`]*)`", page)
    assert len(lines) == 5
    for line in lines:
        shared: list[Any] = []
        before, arguments = line.split(" train ")
        main(["train", *arguments.replace("...", "--text a --out b").split()])
        assert ("torchrun" in before) or called[-1][:2] == (1, 1)
    assert len(called) == 5
