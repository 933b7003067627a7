"""``nanoglm report RUN``: the log of a run as one picture and one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from nanoglm.errors import InputError

Line = dict[str, Any]
# What is drawn: title, unit, and the log's names with what they mean.
PANELS = (
    ("loss", "nats a token", {"loss": "next token", "mtp": "MTP", "val_dense": "unseen text, dense",
                              "val_sparse": "unseen text, under Selections"}),
    ("indexers", "", {"kl": "KL, nats", "mass": "attention inside the top-k, least", "active": "ReLU above 0, least"}),
    ("experts", "busiest / mean", {"load": "load, most", "balance": "sequence balance"}),
    ("drafts", "tokens a verification", {"accepted": "accepted"}),
)  # fmt: skip


def read_log(path: Path) -> list[Line]:
    """The lines of a run's train.jsonl. Raises InputError if there is none, or it is none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"log {path} cannot be read: {error}") from None
    if not lines or not all(isinstance(line, dict) and "step" in line for line in lines):
        raise InputError(f"log {path} holds no steps; expected the train.jsonl of nanoglm train")
    return lines


def report(run: Path) -> list[Path]:
    """Writes ``report.png`` and ``report.html`` into a run's directory; returns their paths.

    Raises:
        InputError: no log there, matplotlib is missing, or the directory cannot be written.
    """
    lines = read_log(run / "train.jsonl")
    picture = draw(lines)
    page = PAGE.format(
        title=html.escape(run.name), picture=base64.b64encode(picture).decode(), rows=_table(lines),
        last=", ".join(f"{name} {value}" for name, value in _last(lines).items()),
    )  # fmt: skip
    written = [run / "report.png", run / "report.html"]
    try:
        written[0].write_bytes(picture)
        written[1].write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"run {run} cannot be written: {error.strerror}") from None
    return written


def draw(lines: list[Line]) -> bytes:
    """A PNG of four panels over the steps, the stages shaded."""
    try:
        figure_of: Callable[..., Any] = import_module("matplotlib.figure").Figure
    except ImportError:
        raise InputError("a report needs matplotlib; expected pip install 'nanoglm[plots]'") from None
    figure = figure_of(figsize=(12, 7), layout="constrained")
    for axes, (title, unit, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name, label in names.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 9 else None, ms=3)
        for i, (stage, begin, end) in enumerate(stages(lines)):
            axes.axvspan(begin, end, alpha=0.06 + 0.06 * (i % 2), color="black", lw=0)
            axes.text(begin, 1.01, stage, transform=axes.get_xaxis_transform(), fontsize=7)
        axes.set(xlabel="step", ylabel=unit)
        axes.set_title(title, loc="right")
        if axes.lines:
            axes.legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    return out.getvalue()


def stages(lines: list[Line]) -> list[tuple[str, int, int]]:
    """Each stage with its first step and the first of the next (of the last one, its own last)."""
    firsts: dict[str, int] = {}
    for line in lines:
        firsts.setdefault(line["stage"], line["step"])
    ends = [*list(firsts.values())[1:], lines[-1]["step"]]
    return [(name, begin, end) for (name, begin), end in zip(firsts.items(), ends, strict=True)]


def _last(lines: list[Line]) -> Line:
    """The newest value of everything."""
    found: Line = {}
    for line in lines:
        found |= line
    return found


def _table(lines: list[Line]) -> str:
    """The validations, a row each."""
    rows = [line for line in lines if "val_dense" in line]
    names = list(dict.fromkeys(name for line in rows for name in line))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ("".join(f"<td>{html.escape(str(line.get(name, '')))}</td>" for name in names) for line in rows)
    return f"<tr>{head}</tr>" + "".join(f"<tr>{cells}</tr>" for cells in body)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 14px sans-serif; margin: 2em }} td, th {{ padding: .2em .7em; text-align: right }}
tr:nth-child(even) {{ background: #f3f3f3 }} img {{ max-width: 100% }}</style>
<h1>{title}</h1><p>{last}</p><img alt="losses and monitors over the steps" src="data:image/png;base64,{picture}">
<h2>Validations</h2><table>{rows}</table></html>
"""
