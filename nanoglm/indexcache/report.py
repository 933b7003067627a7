"""``nanoglm indexcache report RUN``: what a folder holds as one page that needs nothing beside it, and as pictures.

overlap    overlap.json       how much the layers' Selections have in common
loss       evaluations.jsonl  every pattern that was tried, and what each method arrived at
patterns   result.json        the patterns as strips
tasks      result.json        right answers by task
speed      speed.json         nanoglm bench prefill, against the cost model
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from nanoglm.errors import InputError
from nanoglm.indexcache.search import best_by_count, read_scores

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f", "#e377c2", "#bcbd22",
    "#aec7e8", "#ffbb78",
)  # fmt: skip
SCALE = "Viridis"
LEAST = 1e-3  # nats, below which a difference is none


@dataclass
class Plot:
    """One picture, of which both a page's and a paper's form are made.

    Attributes:
        lines: (name, x, y, whether points alone). grid: instead of lines, rows of values, with names of rows.
        low, high: of the grid's colours.
    """

    name: str
    title: str
    x: str
    y: str
    note: str = ""
    lines: list[tuple[str, list[Any], list[float], bool]] = field(default_factory=list)
    grid: list[list[float]] | None = None
    rows: list[str] = field(default_factory=list)
    low: float = 0.0
    high: float = 1.0
    bars: bool = False
    square: bool = False
    log: bool = False


def report(run: Path) -> list[Path]:
    """Writes ``report.html`` and a PNG a plot into ``run``; returns their paths.

    Raises:
        InputError: nothing to draw there, plotly or matplotlib is missing, or the folder cannot be written.
    """
    plots = plots_of(run)
    if not plots:
        raise InputError(f"run {run} holds nothing to draw; expected what nanoglm indexcache search or overlap wrote")
    written = [run / f"{plot.name}.png" for plot in plots]
    try:
        for plot, file in zip(plots, written, strict=True):
            _picture(plot, file)
        (run / "report.html").write_text(page(run.name, plots), encoding="utf-8")
    except OSError as error:
        raise InputError(f"run {run} cannot be written: {error.strerror}") from None
    return [*written, run / "report.html"]


def plots_of(run: Path) -> list[Plot]:
    """What there is to draw."""
    plots: list[Plot] = []
    if (held := _json(run / "overlap.json")) is not None:
        plots += [_overlap(band) for band in held["bands"]]
    result = _json(run / "result.json")
    if result is not None:
        plots += [_loss(result, run / "evaluations.jsonl"), _patterns(result), _tasks(result)]
    if (held := _json(run / "speed.json")) is not None:
        plots.append(_speed(held))
    return plots


# --------------------------------------------------------------------------------- plots
def _overlap(band: dict[str, Any]) -> Plot:
    corrected = [[(value - band["chance"]) / (1 - band["chance"]) for value in row] for row in band["overlap"]]
    off = [value for i, row in enumerate(corrected) for j, value in enumerate(row) if i != j]
    note = (
        f"Positions {band['begin']} to {band['end'] - 1}, {band['queries']:,} queries; 0 is chance "
        f"({band['chance']:.2f} of k), 1 the same set. Off the diagonal {min(off):.2f} to {max(off):.2f}."
    )
    names = [str(i) for i in range(len(corrected))]
    return Plot(
        f"overlap-{band['begin']}", "Overlap of the layers' Selections, less chance", "layer", "layer", note,
        grid=corrected, rows=names, low=min(0.0, *off), high=1.0, square=True,
    )  # fmt: skip


def _loss(result: dict[str, Any], evaluations: Path) -> Plot:
    rows = result["rows"]
    unit = f"nats a token more than all, {LEAST} and up"
    plot = Plot("loss", "Loss against indexers kept", "indexers", unit, log=True)
    base = next(row["loss"] for row in rows if row["method"] == "all")
    if evaluations.exists():
        found = {pattern: float(score.loss.mean()) for pattern, score in read_scores(evaluations).items()}
        points = sorted((pattern.count("F"), loss - base) for pattern, loss in found.items())
        plot.lines.append(("every pattern tried", [n for n, _ in points], [loss for _, loss in points], True))
        best = best_by_count(found)
        plot.lines.append(("the best of them", list(best), [found[p] - base for p in best.values()], False))
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "all"):
        own = sorted((row["full"], row["difference"]) for row in rows if row["method"] == method)
        plot.lines.append((method, [n for n, _ in own], [loss for _, loss in own], method != "greedy"))
    plot.lines = [(name, x, [max(LEAST, value) for value in y], points) for name, x, y, points in plot.lines]
    plot.note = f"{result['settings']['sequences']} sequences of {result['settings']['length']} tokens."
    return plot


def _patterns(result: dict[str, Any]) -> Plot:
    rows = [row for row in result["rows"] if row["method"] == "greedy" or row["full"] <= result["full"] + 2]
    grid = [[float(letter == "F") for letter in row["pattern"]] for row in rows]
    names = [f"{row['method']} {row['full']}" for row in rows]
    note = "Bright: the layer runs its indexer; dark: it takes the Selection of the last that did."
    return Plot("patterns", "Patterns", "layer", "", note, grid=grid[::-1], rows=names[::-1])


def _tasks(result: dict[str, Any]) -> Plot:
    plot = Plot("tasks", "Right by task", "", "share of scored tokens", bars=True)
    last: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        if row["method"] == "all" or row["full"] == result["full"] or row["method"] not in last:
            last[row["method"]] = row
    for method, row in last.items():
        plot.lines.append((f"{method} ({row['full']})", list(row["right"]), list(row["right"].values()), False))
    return plot


def _speed(held: dict[str, Any]) -> Plot:
    rows = [row for row in held["rows"]["prefill"] if "speed_up" in row]
    lengths = [f"{row['length'] // 1024}K" for row in rows]
    plot = Plot("speed", "Prefill, all-Full over IndexShare", "tokens", "times faster")
    plot.lines.append(("measured", lengths, [row["speed_up"] for row in rows], False))
    plot.lines.append(("1 / (1 - s (1 - F/N))", lengths, [row["scoring"] for row in rows], False))
    return plot


# --------------------------------------------------------------------------------- their two forms
def page(name: str, plots: list[Plot]) -> str:
    """The HTML, with plotly's script inside."""
    try:
        graphs = import_module("plotly.graph_objects")
    except ImportError:
        raise InputError("a report needs plotly; expected pip install 'nanoglm[plots]'") from None
    parts, first = list[str](), True
    for plot in plots:
        figure = graphs.Figure()
        if plot.grid is not None:
            figure.add_trace(graphs.Heatmap(
                z=plot.grid, y=plot.rows, x=[str(i) for i in range(len(plot.grid[0]))], colorscale=SCALE, zmin=plot.low,
                zmax=plot.high, xgap=1, ygap=1, showscale=plot.square,
            ))  # fmt: skip
        for (label, x, y, points), colour in zip(plot.lines, _colours(plot), strict=True):
            if plot.bars:
                figure.add_trace(graphs.Bar(name=label, x=x, y=y, marker_color=colour))
            else:
                mode = "markers" if points else "lines+markers"
                marker = {"color": colour, "size": 5 if label == "every pattern tried" else 9}
                figure.add_trace(graphs.Scatter(name=label, x=x, y=y, mode=mode, marker=marker))
        figure.update_layout(
            title=plot.title, xaxis_title=plot.x, yaxis_title=plot.y, template="plotly_white", height=560,
            width=680 if plot.square else 1000, yaxis={"autorange": "reversed"} if plot.square else {},
            margin={"l": 150},
        )  # fmt: skip
        figure.update_xaxes(type="category" if plot.grid is not None or plot.name in ("tasks", "speed") else "linear")
        if plot.grid is not None or plot.log:
            figure.update_yaxes(type="log" if plot.log else "category")
        script = figure.to_html(full_html=False, include_plotlyjs="inline" if first else False)
        parts.append(f"{script}<p>{html.escape(plot.note)}</p>")
        first = False
    return PAGE.format(title=html.escape(name), body="\n".join(parts))


