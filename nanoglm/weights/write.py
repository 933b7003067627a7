"""Checkpoint directories written, whole or not at all.

Everything is written to a hidden folder beside the target, which then takes the target's place in one step
where that can be; see :func:`replacing`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
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
from nanoglm.weights.hf import DTYPES, SHARED_INDEXERS, checkpoint_tensors, named_tensors
from nanoglm.weights.names import FP8, SCALE

Layout = Literal["per_expert", "stacked"]
SHARD_BYTES = 5_000_000_000
_OURS = re.compile(
    r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_FILE) + "|" + re.escape(SHARED_INDEXERS)
)
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
    if any(tensor.is_meta for _, tensor in named_tensors(model)):
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
        if not value.isfinite().all():
            raise InputError(f"tensor {name} holds a value that is not finite; expected numbers that FP8 can scale")
        values, scale = fp8.quantise(value, scale_dtype)
        yield name, values
        yield name + SCALE, scale
    else:
        yield from _stored(name, value, torch.bfloat16, scale_dtype)


def write_config(folder: Path, config: GLMConfig, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """config.json with the dtype of these weights, whatever the file said that they were read from."""
    plain = torch.bfloat16 if dtype == fp8.DTYPE else dtype
    raw = config.to_dict() | {"dtype": str(plain).removeprefix("torch.")}
    for stale in ("quantization_config", "torch_dtype"):
        raw.pop(stale, None)
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
    """A new folder whose files take the place of a checkpoint's in ``directory`` when the block ends well.

    Where the directory holds files only, the two folders are exchanged in one step (Linux), its other files
    moved over as hard links: a kill leaves the old checkpoint or the new one. Where that cannot be (folders
    or mounts inside, another owner, the current directory, other systems), files are replaced one by one,
    config.json removed first and written last: a kill in between leaves what is refused, never a mixture.
    A process killed inside the block leaves its hidden folder ``.NAME.*`` behind.

    Raises:
        InputError: the directory cannot be written.
    """
    directory = Path(directory).resolve()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        parent = directory.parent.stat()
        apart = directory.is_dir() and directory.stat().st_dev != parent.st_dev
        inside = apart or (directory.is_dir() and not os.access(directory.parent, os.W_OK))
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory if inside else directory.parent))
    except OSError as error:
        raise InputError(f"directory {directory} cannot be written: {error.strerror}") from None
    try:
        yield staging
        mode = (staging / "config.json").stat().st_mode & 0o777
        for file in staging.glob("*.safetensors"):
            file.chmod(mode)  # safetensors writes 0600, which shuts out a server under another user
        staged = [file.name for file in staging.iterdir()]
        if not directory.exists():
            staging.chmod(mode | (mode & 0o444) >> 2)  # who may read files may enter their folder
            staging.rename(directory)
        elif inside or not _exchanged(staging, directory):
            _replace_files(staging, directory, staged)
    except (OSError, SafetensorError) as error:
        raise InputError(f"directory {directory} cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_checkpoint_file(entry: os.DirEntry[str]) -> bool:
    """What a checkpoint before this one may have left, and only that: other files are the user's."""
    return _OURS.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _exchanged(staging: Path, directory: Path) -> bool:
    """Swaps the two folders in one step, other files linked; False if that is not safe or not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    entries = list(os.scandir(directory))
    here, there = directory.stat(), staging.stat()
    if (
        rename is None
        or any(not entry.is_file(follow_symlinks=False) and not entry.is_symlink() for entry in entries)
        or (here.st_uid, here.st_gid) != (there.st_uid, there.st_gid)
        or _stands_in(directory)  # whoever does, a shell most likely, would be left in the old one
    ):
        return False
    for entry in entries:
        target = staging / entry.name
        if not _is_checkpoint_file(entry) and not target.exists():
            try:
                os.link(entry.path, target, follow_symlinks=False)
            except OSError:  # a file system without links
                return False
    staging.chmod(here.st_mode)
    return _exchange(rename, staging, directory)


def _exchange(rename: Any, a: Path, b: Path) -> bool:
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _stands_in(directory: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(directory)
    except OSError:  # the current directory is gone
        return False


def _replace_files(staging: Path, directory: Path, staged: list[str]) -> None:
    stale = [entry.name for entry in os.scandir(directory) if _is_checkpoint_file(entry) and entry.name not in staged]
    (directory / "config.json").unlink(missing_ok=True)
    for name in sorted(staged, key=lambda name: name == "config.json"):
        try:
            os.replace(staging / name, directory / name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            part = directory / f".{name}.part"
            shutil.copyfile(staging / name, part)
            os.replace(part, directory / name)
    for name in stale:
        (directory / name).unlink()
