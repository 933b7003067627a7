"""Text in, memory-mapped tokens out (``nanoglm data``), and the loader that training reads them with.

A dataset is a folder: ``dataset.json``, ``tokenizer.json`` and, per split, shards of tokens (raw uint16 or uint32) and
the documents' ends (int64, in tokens of the split). Each document is followed by <|endoftext|>.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from nanoglm.errors import InputError
from nanoglm.model import BatchStore
from nanoglm.ops import Batch

STDLIB = "stdlib"  # a source that every machine has: the sources of Python's standard library (PSF licence)
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
SHARD_TOKENS = 1 << 28
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val")
IGNORE = -100  # the target of a token that is not learnt


# ------------------------------------------------------------------------------- sources
def documents(sources: Sequence[str | Path], field: str = "text") -> Iterator[str]:
    """The documents of files and folders, in order: a text file is one, a JSONL line or a Parquet row is one each.

    Args:
        sources: files, folders (searched for .txt, .md, .py, .jsonl and .parquet, sorted), or "stdlib".
        field: of JSONL objects, and the column of Parquet files.

    Raises:
        InputError: a source that holds none of these, or cannot be read.
    """
    for source in sources:
        path = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if source == STDLIB:  # without what was installed beside it
            files = [p for p in files if p.suffix == ".py" and not {"site-packages", "test", "tests"} & {*p.parts}]
        if not files:
            raise InputError(
                f"source {source} holds no file of {', '.join(SUFFIXES)}; expected one, or a folder of them"
            )
        for file in files:
            yield from _documents_of(file, field, lenient=source == STDLIB)


def _documents_of(file: Path, field: str, lenient: bool) -> Iterator[str]:
    if file.suffix == ".parquet":
        yield from _parquet(file, field)
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if lenient:  # a few of the library's files are there to be unreadable
            return
        raise InputError(f"source {file} cannot be read as UTF-8: {error}") from None
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)[field]
            except (ValueError, KeyError, TypeError):
                value = None
            if not isinstance(value, str):
                raise InputError(f"source {file} line {number} has no text under {field!r}; expected a JSON object")
            yield value


def _parquet(file: Path, field: str) -> Iterator[str]:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(f"source {file} needs pyarrow; expected pip install 'nanoglm[data]'") from None
    try:
        for batch in parquet.ParquetFile(file).iter_batches(columns=[field]):
            yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)
    except Exception as error:  # the library raises many kinds
        raise InputError(f"source {file} cannot be read as Parquet with a column {field!r}: {error}") from None


# ------------------------------------------------------------------------------- writing
@dataclass(frozen=True)
class Split:
    """Shards in order with their tokens; what they hold in all."""

    shards: tuple[str, ...]
    tokens: int
    documents: int
    bytes: int  # of UTF-8, without the ends of documents


def write(
    sources: Sequence[str | Path], out: Path, tokenizer: str = "bytes", val: float = 0.1, field: str = "text"
) -> dict[str, Split]:
    """Makes a dataset folder, whole or not at all. Reads the sources twice and holds one document at a time.

    Args:
        out: a folder that is not there yet, or is empty.
        tokenizer: "bytes", "bpe:SIZE" (trained on the training part; of the ids 36 are markup), or a tokenizer.json.
        val: the share of the characters, from the end, that is kept for validation; the border may cut a document.

    Raises:
        InputError: sources, tokenizer or share are not usable, or ``out`` cannot be written.
    """
    if not 0 <= val < 1:
        raise InputError(f"val is {val}; expected a share, 0 or more and below 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out is {out}, which is there already; expected a new or an empty folder")
    size = sum(map(len, documents(sources, field)))
    if not size:
        raise InputError(f"sources {', '.join(map(str, sources))} hold no text; expected some")
    border = size - round(size * val)
    parts = partial(_parts, sources, field, border)
    encoder = _tokenizer(tokenizer, (text for name, text in parts() if name == "train"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"out is {out}, which cannot be written: {error.strerror}") from None
    try:
        writers = {name: _Writer(staging, name, encoder) for name in SPLITS}
        for name, text in parts():
            writers[name].add(text)
        splits = {name: writer.close() for name, writer in writers.items()}
        encoder.save(staging / "tokenizer.json")
        about = {"dtype": _dtype(encoder).name, "vocab_size": encoder.vocab_size}
        about |= {name: asdict(split) for name, split in splits.items()}
        (staging / "dataset.json").write_text(json.dumps(about, indent=1) + "\n")
        staging.chmod(0o755)
        staging.replace(out)  # an empty folder gives way
    except OSError as error:
        raise InputError(f"out is {out}, which cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return splits


def _parts(sources: Sequence[str | Path], field: str, border: int) -> Iterator[tuple[str, str]]:
    """Documents with their split; the one that ``border`` (in characters of all) falls into comes in two."""
    for text in documents(sources, field):
        if before := text[: max(border, 0)]:
            yield "train", before
        if after := text[max(border, 0) :]:
            yield "val", after
        border -= len(text)


def _tokenizer(name: str, texts: Iterator[str]) -> Tokenizer:
    if name == "bytes":
        return byte_tokenizer()
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return Tokenizer.from_file(name)
    if not size.isdecimal():
        raise InputError(f"tokenizer is {name}; expected bytes, bpe:SIZE or a tokenizer.json")
    return train_bpe(texts, int(size))


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


class _Writer:
    """Shards of one split."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name, self.tokenizer, self.dtype = folder, name, tokenizer, _dtype(tokenizer)
        self.end = tokenizer.encode(END_OF_TEXT)
        if len(self.end) != 1:
            raise InputError(f"tokenizer has no {END_OF_TEXT}; expected one of GLM's")
        self.shards, self.ends, self.held = list[str](), list[int](), list[np.ndarray]()
        self.total = self.waiting = self.bytes = 0

    def add(self, text: str) -> None:
        ids = np.array(self.tokenizer.encode_plain(text) + self.end, self.dtype)
        self.held.append(ids)
        self.total, self.waiting = self.total + len(ids), self.waiting + len(ids)
        self.bytes += len(text.encode())
        self.ends.append(self.total)
        if self.waiting >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        if self.held:
            self.shards.append(f"{self.name}-{len(self.shards):05d}.bin")
            np.concatenate(self.held).tofile(self.folder / self.shards[-1])
        self.held, self.waiting = [], 0

    def close(self) -> Split:
        self.flush()
        np.array(self.ends, np.int64).tofile(self.folder / f"{self.name}.documents")
        return Split(tuple(self.shards), self.total, len(self.ends), self.bytes)


