"""The trainer: steps through a recipe's stages, logged, validated and kept so that it can go on.

dense            next-token and MTP loss, dense attention
indexer_warmup   the indexers alone learn dense attention (KL), the backbone rests
sparse, long     attention under Selections; indexers learn from the selected set
sft              the same on conversations
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from nanoglm.config import FULL
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.train import losses, optim
from nanoglm.train.checkpoint import NUMBERS, Progress, restore, write
from nanoglm.train.data import Sample, Source, Tokens, Windows
from nanoglm.train.objective import backward, balance
from nanoglm.train.parallel import Ranks, reshard
from nanoglm.train.precision import low_copy, refresh
from nanoglm.train.recipe import Recipe, indexer_warmup
from nanoglm.train.validate import Validation


@dataclass(frozen=True)
class Keep:
    """Where a run leaves its traces, and how often, in steps.

    Attributes:
        log: JSON lines: losses every ``log_every`` steps, validation every ``validate_every``.
        checkpoint: a directory to keep the run in: before the first step, every ``save_every`` steps, at the end.
        validation: what to validate with. sample: writes some text, shown with each validation.
        board: a directory for TensorBoard. quiet: nothing on standard error.
    """

    log: Path | None = None
    log_every: int = 20
    checkpoint: Path | None = None
    save_every: int = 500
    validation: Validation | None = None
    validate_every: int = 200
    sample: Callable[[], str] | None = None
    board: Path | None = None
    quiet: bool = False


def optimizers(model: GLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW in three groups (matrices, the rest of the backbone without decay, indexers) and, if asked for, Muon for
    the matrices that it is for. A group says in ``indexer`` whether it is the indexers', which have their own rate."""
    found = optim.groups(model)
    muon = recipe.optimizer == "muon"
    matrices = found.matrices + ([] if muon else [p for group in found.cut.values() for p in group])
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay, "indexer": False},
            {"params": found.vectors, "weight_decay": 0.0, "indexer": False},
            {"params": found.indexers, "weight_decay": 0.0, "indexer": True},
        ],
        betas=(0.9, 0.95),
        foreach=True,
    )
    if not muon:
        return [adamw]
    pieces = [{"params": group, "cut": cut, "indexer": False} for cut, group in found.cut.items()]
    return [adamw, optim.Muon(pieces, weight_decay=recipe.weight_decay)]


def train(
    model: GLM,
    data: Tokens | Mapping[str, Source],
    recipe: Recipe,
    keep: Keep | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any] | None:
    """Trains ``model`` in place. Returns the last validation, if there is one.

    Args:
        data: a text, or by the stages' ``data`` where their samples come from.
        keep: log, checkpoint and validation. If the checkpoint holds this run already, the run goes on from there, bit
            by bit as if it had not stopped (on the same machine with as many threads).
        ranks: the processes that share the run; the model is parallelised already. All of them validate, the first
            alone logs. How many there are may change when a run goes on.

    Raises:
        InputError, CheckpointError: the checkpoint cannot be written or is of another run.
    """
    if ranks is not None and recipe.dtype != "float32":
        raise InputError(f"dtype is {recipe.dtype}; expected float32 on several processes")
    sources = {"text": Windows(data, recipe.seed)} if isinstance(data, Tokens) else data
    run = _Run(model, sources, recipe, keep or Keep(), ranks)
    run.resume()
    while run.progress.step < recipe.steps:
        run.step()
    return run.validated


