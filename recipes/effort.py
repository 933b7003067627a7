"""What thinking effort buys the bundled assistant, and what else it can do: a table, a JSON file and a plot.

python recipes/effort.py --out bench/results/cpu/effort.json --plot-to docs/effort.png
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import tyro

import nanoglm
from nanoglm.api import load
from nanoglm.eval.assistant import report

BUNDLED = Path(nanoglm.__file__).parent / "assets" / "assistant"
NAMES = {"off": "thinking off", "high": "High", "max": "Max", "no line": "Max, effort line removed"}


def table(found: dict[str, Any]) -> str:
    """All rows in Markdown."""
    lines = ["| effort | temperature | thinking tokens | right | 95 % |", "| --- | ---: | ---: | ---: | --- |"]
    for row in found["effort"]:
        thinking = f"{row['thinking']:.1f} ± {row['error']:.1f}"
        lines.append(f"| {NAMES[row['arm']]} | {row['temperature']:g} | {thinking} | {shares(row)} |")
    lines += ["", "| task | right | 95 % |", "| --- | ---: | --- |"]
    for kind in ("tools", "lookups"):
        lines += [f"| {kind}: {row['name']} | {shares(row)} |" for row in found[kind]]
    lines += ["", "| drafts | tokens a verification |", "| ---: | ---: |"]
    return "\n".join(lines + [f"| {drafts} | {tokens:.2f} |" for drafts, tokens in found["tokens a step"].items()])


def shares(row: dict[str, Any]) -> str:
    percent = 100 * row["right"] / row["asked"]
    return f"{row['right']} of {row['asked']} ({percent:.1f} %) | {100 * row['low']:.1f} to {100 * row['high']:.1f} %"


def plot(found: dict[str, Any], path: Path) -> None:
    """Right answers against thinking tokens, greedy and as served."""
    figure = import_module("matplotlib.figure").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for temperature, colour in ((0.0, "tab:blue"), (1.0, "tab:orange")):
        rows = [row for row in found["effort"] if row["temperature"] == temperature]
        label = "greedy" if temperature == 0 else "temperature 1, top-p 0.95"
        for arms, style, name in ((rows[:3], "o-", label), (rows[3:], "x", None)):
            x, y = [row["thinking"] for row in arms], [100 * row["right"] / row["asked"] for row in arms]
            spread = [
                [at - 100 * row["low"] for at, row in zip(y, arms, strict=True)],
                [100 * row["high"] - at for at, row in zip(y, arms, strict=True)],
            ]
            errors = [1.96 * row["error"] for row in arms]
            axes.errorbar(x, y, spread, errors, style, color=colour, label=name, capsize=3)
        if temperature == 0:
            for row in rows:
                at = row["thinking"], 100 * row["right"] / row["asked"]
                axes.annotate(NAMES[row["arm"]], at, xytext=(6, -14), textcoords="offset points", fontsize=8)
    axes.set(xlabel="thinking tokens (mean)", ylabel="right answers, %", ylim=(0, 103))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(
    model: Path = BUNDLED, out: Path | None = None, plot_to: Path | None = None, problems: int = 500, others: int = 200
) -> None:
    """Asks the model and prints the tables.

    Args:
        model: A checkpoint directory of recipes/assistant.py.
        out: A JSON file for the rows; if it is there, nothing is asked and its rows are shown.
        plot_to: A picture of right answers against thinking tokens.
        problems: At each effort. others: Tool loops and lookups of each kind.
    """
    torch.set_num_threads(1)
    if out is not None and out.is_file():
        found = json.loads(out.read_text())
    else:
        found = report(load(model), problems, others)
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if plot_to is not None:
        plot(found, plot_to)


if __name__ == "__main__":
    tyro.cli(main)