# ------------------------------------------------------------------------------- reading
class Tokens:
    """One split of a dataset: tokens by place, from files that stay on disk.

    Raises:
        InputError: the folder is no dataset, or its files have another size than it says.
    """

    def __init__(self, directory: Path, split: str = "train") -> None:
        try:
            about = json.loads((directory / "dataset.json").read_text())
            self.dtype, self.vocab_size = np.dtype(about["dtype"]), int(about["vocab_size"])
            found = Split(**about[split])
            self.shards: list[np.ndarray] = [np.memmap(directory / name, self.dtype, "r") for name in found.shards]
            self.ends = np.fromfile(directory / f"{split}.documents", np.int64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"data {directory} is no dataset of nanoglm data: {error}") from None
        self.bytes = found.bytes
        self.starts = np.cumsum([0, *map(len, self.shards)])
        if self.starts[-1] != found.tokens or (len(self.ends) and self.ends[-1] != found.tokens):
            raise InputError(f"data {directory} holds {self.starts[-1]} tokens of {split}; expected {found.tokens}")

    @classmethod
    def of(cls, ids: np.ndarray) -> Tokens:
        """Of the byte tokenizer's ids in memory."""
        tokens = cls.__new__(cls)
        tokens.dtype, tokens.shards, tokens.starts = ids.dtype, [ids], np.array([0, len(ids)])
        tokens.bytes = int((ids < 256).sum())
        return tokens

    @property
    def bytes_per_token(self) -> float:
        """Mean over the split; the ends of documents are tokens without a byte."""
        return self.bytes / len(self)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), whatever shards they lie in."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        parts = []
        while count > 0:
            part = self.shards[first][start - self.starts[first] :][:count]
            parts.append(part)
            start, count, first = start + len(part), count - len(part), first + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


