"""Headers of GGUF files: metadata, and how many bytes each tensor takes. No tensor is read.

Source: versions 2 and 3 of the format (ggml's gguf.md); keys and names of ``glm-dsa``: quantisation spec 1.2.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from nanoglm.errors import CheckpointError

_PLAIN = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # number of a type -> struct's
_STRING, _ARRAY = 8, 9
_LONGEST = 4096  # arrays beyond are vocabularies: passed over
_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.DOTALL)


class Gguf(NamedTuple):
    """What the headers say; a file that was split is one."""

    metadata: dict[str, Any]
    sizes: dict[str, int]  # tensor name -> bytes in the file
    nbytes: int  # of all files


def read_gguf(file: Path) -> Gguf:
    """The headers of a GGUF file; of all its parts if the file is the first of several.

    Raises:
        CheckpointError: a part is missing, or a header is damaged.
    """
    match = _PART.fullmatch(file.name)
    names = [file.name]
    if match:
        if int(match["part"]) != 1:
            raise CheckpointError(f"GGUF file {file} is part {int(match['part'])}; expected the first, 00001")
        names = [f"{match['stem']}-{i + 1:05d}-of-{match['parts']}.gguf" for i in range(int(match["parts"]))]
    read = [_read(file.with_name(name)) for name in names]
    sizes = {name: size for part in read for name, size in part.sizes.items()}
    return Gguf(read[0].metadata, sizes, sum(part.nbytes for part in read))


def _read(file: Path) -> Gguf:
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()
    except OSError as error:
        raise CheckpointError(f"GGUF file {file} cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError) as error:
        raise CheckpointError(f"GGUF file {file} cannot be read ({error}); it is truncated or no GGUF file") from None


class _Header:
    """A position that moves through a header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def read(self) -> Gguf:
        if self.take(4) != b"GGUF" or self.one("I") not in (2, 3):
            raise ValueError("no header of version 2 or 3")
        tensors, pairs = self.one("Q"), self.one("Q")
        if tensors > 1 << 20 or pairs > 1 << 16:
            raise ValueError(f"{tensors} tensors and {pairs} keys")
        metadata = {self.string(): self.value(self.one("I")) for _ in range(pairs)}
        offsets = {}
        for _ in range(tensors):
            name = self.string()
            self.take(8 * self.one("I") + 4)  # shape and type
            offsets[name] = self.one("Q")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        end = len(self.data) + -self.at // alignment * alignment  # of the data, from where it begins
        sizes = {}
        for name, begin in sorted(offsets.items(), key=lambda item: -item[1]):
            sizes[name], end = end - begin, begin
        if min(sizes.values(), default=0) < 0:
            raise ValueError("a tensor begins behind the end")
        return Gguf(metadata, sizes, len(self.data))

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("a value runs past the end")
        self.at += count
        return self.data[self.at - count : self.at]

    def one(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        return self.take(self.one("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.one(_PLAIN[kind])
        kind, length = self.one("I"), self.one("Q")
        if kind == _STRING:
            for _ in range(length):
                self.take(self.one("Q"))
            return None
        raw = self.take(length * struct.calcsize("<" + _PLAIN[kind]))
        return list(struct.unpack(f"<{length}{_PLAIN[kind]}", raw)) if length <= _LONGEST else None
