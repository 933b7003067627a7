"""What a run needs to go on as if it had never stopped: weights in fp32, optimisers, loaders, step.

A checkpoint of one process is a model directory in Hugging Face's format, loadable as any other, with two files more:
the optimisers' tensors by parameter and name, and the numbers (``training.json``). Of several it is config.json, the
numbers and each process's shards (torch.distributed.checkpoint). Any number of processes goes on with either. It
is replaced whole: a kill leaves the old one or the new.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor

from nanoglm.config import GLMConfig
from nanoglm.errors import CheckpointError, InputError
from nanoglm.model import GLM
from nanoglm.train.parallel import Ranks
from nanoglm.weights import Checkpoint, replacing, save, write_config

OPTIMIZERS, NUMBERS = "optimizers.safetensors", "training.json"
Movers = Iterable[torch.optim.Optimizer]


@dataclass
class Progress:
    """How far a run is: steps done, seconds they took, and of each source of samples its state."""

    step: int = 0
    seconds: float = 0.0
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


def write(
    directory: Path, model: GLM, movers: Movers, progress: Progress, recipe: object, ranks: Ranks | None = None
) -> None:
    """Called by all processes of the run. Raises InputError if the directory cannot be written."""
    assert is_dataclass(recipe) and not isinstance(recipe, type)
    about = asdict(progress) | {"sharded": ranks is not None, "recipe": asdict(recipe)}
    numbers = json.dumps(about, indent=1) + "\n"
    if ranks is not None:
        _write_shards(directory, model, movers, numbers, ranks)
        return

    def beside(folder: Path) -> None:
        # safetensors refuses what shares memory
        tensors = {key: value.detach().clone() for key, value in _optimizer_tensors(model, movers).items()}
        save_file(tensors, folder / OPTIMIZERS, metadata={"format": "pt"})
        (folder / NUMBERS).write_text(numbers)

    save(model, directory, dtype=torch.float32, layout="stacked", beside=beside)


def _write_shards(directory: Path, model: GLM, movers: Movers, numbers: str, ranks: Ranks) -> None:
    with ExitStack() as stack:
        folder = ranks.first_does(lambda: stack.enter_context(replacing(directory)))
        try:
            save_shards(model.state_dict() | _optimizer_tensors(model, movers), checkpoint_id=folder)
        except CheckpointException as error:
            raise InputError(f"directory {directory} cannot be written: {_first(error)}") from None

        def finish() -> None:
            write_config(folder, model.config, torch.float32, torch.float32)
            (folder / NUMBERS).write_text(numbers)
            stack.close()

        ranks.first_does(finish)


def restore(directory: Path, model: GLM, movers: Movers, recipe: object) -> Progress:
    """Puts weights and optimisers back as they were and says how far the run is. Called by all processes of the run.

    Raises:
        InputError: the run had another recipe. CheckpointError: no such checkpoint, a damaged one or another model's.
    """
    assert is_dataclass(recipe) and not isinstance(recipe, type)
    progress, saved, sharded = _numbers(directory)
    for name, value in json.loads(json.dumps(asdict(recipe))).items():  # tuples are lists there
        if saved.get(name) != value:
            raise InputError(f"{name} is {value}; expected {saved.get(name)}, with which the run began")
    (_read_shards if sharded else _read_files)(directory, model, _State(model, list(movers), directory))
    return progress


class _State:
    """The optimisers' state, empty, to be filled by key."""

    def __init__(self, model: GLM, movers: list[torch.optim.Optimizer], directory: Path) -> None:
        self.by_name, self.directory = dict(model.named_parameters()), directory
        self.owner = {id(p): mover for mover in movers for group in mover.param_groups for p in group["params"]}
        for mover in movers:
            mover.state.clear()

    def parameter(self, key: str) -> Tensor:
        name = key.rpartition(":")[0]
        if name not in self.by_name:
            raise CheckpointError(f"checkpoint {self.directory} has optimiser state of {name}, which the model lacks")
        return self.by_name[name]

    def __setitem__(self, key: str, value: Tensor) -> None:
        parameter = self.parameter(key)
        self.owner[id(parameter)].state[parameter][key.rpartition(":")[2]] = value


@torch.no_grad()
def _read_files(directory: Path, model: GLM, state: _State) -> None:
    """Of one process."""
    try:
        tensors = load_file(directory / OPTIMIZERS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {error}") from None
    loaded, _ = Checkpoint(directory).load()
    _check_model(directory, loaded.config, model.config)
    values = loaded.state_dict()
    for name, target in model.state_dict().items():
        target.copy_(_like(target, values[name]))
    for key, value in tensors.items():
        state[key] = _like(state.parameter(key), value) if value.ndim else value


@torch.no_grad()
def _read_shards(directory: Path, model: GLM, state: _State) -> None:
    """Of several."""
    _check_model(directory, GLMConfig.from_file(directory), model.config)
    tensors = model.state_dict()
    try:
        about = FileSystemReader(directory).read_metadata().state_dict_metadata
        for key, found in about.items():
            if key not in tensors and isinstance(found, TensorStorageMetadata):
                tensors[key] = torch.zeros_like(state.parameter(key)) if found.size else torch.zeros(())
                state[key] = tensors[key]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads what several wrote
            load_shards(tensors, checkpoint_id=directory)
    except (OSError, EOFError, CheckpointException, RuntimeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {_first(error)}") from None


def _check_model(directory: Path, found: GLMConfig, own: GLMConfig) -> None:
    if found.replace(extra=own.extra, rope_theta=own.rope_theta) != own:  # a stage may set another base
        raise CheckpointError(f"checkpoint {directory} holds another model; expected the one that the run began with")


def _like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor where the target lies: on its device or, of a sharded one, this process's shard."""
    value = value.to(target.device)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def _first(error: BaseException) -> BaseException:
    """What one process met, without the account of all."""
    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    return failures[0][0] if failures else error


def kept_recipe(directory: Path) -> Mapping[str, Any]:
    """The recipe with which the kept run began, as plain values. Raises CheckpointError."""
    return _numbers(directory)[1]


def _numbers(directory: Path) -> tuple[Progress, Mapping[str, Any], bool]:
    try:
        numbers = json.loads((directory / NUMBERS).read_text())
        progress = Progress(int(numbers["step"]), float(numbers["seconds"]), dict(numbers["sources"]))
        return progress, dict(numbers["recipe"]), bool(numbers.get("sharded"))
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {error}") from None


def _optimizer_tensors(model: GLM, movers: Movers) -> dict[str, Tensor]:
    """Of all optimisers, by the parameter's name and what it is: ``NAME:exp_avg``."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}:{kind}": value
        for mover in movers
        for p, state in mover.state.items()
        for kind, value in state.items()
    }