@dataclass
class Loader:
    """Windows of ``length`` + 1 tokens in an order that is drawn anew each epoch: windows lie side by side from a drawn
    offset on, so an epoch reads every token once, but for the rest at both ends.

    The state is (epoch, position), both plain numbers: the order follows from the seed and the epoch.
    """

    tokens: Tokens
    length: int
    seed: int = 0
    epoch: int = 0
    position: int = 0  # windows of this epoch that were given out

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.length:
            raise InputError(f"text holds {len(self.tokens)} tokens; expected more than one window of {self.length}")
        self._drawn: tuple[int, int, np.ndarray] | None = None

    def take(self, count: int) -> Tensor:
        """The next windows, int64 [count, length + 1]."""
        windows = []
        for _ in range(count):
            offset, order = self._order()
            windows.append(self.tokens.read(offset + int(order[self.position]) * self.length, self.length + 1))
            self.position += 1
            if self.position == len(order):
                self.epoch, self.position = self.epoch + 1, 0
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        """What to make a loader with that goes on from here."""
        return {"epoch": self.epoch, "position": self.position}

    def _order(self) -> tuple[int, np.ndarray]:
        if self._drawn is None or self._drawn[0] != self.epoch:
            rng = np.random.default_rng((self.seed, self.epoch))
            spare = len(self.tokens) - 1
            offset = int(rng.integers(min(self.length, spare - self.length + 1)))
            self._drawn = self.epoch, offset, rng.permutation((spare - offset) // self.length)
        return self._drawn[1], self._drawn[2]


# ------------------------------------------------------------------------------- samples
@dataclass(frozen=True)
class Sample:
    """Whole sequences to learn from, packed one after another.

    Attributes:
        ids: int64 [T]. targets: int64 [T], the token that follows each, or -100 where it is not learnt.
        counts: tokens of each sequence.
        positions: int64 [T], where each token stands for RoPE if some are skipped, else None.
    """

    ids: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    positions: Tensor | None = None

    @classmethod
    def of(cls, windows: Tensor) -> Sample:
        """From int64 [B, L + 1]: B sequences of L tokens, each token but the first a target."""
        return cls(windows[:, :-1].flatten(), windows[:, 1:].flatten(), (windows.shape[1] - 1,) * len(windows))

    @cached_property
    def batch(self) -> Batch:
        """The geometry that the model asks for."""
        return replace(Batch.contiguous(self.counts, self.ids.device), rope_positions=self.positions)

    def to(self, device: torch.device | str) -> Sample:
        """The same on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Sample(self.ids.to(device), self.targets.to(device), self.counts, positions)

    def part(self, begin: int, end: int) -> Sample:
        """Its sequences ``begin`` to ``end`` - 1."""
        rows = slice(sum(self.counts[:begin]), sum(self.counts[:end]))
        positions = None if self.positions is None else self.positions[rows]
        return Sample(self.ids[rows], self.targets[rows], self.counts[begin:end], positions)

    def split(self, tokens: int | None) -> list[Sample]:
        """Its sequences in parts of at most so many tokens (one sequence at least); None: one part."""
        borders, held = [0], 0
        for i, n in enumerate(self.counts):
            if tokens is not None and held and held + n > tokens:
                borders.append(i)
                held = 0
            held += n
        return [self.part(begin, end) for begin, end in pairwise([*borders, len(self.counts)])]

    # Three questions to which a rank that holds a stretch of each sequence has other answers (context.py).
    def later(self, values_T: Tensor, by: int) -> tuple[Tensor, Tensor]:
        """Of each row the value that stands ``by`` rows on, [T, ...] without gradient, and whether that one belongs to
        the same sequence, bool [T]."""
        rows, requests = torch.arange(len(values_T), device=values_T.device) + by, self.batch.requests
        at = rows.clamp(max=len(rows) - 1)
        return values_T.detach()[at], (rows < len(rows)) & (requests[at] == requests)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all that hold rows of these sequences, without gradient."""
        return x.detach()

    def store(self) -> BatchStore:
        """An empty store for one pass over these rows."""
        return BatchStore()


class Source(Protocol):
    """Where a stage's samples come from. Its state is plain JSON values."""

    def take(self, length: int, count: int) -> Sample:
        """The next ``count`` rows of ``length`` tokens."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Windows:
    """A :class:`Source` of windows of a text, in an order of its own for each length."""

    def __init__(self, tokens: Tokens, seed: int = 0) -> None:
        self.tokens, self.seed = tokens, seed
        self.loaders: dict[int, Loader] = {}

    def take(self, length: int, count: int) -> Sample:
        if length not in self.loaders:
            self.loaders[length] = Loader(self.tokens, length, self.seed)
        return Sample.of(self.loaders[length].take(count))

    def state_dict(self) -> dict[str, Any]:
        return {str(length): loader.state_dict() for length, loader in self.loaders.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaders = {int(n): Loader(self.tokens, int(n), self.seed, **at) for n, at in state.items()}
