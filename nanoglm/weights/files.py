"""Safetensors files of a checkpoint directory: which tensor lies where, read one at a time.

The library's reader maps a whole file into memory, and every mapped page that was read counts until the file
is let go: a checkpoint larger than the memory could not be walked through. The format is a header of JSON
and plain bytes behind it, so tensors are read here by position; at no time is more than one held.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoglm.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# The format's names for dtypes.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


class Entry(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte position in the file
    end: int


class Shards:
    """The tensors of a checkpoint directory: headers now, data on demand.

    Attributes:
        entries: by tensor name. shapes, dtypes: the same, taken apart; dtypes as the files spell them.

    Raises:
        CheckpointError: files missing, damaged, or not holding what the index file says.
    """

    def __init__(self, directory: Path, *extra: Path) -> None:
        index, single = directory / INDEX_FILE, directory / SINGLE_FILE
        placed: dict[str, Path] = {}
        if index.is_file():
            placed = {name: directory / file for name, file in read_index(index).items()}
            for file in sorted(set(placed.values())):
                if not file.is_file():
                    raise CheckpointError(f"index file {index} names {file.name}, which is missing")
        elif not single.is_file():
            shards = sorted(directory.glob("*.safetensors"))
            found = f"{len(shards)} shards without it" if shards else "no weights"
            raise CheckpointError(f"checkpoint {directory} holds {found}; expected {SINGLE_FILE} or {INDEX_FILE}")
        self.entries: dict[str, Entry] = {}
        for file in (*sorted(set(placed.values()) or {single}), *extra):
            for name, entry in read_header(file).items():
                if placed.get(name, file) == file:  # else the index places it in another file
                    self.entries[name] = entry
        absent = min(placed.keys() - self.entries.keys(), default=None)
        if absent is not None:
            raise CheckpointError(f"checkpoint index names {absent}, which {placed[absent].name} does not hold")
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return next(self.stream([name]))[1]

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names in the files' order, one at a time."""
        held: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            held[self.entries[name].file].append(name)
        for file in sorted(held):
            with _opened(file) as opened:
                for name in sorted(held[file], key=lambda n: self.entries[n].begin):
                    entry = self.entries[name]
                    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
                    opened.seek(entry.begin)
                    if raw.numel() and opened.readinto(raw.numpy()) != raw.numel():
                        raise CheckpointError(f"weights file {file} ended inside {name}; it is truncated")
                    yield name, raw.view(DTYPES[entry.dtype]).view(entry.shape)
                    del raw


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name of an index file. Raises CheckpointError."""
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(value, str) for value in weight_map.values()):
            raise TypeError
    except OSError as error:
        raise CheckpointError(f"index file {file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"index file {file} is damaged; expected JSON with a weight_map") from None
    for value in set(weight_map.values()):
        if value != Path(value).name or "\0" in value or not 0 < len(value.encode("utf-8", "replace")) <= 255:
            raise CheckpointError(f"index file {file} names {value!r}; expected the plain name of a file beside it")
    return weight_map


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors that a safetensors file holds.

    Raises:
        CheckpointError: it cannot be read, or its header does not describe its bytes exactly.
    """
    with _opened(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        try:
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError("no header")
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(file, 8 + length, raw) for name, raw in header.items()}
            end = 8 + length
            for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
                if entry.begin != end:
                    raise ValueError(f"a gap or overlap at byte {end}")
                end = entry.end
            if end != size:
                raise ValueError(f"{end} bytes described, {size} there")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else "damaged header"
            raise CheckpointError(
                f"weights file {file} cannot be read ({reason}); it is truncated or no safetensors file"
            ) from None
    return entries


def _entry(file: Path, data: int, raw: Any) -> Entry:
    shape, (begin, end) = raw["shape"], raw["data_offsets"]
    numbers = (*shape, begin, end)
    if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers):
        raise ValueError("a shape or offset is no natural number")
    if raw["dtype"] not in DTYPES:
        raise ValueError(f"dtype {raw['dtype']!r} is unknown")
    nbytes = DTYPES[raw["dtype"]].itemsize
    for n in shape:
        nbytes *= n
    if nbytes != end - begin:
        raise ValueError(f"{nbytes} bytes by shape and dtype, {end - begin} by offsets")
    return Entry(file, raw["dtype"], tuple(shape), data + begin, data + end)


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(f"weights file {file} cannot be read ({error.strerror})") from None
