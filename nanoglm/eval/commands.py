"""``nanoglm longcontext``: rows on standard output and, with --out, as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nanoglm.api import load
from nanoglm.errors import InputError
from nanoglm.eval.longcontext import Row, cells, evaluate
from nanoglm.ops import cpu
from nanoglm.tasks import VOCABULARY, Task

DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / "recall"  # recipes/recall.py trained it


def longcontext(
    model: Annotated[str, tyro.conf.Positional] = str(DEFAULT_MODEL),
    /,
    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536),
    sequences: int = 5,
    task: Task = "recall",
    topk: int | None = None,
    controls: tuple[str, ...] = (),
    text: Path | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Questions about facts in a long haystack: right answers with 95 % intervals, and what each layer selected.

    Args:
        model: A checkpoint directory with the tasks' vocabulary of 2,048, such as recipes/recall.py trains; if left
            out, the one that comes with nanoglm.
        lengths: Tokens of a sequence, its questions included.
        sequences: Of each length, with 64 questions each.
        task: What is hidden and asked (nanoglm/tasks.py).
        topk: Tokens that each token selects; the model's own number if left out.
        controls: Other ways to attend beside the model's: dense, window, random, or a schedule such as FSSS.
        text: A file in whose bytes needle hides facts.
        seed: Of the sequences.
        out: A JSON file for the rows; those it holds stay, so a long run may come in parts.
    """
    module, console = load(model).module, Console(stderr=True)
    if module.config.vocab_size != VOCABULARY:
        raise InputError(f"model has vocabulary {module.config.vocab_size}; expected the tasks' {VOCABULARY}")
    try:
        filler = None if text is None else np.frombuffer(text.read_bytes(), np.uint8)
    except OSError as error:
        raise InputError(f"text {text} cannot be read: {error.strerror}; expected a file") from None
    record = _record(out)
    rows: list[Row] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for length in lengths:
            for way in ("sparse", *controls):
                bar = progress.add_task(f"{way} {length:,}", total=1.0)

                def tell(share: float, bar: object = bar) -> None:
                    progress.update(bar, completed=share)  # type: ignore[arg-type]  # a number to rich alone

                rows.append(evaluate(
                    module, task, length, sequences=sequences, topk=topk, way=way, text=filler, seed=seed,
                    progress=tell,
                ))  # fmt: skip
                if out is not None:  # after each row: the longest come last
                    record["rows"].append(asdict(rows[-1]))
                    _save(out, record)
    shown = [cells(row) for row in rows]
    table = Table(*shown[0] if shown else ())
    for each in shown:
        table.add_row(*each.values())
    Console(width=max(Console().width, 160)).print(table)


def _record(out: Path | None) -> dict[str, list[object]]:
    """What the file holds, with this command added. Raises InputError if it is none of ours or cannot be written."""
    best = cpu.best()
    about = {
        "command": " ".join(["nanoglm", *sys.argv[1:]]), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "kernels": best.name if best else "none (PyTorch)",
    }  # fmt: skip
    record: dict[str, list[object]] = {"runs": [], "rows": []}
    if out is not None and out.exists():
        try:
            record = {name: list(json.loads(out.read_text())[name]) for name in record}
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"out {out} holds something else; expected rows of nanoglm longcontext") from None
    record["runs"].append(about)
    if out is not None:
        _save(out, record)
    return record


def _save(out: Path, record: object) -> None:
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"out is {out}, which cannot be written: {error.strerror}") from None
