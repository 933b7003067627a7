"""``nanoglm train --fit 12GB``: how much of a step goes through the model at once, so that a budget of memory holds.

Nothing is estimated: a process of its own does one step of every stage with random tokens, and its peak is read.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.memory import peak_memory
from nanoglm.model import GLM
from nanoglm.train.data import Sample
from nanoglm.train.recipe import Recipe
from nanoglm.train.trainer import Keep, train


def fit(
    recipe: Recipe, config: GLMConfig, budget: float, device: str = "cpu",
    tell: Callable[[str], None] = lambda line: None,
) -> Recipe:  # fmt: skip
    """The recipe with the largest ``pass_tokens`` whose measured peak is within the budget: all of a step, half of it,
    a quarter, ... down to one sequence.

    Args:
        budget: bytes, of the process on a CPU and of the device otherwise. tell: gets a line for each try.

    Raises:
        InputError: one sequence of the longest stage takes more.
    """
    longest = max(stage.length for stage in recipe.stages)
    size = recipe.tokens
    while True:
        fitted = replace(recipe, pass_tokens=size)
        peak = measure(fitted, config, device)
        tell(f"fit: passes of {size:,} tokens take {peak:.2f} GB of {budget / 1e9:g} GB")
        if peak * 1e9 <= budget:
            return fitted
        if size == longest:
            raise InputError(f"fit is {budget / 1e9:g} GB; expected at least {peak:.2f} GB, which one sequence takes")
        size = max(size // 2, longest)


def measure(recipe: Recipe, config: GLMConfig, device: str = "cpu") -> float:
    """Peak GB of one step of each stage, in a process of its own; infinite if the system ended that process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_steps, args=(theirs, recipe, config, device))
    process.start()
    theirs.close()
    try:
        found: float = ours.recv()
    except EOFError:
        found = float("inf")
    process.join()
    return found


class _Noise:
    """A source of random tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.generator = vocabulary, torch.Generator().manual_seed(0)

    def take(self, length: int, count: int) -> Sample:
        return Sample.of(torch.randint(0, self.vocabulary, (count, length + 1), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _steps(pipe: Connection, recipe: Recipe, config: GLMConfig, device: str) -> None:
    """The first step of each stage, by the trainer."""
    model, noise = GLM(config).initialise(0).to(device), _Noise(config.vocab_size)
    try:
        for stage in recipe.stages:
            once = replace(recipe, steps=1, stages=(replace(stage, share=1.0),))
            train(model, {stage.data: noise}, once, Keep(quiet=True))
    except torch.OutOfMemoryError:
        pipe.send(float("inf"))
        return
    pipe.send(torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else peak_memory() or float("inf"))