@dataclass
class _Run:
    """A run under way."""

    model: GLM
    sources: Mapping[str, Source]
    recipe: Recipe
    keep: Keep
    ranks: Ranks | None = None
    progress: Progress = field(default_factory=Progress)
    validated: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.movers, self.parts = optimizers(self.model, self.recipe), optim.groups(self.model)
        self.worker = self.model if self.recipe.dtype == "float32" else low_copy(self.model)
        self.speaks = self.ranks is None or self.ranks.first
        self.console = Console(stderr=True, highlight=False, quiet=self.keep.quiet or not self.speaks)
        self.device = self.model.lm_head.weight.device
        self.board = _board(self.keep.board) if self.keep.board is not None and self.speaks else None

    def resume(self) -> None:
        """Goes on from the checkpoint, or begins it: an unwritable directory is found now, not after an hour."""
        directory = self.keep.checkpoint
        if directory is not None and (directory / NUMBERS).is_file():
            self.progress = restore(directory, self.model, self.movers, self.recipe)
            for name, state in self.progress.sources.items():
                self.sources[name].load_state_dict(state)
            if self.speaks:
                _forget(self.keep.log, self.progress.step)
        elif directory is not None:
            write(directory, self.model, self.movers, self.progress, self.recipe, self.ranks)
        self.began = time.perf_counter() - self.progress.seconds

    def step(self) -> None:
        """One step of the recipe, with all that is due behind it."""
        number, recipe, keep = self.progress.step, self.recipe, self.keep
        stage = recipe.stage(number)
        if (base := recipe.rope_theta(number)) is not None and base != self.model.config.rope_theta:
            self.model.config = self.model.config.replace(rope_theta=base)
        for parameter in self.parts.backbone:
            parameter.requires_grad_(stage.backbone or self.ranks is not None)  # see objective.backward: sharded
        if self.worker is not self.model:
            refresh(self.worker, self.model)
        source = self.sources[stage.data]
        means = self.move(number, source.take(stage.length, recipe.tokens // stage.length).to(self.device))
        self.progress.step = number + 1
        self.progress.sources[stage.data] = source.state_dict()
        self.progress.seconds = time.perf_counter() - self.began
        last = self.progress.step == recipe.steps
        if number % keep.log_every == 0 or last:
            self.tell({"step": number, "stage": stage.name} | {k: round(float(v), 4) for k, v in means.items()})
        if keep.validation is not None and (self.progress.step % keep.validate_every == 0 or last):
            self.validated = keep.validation.run(self.model, stage.attention)
            if self.ranks is not None:
                reshard(self.model)
            self.tell({"step": number, "stage": stage.name} | self.validated)
            if keep.sample is not None:
                self.console.print(f"  {keep.sample()!r}", markup=False, style="dim")
        if keep.checkpoint is not None and (self.progress.step % keep.save_every == 0 or last):
            write(keep.checkpoint, self.model, self.movers, self.progress, recipe, self.ranks)

    def move(self, number: int, sample: Sample) -> dict[str, Tensor]:
        """Gradients, clipping, the optimisers' step and the routers' balance; returns the mean losses."""
        recipe = self.recipe
        rate, indexer_rate = recipe.rates(number)
        for group in (group for mover in self.movers for group in mover.param_groups):
            group["lr"] = indexer_rate if group["indexer"] else rate
        clip: Callable[[list[Tensor], float], object] = torch.nn.utils.clip_grad_norm_
        if self.ranks is None:
            done = backward(self.worker, sample, recipe, number)
        else:
            sample, clip = self.ranks.share(sample, recipe.pass_tokens), self.ranks.clip
            done = backward(self.model, sample, recipe, number, self.ranks.total, sharded=True)
            reshard(self.model)
            for parameter in self.parts.backbone if not recipe.stage(number).backbone else ():
                parameter.grad = None  # zeros, which would still age the optimisers' state
        clip(self.parts.backbone, 1.0)
        clip(self.parts.indexers, 1.0)  # apart, or a large KL would slow the backbone
        for mover in self.movers:
            mover.step()
            mover.zero_grad()
        if recipe.stage(number).backbone and not recipe.is_late(number):
            balance(self.model, done.loads, recipe.balance_rate)
        return done.means

    def tell(self, line: dict[str, Any]) -> None:
        """A line on standard error and in the log."""
        line |= {"seconds": round(self.progress.seconds, 1)}
        left = self.progress.seconds / self.progress.step * (self.recipe.steps - self.progress.step)
        shown = " ".join(f"{name} {value}" for name, value in line.items())
        self.console.print(f"{shown} left {timedelta(seconds=round(left))}", markup=False)
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, line["step"])
        if self.keep.log is not None and self.speaks:
            with self.keep.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _board(directory: Path) -> Any:
    try:
        return import_module("torch.utils.tensorboard").SummaryWriter(str(directory))
    except ImportError:
        raise InputError("tensorboard is not installed; expected pip install tensorboard") from None


def _forget(log: Path | None, step: int) -> None:
    """Takes the lines of steps that are done again out of a log."""
    if log is not None and log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        log.write_text("".join(kept), encoding="utf-8")


def shared_indexers(model: GLM, text: Tokens, recipe: Recipe) -> dict[str, Tensor]:
    """Indexers for the Shared layers, for comparison with all-Full: the backbone rests, each starts as
    its source's copy and learns its own layer's attention. Returns their tensors by name."""
    config = model.config.replace(indexer_types=(FULL,) * model.config.num_hidden_layers)
    full = GLM(config).initialise(recipe.seed).to(model.lm_head.weight.device)
    full.load_state_dict(model.state_dict(), strict=False)
    wanted: dict[str, Tensor] = {}
    for source, layers in losses.groups(model.config.full_layers, config.num_hidden_layers).items():
        for layer in layers[1:]:
            indexer = full.layers[layer].self_attn.indexer
            original = model.layers[source].self_attn.indexer
            assert indexer is not None and original is not None
            indexer.load_state_dict(original.state_dict())
            prefix = f"model.layers.{layer}.self_attn.indexer."
            wanted |= {prefix + name: parameter for name, parameter in indexer.named_parameters()}
    if not wanted:
        return {}
    resting = [stage for stage in recipe.stages if not stage.backbone]
    steps = max(1, int(recipe.steps * sum(stage.share for stage in resting)))
    stage = indexer_warmup(1.0, resting[0].length if resting else recipe.stages[0].length)
    train(full, text, replace(recipe, steps=steps, stages=(stage,), seed=recipe.seed + 1))
    return {name: parameter.detach().to(torch.bfloat16) for name, parameter in wanted.items()}
