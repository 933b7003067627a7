"""What a run needs to go on as if it had never stopped: weights in fp32, optimisers, loaders, step.

A checkpoint is a model directory in Hugging Face's format, loadable as any other, with two files more: the optimisers'
tensors by parameter and name, and the numbers (``training.json``). It is replaced whole: a kill leaves the old one or
the new.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoglm.errors import CheckpointError, InputError
from nanoglm.model import GLM
from nanoglm.weights import Checkpoint, save

OPTIMIZERS, NUMBERS = "optimizers.safetensors", "training.json"


@dataclass
class Progress:
    """How far a run is: steps done, seconds they took, and of each source of samples its state."""

    step: int = 0
    seconds: float = 0.0
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


def write(
    directory: Path, model: GLM, movers: Iterable[torch.optim.Optimizer], progress: Progress, recipe: object
) -> None:
    """Raises InputError if the directory cannot be written."""
    assert is_dataclass(recipe) and not isinstance(recipe, type)

    def beside(folder: Path) -> None:
        save_file(_tensors(model, movers), folder / OPTIMIZERS, metadata={"format": "pt"})
        (folder / NUMBERS).write_text(json.dumps(asdict(progress) | {"recipe": asdict(recipe)}, indent=1) + "\n")

    save(model, directory, dtype=torch.float32, layout="stacked", beside=beside)


def restore(directory: Path, model: GLM, movers: Iterable[torch.optim.Optimizer], recipe: object) -> Progress:
    """Puts weights and optimisers back as they were and says how far the run is.

    Raises:
        InputError: the run had another recipe. CheckpointError: no such checkpoint, a damaged one or another model's.
    """
    assert is_dataclass(recipe) and not isinstance(recipe, type)
    progress, saved = _numbers(directory)
    try:
        tensors = load_file(directory / OPTIMIZERS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {error}") from None
    for name, value in json.loads(json.dumps(asdict(recipe))).items():  # tuples are lists there
        if saved.get(name) != value:
            raise InputError(f"{name} is {value}; expected {saved.get(name)}, with which the run began")
    loaded, _ = Checkpoint(directory).load()
    own = model.config
    if loaded.config.replace(extra=own.extra, rope_theta=own.rope_theta) != own:  # a stage may set another base
        raise CheckpointError(f"checkpoint {directory} holds another model; expected the one that the run began with")
    model.load_state_dict(loaded.state_dict())
    by_name = dict(model.named_parameters())
    movers = list(movers)
    for mover in movers:
        mover.state.clear()
    owner = {id(p): mover for mover in movers for group in mover.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(":")
        if name not in by_name:
            raise CheckpointError(f"checkpoint {directory} has optimiser state of {name}, which the model lacks")
        parameter = by_name[name]
        owner[id(parameter)].state[parameter][kind] = value.to(parameter.device) if value.ndim else value
    return progress


def kept_recipe(directory: Path) -> Mapping[str, Any]:
    """The recipe with which the kept run began, as plain values. Raises CheckpointError."""
    return _numbers(directory)[1]


def _numbers(directory: Path) -> tuple[Progress, Mapping[str, Any]]:
    try:
        numbers = json.loads((directory / NUMBERS).read_text())
        progress = Progress(int(numbers["step"]), float(numbers["seconds"]), dict(numbers["sources"]))
        return progress, dict(numbers["recipe"])
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {error}") from None


def _tensors(model: GLM, movers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}:{kind}": value.detach().clone()  # safetensors refuses what shares memory
        for mover in movers
        for p, state in mover.state.items()
        for kind, value in state.items()
    }
