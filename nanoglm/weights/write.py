"""Checkpoint directories written, whole or not at all.

Everything is written to a hidden folder beside the target, which then takes the target's place in one step:
whoever reads, and whatever is killed when, there is the old checkpoint or the new one.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.weights import fp8
from nanoglm.weights.files import INDEX_FILE, SINGLE_FILE
from nanoglm.weights.hf import DTYPES, checkpoint_tensors, named_tensors
from nanoglm.weights.names import FP8, SCALE

Layout = Literal["per_expert", "stacked"]
SHARD_BYTES = 5_000_000_000
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def save(
    model: GLM,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.float32,
    mtp: bool = True,
    layout: Layout = "per_expert",
    shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Writes config.json and safetensors that transformers, vLLM and SGLang read.

    Args:
        dtype: fp32, bf16, fp16, or float8_e4m3fn: projections in FP8 blocks of 128 x 128 with their
            scales, the rest bf16. The router bias stays fp32 as in the published files.
        scale_dtype: of FP8 scales: float32, or float8_e8m0fnu for powers of two.
        mtp: False leaves the MTP layer out.
        layout: routed experts one by one as published, or stacked as in memory.
        shard_bytes: a file's size limit; more than one file gets an index file.
        beside: writes further files into the folder it is given, before it takes its place.

    Raises:
        InputError: another dtype, or a directory that cannot be written.
    """
    if dtype not in (*DTYPES.values(), fp8.DTYPE):
        raise InputError(
            f"dtype is {dtype}; expected torch.float32, torch.bfloat16, torch.float16 or torch.float8_e4m3fn"
        )
    if scale_dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise InputError(f"scale_dtype is {scale_dtype}; expected torch.float32 or torch.float8_e8m0fnu")
    if model.lm_head.weight.is_meta:
        raise InputError("model on device meta has no weights to save; expected one loaded on a real device")
    config = model.config if mtp else model.config.replace(num_nextn_predict_layers=0)
    dropped = "\0" if mtp else f"model.layers.{model.config.num_hidden_layers}."
    with replacing(directory) as folder:
        named = dict(named_tensors(model)) if layout == "stacked" else checkpoint_tensors(model)
        writer = ShardWriter(folder, shard_bytes)
        for name, value in named.items():
            if not name.startswith(dropped):
                for stored, tensor in _stored(name, value.detach(), dtype, scale_dtype):
                    writer.add(stored, tensor)
        writer.close()
        write_config(folder, config, dtype, scale_dtype)
        if beside is not None:
            beside(folder)


def _stored(name: str, value: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What lies on disk for one tensor."""
    if dtype != fp8.DTYPE:
        yield name, value.to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)
    elif FP8.fullmatch(name):
        values, scale = fp8.quantise(value, scale_dtype)
        yield name, values
        yield name + SCALE, scale
    else:
        yield from _stored(name, value, torch.bfloat16, scale_dtype)


def write_config(folder: Path, config: GLMConfig, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """config.json with the dtype of these weights, whatever the file said that they were read from."""
    plain = torch.bfloat16 if dtype == fp8.DTYPE else dtype
    raw = config.to_dict() | {"dtype": str(plain).removeprefix("torch.")}
    raw.pop("quantization_config", None)
    if dtype == fp8.DTYPE:
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
            "modules_to_not_convert": _plain_modules(config),
        } | ({} if scale_dtype == torch.float32 else {"scale_fmt": "ue8m0"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _plain_modules(config: GLMConfig) -> list[str]:
    """Modules whose matrices stay bf16, by full name as vLLM compares them."""
    with torch.device("meta"):
        names = checkpoint_tensors(GLM(config))
    return sorted(n.removesuffix(".weight") for n, t in names.items() if t.ndim > 1 and not FP8.fullmatch(n))


class ShardWriter:
    """Collects tensors into files of at most ``shard_bytes``; one shard is in memory at a time."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # tensor names per file written
        self._size = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy."""
        if self._shard and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._shard[name] = tensor.to("cpu").clone(memory_format=torch.contiguous_format)
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def _flush(self) -> None:
        self._files.append(list(self._shard))
        save_file(self._shard, self._folder / f"model-{len(self._files)}", metadata={"format": "pt"})
        self._shard, self._size = {}, 0

    def close(self) -> None:
        """Writes the last shard, gives the files their names and, if there are several, the index file."""
        self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._folder / f"model-{number}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index: dict[str, Any] = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(directory: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of ``directory`` when the block ends well, and is gone if not.

    Files of the old directory that are no part of a checkpoint move over (as hard links where they can).
    On Linux the two folders are exchanged in one step. Where the system cannot, or where the directory is the
    current one, files are replaced one by one. A process killed inside the block leaves its hidden folder
    ``.NAME.*`` behind, nothing else.

    Raises:
        InputError: the directory cannot be written.
    """
    directory = Path(directory).resolve()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise InputError(f"directory {directory} cannot be written: {error.strerror}") from None
    try:
        yield staging
        mode = (staging / "config.json").stat().st_mode & 0o777
        for file in staging.glob("*.safetensors"):
            file.chmod(mode)  # safetensors writes 0600, which shuts out a server under another user
        if directory.exists():
            _keep_others(directory, staging)
            staging.chmod(directory.stat().st_mode)
            # Whoever stands in the directory, a shell most likely, would be left in the old one.
            if Path.cwd().is_relative_to(directory) or not _exchange(staging, directory):
                _replace_files(staging, directory)
        else:
            staging.chmod(mode | (mode & 0o444) >> 2)  # who may read files may enter their folder
            staging.rename(directory)
    except (OSError, SafetensorError) as error:
        raise InputError(f"directory {directory} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_checkpoint_file(name: str) -> bool:
    return name == "config.json" or (name.startswith("model") and ".safetensors" in name)


def _keep_others(directory: Path, staging: Path) -> None:
    for entry in os.scandir(directory):
        target = staging / entry.name
        if _is_checkpoint_file(entry.name) or target.exists():
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, target, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, target)


def _link(source: str, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another device, or a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _replace_files(staging: Path, directory: Path) -> None:
    stale = {f.name for f in directory.iterdir() if _is_checkpoint_file(f.name)} - {f.name for f in staging.iterdir()}
    for file in sorted(staging.iterdir()):
        if file.is_file() and (_is_checkpoint_file(file.name) or not (directory / file.name).exists()):
            os.replace(file, directory / file.name)
    for name in stale:
        (directory / name).unlink()
