"""``nanoglm bench report``: a page of tables and plots from the JSON files of the others."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from nanoglm.bench.result import COLUMNS, Result, check_out
from nanoglm.errors import InputError

INTRODUCTION = """# Performance

This page is made by `nanoglm bench report` from JSON files that other verbs of `nanoglm bench` wrote.

Each figure stands beside a limit that was measured in the same run, and beside a peer where there is one. The machines
are taken to be noisy: what is compared ran in turns within one process (peers: processes in turns), a figure is the
median of the rounds, and the fastest and the slowest are given. Weights are random, so Selections are too.

IndexShare saves the Shared layers' indexers (scoring and top-k, and their small projections) and nothing else. What
part of the time those take belongs to the model's shape and to the length (`indexer : rest`), so a speed-up says
little without it.
"""
TITLES = {
    "ceilings": "Ceilings: what a library reaches on this machine",
    "ops": "Ops against their ceilings",
    "prefill": "Prefill: all-Full and IndexShare",
    "whole": "One whole prompt, part by part",
    "run": "One whole prompt",
    "peer": "Against transformers, at one shape",
    "decode": "Decoding behind a context",
    "engine": "Many requests, with and without drafts",
    "prefix": "A second request that begins like the first",
    "generate": "Generation against transformers, the same checkpoint and prompts",
    "step": "One step of training",
    "curve": "A training run",
}
MODEL = """Cost model: T = N L c + N_idx L²/2 c_i, with N the layers that work at every token (the last one needs only
the last token), N_idx those of them with an indexer, c {us_per_token_and_layer:.3g} µs per token and layer and c_i
{ns_per_pair:.3g} ns per scored pair: least squares of the relative error over all lengths. The column `predicted`
leaves out the length it predicts. With a third term, N_idx L c_p, for the indexers' projections: c
{us_per_token_and_layer_of_3:.3g} µs, c_i {ns_per_pair_of_3:.3g} ns, c_p {us_per_token_and_indexer_of_3:.3g} µs.
"""


def report(files: tuple[Path, ...], out: Path) -> list[Path]:
    """Writes the page and, beside it, its plots; returns what was written.

    Raises:
        InputError: no or unusable files, a place that cannot be written, or matplotlib is missing.
    """
    if not files:
        raise InputError("files are none; expected JSON files of nanoglm bench")
    check_out(out)
    results = [Result.load(file) for file in files]
    written, text = [], INTRODUCTION
    for table, key, ylabel in (("prefill", "seconds", "seconds of prefill"), ("decode", "ms", "ms a token")):
        # Against length: of a single one there is nothing to draw.
        drawn = [result for result in results if len({row["length"] for row in result.rows.get(table, [])}) > 1]
        if drawn:
            picture = out.with_name(f"{out.stem}-{table}.svg")
            _plot(drawn, table, key, ylabel, picture)
            written.append(picture)
            text += f"\n![{TITLES[table]}]({picture.name})\n"
    for result in results:
        text += _section(result)
    used = [name for name in COLUMNS if any(name in result.rows for result in results)]
    text += "\n## What the columns say\n"
    for name in used:
        text += f"\n**{TITLES[name]}**\n\n"
        text += "".join(f"- `{column.title.strip()}`: {column.meaning}\n" for column in COLUMNS[name])
    out.write_text(text, encoding="utf-8")
    return [out, *written]


def _section(result: Result) -> str:
    lines = []
    for name, rows in result.rows.items():
        columns = [column for column in COLUMNS[name] if any(column.cell(row) for row in rows)]
        lines += [f"\n## {TITLES[name]}\n"]
        lines += ["| " + " | ".join(column.title.strip() for column in columns) + " |"]
        lines += ["|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(column.cell(row) for column in columns) + " |" for row in rows]
    lines += ["", f"`{result.command}`" if result.command else f"`nanoglm bench {result.bench}`"]
    lines[-1] += f", {result.rounds} rounds; " + ", ".join(f"{k}: {v}" for k, v in result.machine.items()) + "."
    if result.shape:
        lines += ["", "Shape: " + ", ".join(f"{k} {v}" for k, v in result.shape.items()) + "."]
    if result.fit:
        lines += ["", MODEL.format(**result.fit).strip()]
    lines += [f"\nNot measured: {note}" for note in result.notes]
    return "\n".join(lines) + "\n"


def _plot(results: list[Result], table: str, key: str, ylabel: str, file: Path) -> None:
    """Medians with bars from the fastest to the slowest; dashed, the cost model."""
    try:
        import_module("matplotlib").use("svg")
        pyplot: Any = import_module("matplotlib.pyplot")
    except ImportError:
        raise InputError("matplotlib is not installed; expected pip install 'nanoglm[plots]'") from None
    pyplot.rcParams["svg.hashsalt"] = "nanoglm"  # equal figures give equal files
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for i, result in enumerate(results):
        for pattern, marker in (("all-Full", "o"), ("IndexShare", "s")):
            rows = [row for row in result.rows[table] if row["pattern"] == pattern]
            lengths, values = [row["length"] for row in rows], [row[key] for row in rows]
            bars = [[row[key] - row["low"] for row in rows], [row["high"] - row[key] for row in rows]]
            colour = f"C{2 * i + (pattern == 'IndexShare')}"
            label = f"{pattern}, {result.shape.get('index_dtype', '')} index keys"
            modelled = all("model" in row for row in rows)
            style = "none" if modelled else "-"
            axes.errorbar(lengths, values, bars, marker=marker, ls=style, color=colour, capsize=3, label=label)
            if modelled:
                axes.plot(lengths, [row["model"] for row in rows], "--", color=colour, label=f"{pattern}, cost model")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
