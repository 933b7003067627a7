"""Hugging Face checkpoint directories: config.json and safetensors, with or without an index file.

Reading streams one tensor at a time into a model that was built without storage, so nothing is held
twice. Every name is accounted for: what is missing or unexpected is an error, what is tolerated is
reported. Writing goes to a temporary folder beside the target and is renamed into place.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import CheckpointError, InputError
from nanoglm.model import GLM
from nanoglm.weights.names import INDEXER, STACKED, disk_tensors, place, stored_dtype

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Indexers for the Shared layers, in a file of their own: no engine needs them, comparisons with all-Full do.
SHARED_INDEXERS = "shared_indexers.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Layout = Literal["per_expert", "stacked"]


@dataclass
class Report:
    """What loading found beside the tensors it placed."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # copied indexers on Shared layers

    def check(self, directory: Path) -> None:
        """Raises CheckpointError unless every name fits."""
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(
                    f"checkpoint {directory} has {len(names)} {kind} tensors: {', '.join(names[:3])}{more}; "
                    "expected exactly the names that its config.json describes"
                )


class Checkpoint:
    """A checkpoint directory, opened: configuration and headers, no weights yet.

    Args:
        latent_norm_eps: see :meth:`GLMConfig.from_dict`.
        all_full: every layer Full, with the Shared layers' indexers from ``shared_indexers.safetensors``.

    Raises:
        ConfigError, CheckpointError: files missing, damaged or of a wrong kind.
    """

    def __init__(self, directory: str | Path, *, latent_norm_eps: float | None = None, all_full: bool = False) -> None:
        self.directory = Path(directory)
        config = GLMConfig.from_file(self.directory, latent_norm_eps=latent_norm_eps)
        self._files = self._find_files()
        if all_full:
            config = config.replace(indexer_types=(FULL,) * config.num_hidden_layers)
            with _open(self.directory / SHARED_INDEXERS) as opened:
                self._files |= dict.fromkeys(opened.keys(), self.directory / SHARED_INDEXERS)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in sorted(set(self._files.values())):
            with _open(file) as opened:
                for name in self._names(opened, file):
                    header = opened.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), header.get_dtype()
        absent = sorted(set(self._files) - set(self.shapes))
        if absent:
            raise CheckpointError(
                f"checkpoint index names {absent[0]}, which {self._files[absent[0]].name} does not hold"
            )
        prefix = f"model.layers.{config.num_hidden_layers}."
        if not any(name.startswith(prefix) for name in self.shapes):
            config = config.replace(num_nextn_predict_layers=0)  # transformers writes no MTP layer
        self.config = config

    def _find_files(self) -> dict[str, Path]:
        """Tensor name -> file."""
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {str(name): self.directory / str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, AttributeError, TypeError):
                raise CheckpointError(f"index file {index} is damaged; expected JSON with a weight_map") from None
            for file in sorted(set(files.values())):
                if not file.is_file():
                    raise CheckpointError(f"index file {index} names {file.name}, which is missing")
            return files
        if not single.is_file():
            shards = sorted(self.directory.glob("*.safetensors"))
            found = f"{len(shards)} shards without it" if shards else "no weights"
            raise CheckpointError(f"checkpoint {self.directory} holds {found}; expected {SINGLE_FILE} or {INDEX_FILE}")
        with _open(single) as opened:
            return dict.fromkeys(opened.keys(), single)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors in file order, one at a time."""
        for file in sorted(set(self._files.values())):
            with _open(file) as opened:
                for name in self._names(opened, file):
                    yield name, opened.get_tensor(name)

    def _names(self, opened: Any, file: Path) -> list[str]:
        """The tensors to take from a file: not those that the index places in another one."""
        return [name for name in opened.keys() if self._files.get(name, file) == file]  # noqa: SIM118  # no dict

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[GLM, Report]:
        """The model with its weights. Raises CheckpointError unless every name and shape fits."""
        with torch.device("meta"):
            model = GLM(self.config)
        report = self._account(model)
        report.check(self.directory)
        if torch.device(device).type == "meta":
            return model, report
        materialise(model, dtype, device)
        parameters = dict(_named_tensors(model))
        ignored = set(report.ignored)
        with torch.no_grad():
            for name, tensor in self.tensors():
                if name not in ignored:
                    where = place(name)
                    where.view(parameters[where.parameter]).copy_(tensor)
        return model, report

    def _account(self, model: GLM) -> Report:
        """Compares names, shapes and dtypes on disk with what the model wants."""
        wanted = {name: tuple(t.shape) for name, t in checkpoint_tensors(model).items()}
        stacked = {name: tuple(t.shape) for name, t in _named_tensors(model) if STACKED.fullmatch(name)}
        report = Report()
        seen: set[str] = set()
        for name, shape in self.shapes.items():
            expected = wanted.get(name, stacked.get(name))
            if expected is None:
                match = INDEXER.fullmatch(name)
                copied = match is not None and not self.config.has_indexer(int(match["layer"]))
                (report.ignored if copied else report.unexpected).append(name)
                continue
            if shape != expected:
                raise CheckpointError(f"tensor {name} has shape {list(shape)}; expected {list(expected)}")
            if self.dtypes[name] not in DTYPES:
                raise CheckpointError(
                    f"tensor {name} has dtype {self.dtypes[name]}; expected one of {', '.join(DTYPES)}"
                )
            seen.update(disk for disk, _ in disk_tensors(name, torch.empty(shape, device="meta")))
        report.missing = [name for name in wanted if name not in seen]
        return report


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights file {file} cannot be read ({error}); it is truncated or no safetensors file"
        ) from None


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES.values():
        raise InputError(f"dtype is {dtype}; expected torch.float32, torch.bfloat16 or torch.float16")


def _named_tensors(model: GLM) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under their in-memory names; tied weights once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def checkpoint_tensors(model: GLM) -> dict[str, Tensor]:
    """The checkpoint's tensors: disk names with views of the model's (works on meta)."""
    return {disk: view for name, value in _named_tensors(model) for disk, view in disk_tensors(name, value)}


def materialise(model: GLM, dtype: torch.dtype, device: torch.device | str) -> GLM:
    """Gives a model built on meta its storage, uninitialised, in the dtype each tensor is kept in.

    Raises:
        InputError: a dtype that is not fp32, bf16 or fp16, or more than this machine's memory.
    """
    _check_dtype(dtype)
    needed = sum(t.numel() * stored_dtype(n, dtype).itemsize for n, t in _named_tensors(model))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.device(device).type == "cpu" and needed > memory:
        raise InputError(
            f"model needs {needed / 1e9:,.0f} GB in {dtype}; expected at most this machine's {memory / 1e9:,.0f} GB"
        )
    for path, module in model.named_modules():
        for name, value in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            empty = torch.empty(value.shape, dtype=stored_dtype(full, dtype), device=device)
            setattr(module, name, nn.Parameter(empty))
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(value.shape, dtype=torch.float32, device=device))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = cast(nn.Parameter, model.model.embed_tokens.weight)
    return model


# ------------------------------------------------------------------------------- writing
def save(
    model: GLM,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    mtp: bool = True,
    layout: Layout = "per_expert",
    shard_bytes: int = 5_000_000_000,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Writes config.json and safetensors that transformers, vLLM and SGLang read.

    Args:
        dtype: fp32, bf16 or fp16; the router bias stays fp32 as in the published files.
        mtp: False leaves the MTP layer out.
        layout: routed experts one by one as published, or stacked as in memory.
        shard_bytes: a file's size limit; more than one file gets an index file.
        beside: writes further files into the folder it is given, before anything is renamed.

    Raises:
        InputError: a dtype that is not one of the three, or a directory that cannot be written.
    """
    _check_dtype(dtype)
    if model.lm_head.weight.is_meta:
        raise InputError("model on device meta has no weights to save; expected one loaded on a real device")
    directory = Path(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise InputError(f"directory {directory} cannot be written: {error.strerror}") from None
    try:
        _write(model, staging, dtype, mtp, layout, shard_bytes)
        if beside is not None:
            beside(staging)
        mode = (staging / "config.json").stat().st_mode
        for file in staging.iterdir():
            file.chmod(mode)  # safetensors writes 0600, which shuts out a server under another user
        directory.mkdir(exist_ok=True)
        stale = set(directory.glob("model*.safetensors*")) - {directory / f.name for f in staging.iterdir()}
        for file in sorted(staging.iterdir()):
            os.replace(file, directory / file.name)
        for file in stale:
            file.unlink()
    except (OSError, SafetensorError) as error:
        raise InputError(f"directory {directory} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(model: GLM, folder: Path, dtype: torch.dtype, mtp: bool, layout: Layout, shard_bytes: int) -> None:
    config = model.config if mtp else model.config.replace(num_nextn_predict_layers=0)
    raw = config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    raw.pop("quantization_config", None)  # it described the file that was read; these weights are plain
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    drop = None if mtp else f"model.layers.{model.config.num_hidden_layers}."
    named = _named_tensors(model) if layout == "stacked" else iter(checkpoint_tensors(model).items())
    shards: list[dict[str, Tensor]] = [{}]  # views: only the shard being written is copied
    size, total = 0, 0
    for name, value in named:
        if drop and name.startswith(drop):
            continue
        nbytes = value.numel() * _disk_dtype(name, dtype).itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value.detach()
        size += nbytes
        total += nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        copies = {
            n: v.to("cpu", _disk_dtype(n, dtype)).clone(memory_format=torch.contiguous_format) for n, v in shard.items()
        }
        save_file(copies, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _disk_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The router bias is F32 in the published bf16 files; all else is what the writer was asked for."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype
