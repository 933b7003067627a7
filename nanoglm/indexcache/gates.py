"""Whether a model can tell patterns apart at all: without these gates, whatever a search finds means nothing.

    sparse     under its own Selections a model is as good as dense
    chance     random sets, and the first token with the last k - 1, are worse: it matters what is selected
    one        the first layer's Selection for all layers is worse: it matters who selects

Source: indexcache spec 8.1, 8.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nanoglm.indexcache.calibration import Calibration
from nanoglm.indexcache.evaluate import BATCH_TOKENS, Score, judge
from nanoglm.indexcache.search import paired
from nanoglm.indexcache.stack import GLMStack, run

Way = Literal["sparse", "dense", "random", "window", "one"]
ROWS, BEYOND = 1024, 1 << 40  # drawn at once; no position
NATS, SHARE, HARM, ERRORS = 0.02, 0.02, 0.10, 5.0  # spec 8.3


@dataclass(frozen=True)
class Gate:
    """One condition: a figure, what it has to be, and whether it is."""

    name: str
    value: float
    expected: str
    ok: bool


@torch.no_grad()
def scores(stack: GLMStack, data: Calibration, way: Way, seed: int = 0) -> Score:
    """The scores of one way to select, in all layers alike."""
    generator, parts = torch.Generator().manual_seed(seed), list[Score]()
    for part in data.sample.split(BATCH_TOKENS):
        x_TD, step = stack.begin(part.ids, part.batch)
        if way == "dense":
            step = replace(step, attention="dense")
        made = _made(way, part.batch.positions, stack.model.config.index_topk, generator)
        received: Tensor | None = None
        for i, letter in enumerate(stack.pattern):
            own = made is None and (i == 0 or (letter == "F" and way != "one"))
            x_TD, received = run(stack.layer(i), x_TD, step, None if own else received if made is None else made)
        parts.append(judge(stack, part, x_TD))
    return Score(*(torch.cat(values) for values in zip(*parts, strict=True)))


def gates(stack: GLMStack, data: Calibration) -> list[Gate]:
    """The gates of a model on sequences; every one has to be open."""
    ways: tuple[Way, ...] = ("sparse", "dense", "random", "window", "one")
    found = {way: scores(stack, data, way) for way in ways}
    means = {way: float(score.loss.mean()) for way, score in found.items()}
    own, dense = found["sparse"], found["dense"]
    rows = []
    gap, missed = means["sparse"] - means["dense"], float(dense.right.mean() - own.right.mean())
    rows.append(Gate("sparse less dense loss, nats", gap, f"at most {NATS}", gap <= NATS))
    rows.append(Gate("answers right, dense less sparse", missed, f"at most {SHARE}", missed <= SHARE))
    controls: tuple[tuple[Way, str], ...] = ("random", "random sets"), ("window", "first token and last k - 1")
    for way, name in controls:
        harm = means[way] - means["sparse"]
        rows.append(Gate(f"{name} less sparse, nats", harm, f"at least {HARM}", harm >= HARM))
    difference, error = paired(found["one"].loss, own.loss)
    rows.append(Gate(
        "one indexer for all layers, standard errors", difference / error if error else 0.0, f"more than {ERRORS:g}",
        difference > ERRORS * error,
    ))  # fmt: skip
    return rows


def _made(way: Way, positions_T: Tensor, k: int, generator: torch.Generator) -> Tensor | None:
    """The Selection [T, k] that stands in place of the indexers'; None if they choose."""
    if way not in ("random", "window"):
        return None
    at, places = positions_T[:, None], torch.arange(k, device=positions_T.device)
    if way == "window":
        found = torch.where(at < k, places, torch.where(places == 0, 0, at - k + 1 + places))
    else:
        found = torch.cat([_drawn(some, k, generator) for some in at.split(ROWS)])
    return torch.where(found <= at, found, -1).int()


def _drawn(at_T1: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the tokens seen, each set as likely as any other, ascending: int64 [T, k]; BEYOND where there are less."""
    drawn = torch.rand(len(at_T1), int(at_T1.max()) + 1, generator=generator).to(at_T1.device)
    seen = torch.arange(drawn.shape[1], device=at_T1.device) <= at_T1
    found = drawn.masked_fill(~seen, -1.0).topk(min(k, drawn.shape[1]), -1).indices
    found = torch.where(found <= at_T1, found, BEYOND).sort(-1).values
    return torch.cat([found, found.new_full((len(found), k - found.shape[1]), BEYOND)], 1)
