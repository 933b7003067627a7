"""``nanoglm bench ...``: the verbs. Each prints tables and, with --out, writes JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from tyro.conf import subcommand

from nanoglm.api import checkpoint_directory, load
from nanoglm.bench import decode as decoding
from nanoglm.bench import ops, versus
from nanoglm.bench import prefill as prefilling
from nanoglm.bench.engine import bench_engine, bench_prefix
from nanoglm.bench.generation import bench_generation
from nanoglm.bench.gpu import bench_gpu
from nanoglm.bench.report import report as write_report
from nanoglm.bench.result import COLUMNS, Result, check_out
from nanoglm.bench.step import bench_train
from nanoglm.bench.timing import Progress as Tell
from nanoglm.errors import InputError

LENGTHS = (4096, 16_384, 65_536, 131_072)
DType = Literal["bf16", "fp32"]
IndexDType = Literal["bf16", "fp32", "int8"]


def ops_(rounds: int = 5, prototype: Path | None = None, out: Path | None = None, quick: bool = False) -> None:
    """Each op as a share of the fastest library routine of its kind.

    Args:
        rounds: Of each figure, at least 3.
        prototype: A folder with a rival's dsa_cpu.cpp, which is compiled and timed on the same inputs.
        out: The JSON file to write.
        quick: Small sizes, to see that it runs; the figures are of no use.
    """
    check_out(out)
    with _progress() as tell:
        result = ops.bench_ops(rounds, prototype, 16 if quick else 1, tell)
    _finish(result, out)


def prefill(
    lengths: tuple[int, ...] | None = None,
    rounds: int = 5,
    peer: Literal["none", "transformers"] = "none",
    dtype: DType = "bf16",
    index_dtype: IndexDType | None = None,
    whole: int | None = None,
    decode: int = 64,
    out: Path | None = None,
) -> None:
    """Prefill of the shape bench-nano, all-Full and IndexShare in turns; or one long prompt; or against a peer.

    Args:
        lengths: Tokens of the prompts; 4096 16384 65536 131072 if left out, with a peer 4096 8192.
        rounds: Of each figure, at least 3.
        peer: Compare with this engine at one shape instead, each run a process of its own.
        dtype: Of weights and cache.
        index_dtype: Of index keys; as dtype if left out.
        whole: Instead run one single IndexShare prompt of so many tokens, part by part beside its limits.
        decode: Tokens to decode after the whole prompt.
        out: The JSON file to write.
    """
    check_out(out)
    with _progress() as tell:
        if peer != "none":
            result = versus.versus(lengths or (4096, 8192), rounds, progress=tell)
        elif whole is not None:
            result = prefilling.whole(whole, decode, rounds, dtype, index_dtype, progress=tell)
        else:
            result = prefilling.prefill(lengths or LENGTHS, rounds, dtype, index_dtype, progress=tell)
    _finish(result, out)


def decode(
    lengths: tuple[int, ...] = (8192, 65_536, 204_800),
    rounds: int = 5,
    dtype: DType = "bf16",
    index_dtype: IndexDType | None = None,
    out: Path | None = None,
) -> None:
    """Milliseconds a token behind contexts of random keys, all-Full and IndexShare in turns.

    Args:
        lengths: Tokens in the cache.
        rounds: At least 3; together they time at least 30 tokens.
        dtype: Of weights and cache.
        index_dtype: Of index keys; as dtype if left out.
        out: The JSON file to write.
    """
    check_out(out)
    with _progress() as tell:
        result = decoding.decode(lengths, rounds, dtype, index_dtype, progress=tell)
    _finish(result, out)


def train(
    lengths: tuple[int, ...] = (8192,), shape: str = "bench-nano", rounds: int = 3, out: Path | None = None
) -> None:
    """One step of sparse training: what is not selected masked, against what is selected gathered.

    Args:
        lengths: Tokens of the one sequence.
        shape: bench-nano, or a preset.
        rounds: Of each figure, at least 3.
        out: The JSON file to write.
    """
    check_out(out)
    with _progress() as tell:
        result = bench_train(lengths, shape, rounds, tell)
    _finish(result, out)


def engine(
    requests: tuple[int, ...] = (1, 2, 4, 8),
    model: str | None = None,
    prompt: int = 64,
    tokens: int = 64,
    temperature: float = 0.0,
    rounds: int = 7,
    prefix: int | None = None,
    peer: Literal["none", "transformers"] = "none",
    lengths: tuple[int, ...] = (1024, 4096, 8192),
    out: Path | None = None,
) -> None:
    """Many requests at once, with and without drafts, in turns with the plain loop; or two prompts that begin alike; or
    against a peer.

    Args:
        requests: How many come at once.
        model: A checkpoint directory or a preset; the bundled model if left out.
        prompt: Tokens of a prompt.
        tokens: To generate for each.
        temperature: 0 is greedy.
        rounds: At least 3.
        prefix: Instead time a second prompt that has so many tokens in common with the first.
        peer: Instead generate greedily from the same checkpoint and prompts as this engine, each run its own process.
        lengths: Tokens of those prompts.
        out: The JSON file to write.
    """
    check_out(out)
    loaded = load(model)
    with _progress() as tell:
        if peer != "none":
            folder = checkpoint_directory(model)
            if folder is None:
                raise InputError(f"model is {model}; expected a checkpoint directory, which a peer can read")
            result = bench_generation(loaded, folder, lengths, tokens, rounds, progress=tell)
        elif prefix is not None:
            result = bench_prefix(loaded, prefix, rounds, tell)
        else:
            result = bench_engine(loaded, requests, prompt, tokens, temperature, rounds, tell)
    _finish(result, out)


def gpu(rounds: int = 5, out: Path | None = None) -> None:
    """Each op on a GPU beside the card's limits and its peers; layers of GLM-5.2's widths, a million tokens, training.

    Args:
        rounds: Of each figure, at least 3.
        out: The JSON file to write.
    """
    check_out(out)
    with _progress() as tell:
        result = bench_gpu(rounds, progress=tell)
    _finish(result, out)


def report(files: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("docs/performance.md")) -> None:
    """A page of tables and plots from what the others wrote.

    Args:
        files: JSON files that --out wrote.
        out: The page; plots lie beside it.
    """
    for file in write_report(files, out):
        print(file)


def _verb(name: str, run: Any) -> Any:
    return Annotated[Any, subcommand(name=name, constructor=run, prefix_name=False)]


# What tyro reads nested subcommands from.
Verb = (
    _verb("ops", ops_) | _verb("prefill", prefill) | _verb("decode", decode) | _verb("train", train)
    | _verb("engine", engine) | _verb("gpu", gpu) | _verb("report", report)
)  # fmt: skip


@contextmanager
def _progress() -> Iterator[Tell]:
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


def _finish(result: Result, out: Path | None) -> None:
    result.command = _command(sys.argv[1:])
    if out is not None:
        result.save(out)
    for name, rows in result.rows.items():
        columns = [column for column in COLUMNS[name] if any(column.cell(row) for row in rows)]
        table = Table(*(column.title for column in columns), title=name)
        for row in rows:
            table.add_row(*(column.cell(row) for column in columns))
        Console(width=max(Console().width, 190)).print(table)  # figures are never cut
    for name, value in result.fit.items():
        print(f"{name}: {value:.4g}")
    for note in result.notes:
        print(f"not measured: {note}")
    print(", ".join(f"{name} {value}" for name, value in result.machine.items()))


def _command(arguments: list[str]) -> str:
    """What to type to measure it again; where files lie is nobody's business."""
    kept = ["nanoglm"]
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, _, value = argument.partition("=")
        if "--out" not in (before, name):
            path = before == "--prototype" or (name == "--prototype" and value)
            kept.append(argument if not path else "FOLDER" if before == "--prototype" else "--prototype=FOLDER")
    return " ".join(kept)