def _picture(plot: Plot, file: Path) -> None:
    """The same as PNG."""
    try:
        figure_of: Callable[..., Any] = import_module("matplotlib.figure").Figure
    except ImportError:
        raise InputError("a report needs matplotlib; expected pip install 'nanoglm[plots]'") from None
    figure = figure_of(figsize=(6.4, 5.6) if plot.square else (10, 5.6), layout="constrained", dpi=120)
    axes = figure.subplots()
    if plot.grid is not None:
        image = axes.imshow(
            plot.grid, vmin=plot.low, vmax=plot.high, cmap=SCALE.lower(), aspect="auto",
            origin="upper" if plot.square else "lower",
        )  # fmt: skip
        axes.set_yticks(range(len(plot.rows)), plot.rows)
        axes.set_xticks(range(len(plot.grid[0])))
        if plot.square:
            figure.colorbar(image)
    for place, ((label, x, y, points), colour) in enumerate(zip(plot.lines, _colours(plot), strict=True)):
        if plot.bars:
            width = 0.8 / len(plot.lines)
            axes.bar([i + place * width - 0.4 + width / 2 for i in range(len(x))], y, width, label=label, color=colour)
            axes.set_xticks(range(len(x)), x)
        else:
            small = label == "every pattern tried"
            axes.plot(x, y, marker="o", ms=3 if small else 7, ls="none" if points else "-",
                      label=label, color=colour, zorder=1 if small else 2)  # fmt: skip
    if plot.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    if plot.log:
        axes.set_yscale("log")
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    figure.savefig(file, format="png")


def _colours(plot: Plot) -> list[str]:
    """One for each line; what was merely tried is pale."""
    shown = iter(COLOURS * (1 + len(plot.lines) // len(COLOURS)))
    fixed = {"every pattern tried": "#cccccc", "the best of them": "#000000"}
    return [fixed.get(label) or next(shown) for label, *_ in plot.lines]


def _json(file: Path) -> Any:
    """What a file holds, None if there is none. Raises InputError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"file {file} cannot be read: {error}") from None


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 16px system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em; }}
p {{ color: #555; margin: 0 0 2em; }}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
