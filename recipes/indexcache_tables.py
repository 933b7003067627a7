"""The tables of docs/indexcache.md from what recipes/indexcache_nano.sh left in its folder.

python recipes/indexcache_tables.py tables OUT             tables.md in OUT, also printed, and a report of each search
python recipes/indexcache_tables.py pattern RUN METHOD N   the pattern with N indexers that a method arrived at
python recipes/indexcache_tables.py patterns RUN...        every pattern that methods arrived at in these searches
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from nanoglm.indexcache.pattern import flipped, sources
from nanoglm.indexcache.report import report
from nanoglm.indexcache.search import paired

Scores = dict[str, torch.Tensor]  # by pattern, the losses of the sequences


def scores_of(run: Path) -> Scores:
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    return {x["pattern"]: torch.tensor(x["loss"], dtype=torch.float64) for x in map(json.loads, lines)}


def rows_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "result.json").read_text())["rows"]
    return found


def pattern_of(run: Path, method: str, full: int) -> str:
    """The last pattern of a method with so many indexers."""
    return str([r["pattern"] for r in rows_of(run) if r["method"] == method and r["full"] == full][-1])


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    error = f" +- {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{error}"


def spearman(one: list[float], other: list[float]) -> float:
    """Correlation of ranks."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def free(out: Path, seed: int, full: int) -> list[str]:
    """Training-free search of one model at one count, on the sequences searched and on others."""
    run = out / f"search-{seed}-{full}"
    searched, test = scores_of(run), scores_of(out / f"test-{seed}")
    own = "F" * len(next(iter(searched)))
    rule = "FSSSSSSSFSSS" if full == 2 and len(own) == 12 else pattern_of(run, "uniform (paper)", full)
    best = pattern_of(run, "exhaustive", full)
    harm, error = paired(searched[rule], searched[own])
    lines = []
    methods = ["uniform", "greedy", "swap", "beam", "exhaustive", "similarity", "overlap", "random"]
    same = sorted(float(v.mean()) for p, v in searched.items() if p.count("F") == full)
    for method in methods:
        if method == "random":
            drawn = [r["pattern"] for r in rows_of(run) if r["method"] == "random"]
            values = [float((searched[p] - searched[own]).mean()) for p in drawn]
            lines.append(f"| {seed} | {full} | random, mean of {len(drawn)} | | {mean(values):+.4f} | | | | |")
            continue
        pattern = rule if method == "uniform" else pattern_of(run, method, full)
        lost, se = paired(searched[pattern], searched[own])
        unseen, unseen_se = paired(test[pattern], test[own])
        of_best = float((searched[rule] - searched[pattern]).mean() / (searched[rule] - searched[best]).mean())
        unseen_best = float((test[rule] - test[pattern]).mean() / (test[rule] - test[best]).mean())
        rank = same.index(float(searched[pattern].mean())) + 1
        shown = f"{of_best:.2%} | {unseen_best:.2%}" if method != "uniform" else f"({harm / error:.0f} SE) |"
        lines.append(
            f"| {seed} | {full} | {method} | {pattern} | {lost:+.4f} +- {se:.4f} | {unseen:+.4f} +- {unseen_se:.4f} | "
            f"{shown} | {rank} of {len(same)} |"
        )
    return lines


def ranks(out: Path, seed: int) -> tuple[float, float]:
    """How well two proxies order all patterns with 3 indexers: overlap with the source, sum of single flips' losses."""
    run = out / f"search-{seed}-3"
    searched, bands = scores_of(run), json.loads((run / "overlap.json").read_text())["bands"]
    every = [p for p in searched if p.count("F") == 3]
    own = "F" * len(every[0])
    loss = [float(searched[p].mean()) for p in every]
    table = bands[-1]["overlap"]
    overlap = [-sum(table[i][j] for i, j in enumerate(sources(p))) for p in every]
    flips = [sum(float(searched[flipped(own, i)].mean()) for i, c in enumerate(p) if c == "S") for p in every]
    return spearman(overlap, loss), spearman(flips, loss)


def arms(out: Path) -> list[str]:
    """Every model trained under a pattern, and sharing at inference only, against the model with all indexers."""
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for run in sorted(out.glob("test-*")):
        match = re.fullmatch(r"test-(?:(\w+)-)?(\d+)", run.name)
        if match is None:
            continue
        base = rows_of(out / f"test-{match[2]}")[0]
        for row in rows_of(run)[:1]:
            name = match[1] or "all"
            found.setdefault(name, []).append((row["loss"] - base["loss"], row["right"]))
        if match[1] is None and (out / f"uniform4-{match[2]}").exists():
            for name, pattern in (
                ("sharing at inference only: uniform 1/4", "FSSSFSSSFSSS"),
                ("sharing at inference only: uniform 1/8", "FSSSSSSSFSSS"),
                ("sharing at inference only: greedy 1/4", pattern_of(out / f"search-{match[2]}-3", "greedy", 3)),
            ):
                for row in [r for r in rows_of(run) if r["pattern"] == pattern][:1]:
                    found.setdefault(name, []).append((row["difference"], row["right"]))
    lines = []
    for name, values in found.items():
        right = {group: mean(v[1][group] for v in values) for group in values[0][1]}
        shown = " ".join(f"{group} {share:.1%}" for group, share in right.items())
        lines.append(f"| {name} | {len(values)} | {spread([v[0] for v in values])} | {shown} |")
    return lines


def tables(out: Path) -> str:
    """All of it as Markdown."""
    parts = ["# The pattern lab's figures", "", "## Training-free", ""]
    parts.append(
        "| seed | indexers | method | pattern | nats more than all | on other sequences | of the optimum's recovery | "
        "there | rank |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    runs = sorted(
        (int(m[1]), int(m[2])) for r in out.glob("search-*") if (m := re.fullmatch(r"search-(\d+)-(\d+)", r.name))
    )
    for seed, full in runs:
        parts += free(out, seed, full)
    parts += ["", "| seed | Spearman of overlap and loss | of single flips and loss |", "| --- | --- | --- |"]
    for seed in sorted({seed for seed, _ in runs}):
        parts.append("| {} | {:.2f} | {:.2f} |".format(seed, *ranks(out, seed)))
    parts += ["", "## Training-aware", "", "| arm | seeds | nats more than all | right |", "| --- | --- | --- | --- |"]
    parts += arms(out)
    if (out / "plain" / "tables.md").exists():
        parts += ["", "## Without an indexer", "", (out / "plain" / "tables.md").read_text().strip()]
    seconds = [int(line.split()[1]) for line in (out / "seconds.txt").read_text().splitlines()]
    parts += ["", f"{len(seconds)} trainings, {sum(seconds) / 3600:.1f} hours of one core."]
    return "\n".join(parts) + "\n"


def main(command: str, *arguments: str) -> None:
    if command == "pattern":
        print(pattern_of(Path(arguments[0]), arguments[1], int(arguments[2])))
    elif command == "patterns":
        print(*sorted({row["pattern"] for run in arguments for row in rows_of(Path(run))}))
    else:
        out = Path(arguments[0])
        (out / "tables.md").write_text(tables(out))
        for run in sorted(out.glob("search-*")):
            report(run)
        print((out / "tables.md").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
