"""Long context: all questions stand behind one haystack, so one prefill gives an answer to each.

The haystack goes through the paged cache by the ops that serve, chunk by chunk; the questions with their answers are
the last pass, whose every row is looked at. Besides the answers a row says why: what each layer selected, how far the
needle's score stands out, and what attention made of it. The other ways to attend, at the same weights:

    sparse   the model as it is: each token attends to the k that its indexers select
    dense    to every earlier token; the whole sequence at once
    window   to the last k
    random   to k drawn anew for each token and layer
    FSSS...  as sparse, with another schedule: a layer that becomes Shared takes the Selection of the one before

Shape legend: T rows of a pass, Q questions' rows, S keys so far, K selected, J indexer heads, I index dim, H heads.

Source: training spec 5.2, 5.3.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from nanoglm.cache import PAGE, PagedCache
from nanoglm.engine.generate import PREFILL_CHUNK
from nanoglm.errors import InputError
from nanoglm.model import GLM, BatchStore, Output, Tape
from nanoglm.model.keys import IndexKeys
from nanoglm.ops import Batch
from nanoglm.ops.batch import storage_rows
from nanoglm.tasks import ASK, Example, Task, answers, draw

WAYS = ("sparse", "dense", "window", "random")
TENTHS = 10  # of the haystack: how deep an answer lies


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson 1927), which stays within 0 and 1 and is no point at either."""
    share, spread = right / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / asked + spread / asked / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class Row:
    """What one way to attend found at one length.

    Attributes:
        right: answers whose every token is the likeliest one. depths: by tenth of the haystack, (right, asked).
        layers: by layer means over the questions. Of Full layers: ``needle``, share of the Selections that hold the
            answer's place; ``neighbour``, of the answers' own that hold the token before, by which they are known;
            ``sigma`` and ``cutoff``, by how many standard deviations of all scores the needle's and the k-th best
            other's stand above their mean. Of all layers: ``mass``, what the best head gives to the answer's place.
        seconds: of the prefills.
    """

    task: Task
    way: str
    length: int
    topk: int
    sequences: int = 0
    right: int = 0
    asked: int = 0
    low: float = 0.0
    high: float = 1.0
    depths: list[list[int]] = field(default_factory=lambda: [[0, 0] for _ in range(TENTHS)])
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0


def evaluate(
    model: GLM,
    task: Task,
    length: int,
    *,
    sequences: int = 5,
    questions: int = 64,
    topk: int | None = None,
    way: str = "sparse",
    text: np.ndarray | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Row:
    """Asks about ``questions`` facts in each of several drawn sequences of ``length`` tokens.

    Args:
        topk: what each token selects, if not the configuration's number. way: see above.
        text: filler of ``needle``, byte ids. seed: of the sequences; every way gets the same ones.
        progress: called with the share done, 0 to 1.

    Raises:
        InputError: no such way, a length beyond the model's positions, or what ``tasks.draw`` refuses.
    """
    if sequences < 1:
        raise InputError(f"sequences is {sequences}; expected at least 1")
    if length > model.config.max_position_embeddings:
        raise InputError(f"length is {length}; expected at most {model.config.max_position_embeddings}")
    if way not in WAYS:
        model = rescheduled(model, way)

    def tell(number: int, share: float) -> None:
        progress((number + share) / sequences)

    row, found = Row(task, way, length, topk or model.config.index_topk), defaultdict[int, list[dict[str, float]]](list)
    for number in range(sequences):
        example = draw(task, length, np.random.default_rng((seed, length, number)), facts=questions, text=text)
        began = time.perf_counter()
        if way == "dense":
            run = _dense(model, example)
        else:
            run = _prefill(model, example, row.topk, way, seed + number, partial(tell, number))
        row.seconds += time.perf_counter() - began
        row.sequences += 1
        _judge(row, model, example, run)
        for layer, values in ({} if way == "dense" else _look(model, example, run)).items():
            found[layer].append(values)
    row.low, row.high = wilson(row.right, row.asked)
    for layer, each in found.items():
        row.layers[layer] = {name: round(fmean(one[name] for one in each), 4) for name in each[0]}
    row.seconds = round(row.seconds, 1)
    return row


def rescheduled(model: GLM, pattern: str) -> GLM:
    """The same weights under another schedule of F and S. Raises InputError if a layer would lack its indexer."""
    config = model.config
    types = tuple({"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern)
    lacks = [i for i, kind in enumerate(types) if kind != "shared" and not config.has_indexer(i)]
    if len(types) != config.num_hidden_layers or not set(pattern) <= {"F", "S"} or lacks:
        raise InputError(
            f"way is {pattern!r}; expected {', '.join(WAYS)} or {config.num_hidden_layers} letters F and S, F only "
            f"where the model's own {config.pattern} has it"
        )
    other = GLM(config.replace(indexer_types=types)).to(model.lm_head.weight)
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


# ------------------------------------------------------------------------------- forward
class _Cache(PagedCache):
    """A cache that also keeps index keys as they come: what the pools hold, only ops can read."""

    def __init__(self, model: GLM, tokens: int) -> None:
        weight = model.lm_head.weight
        super().__init__(model.config, -(-tokens // PAGE), dtype=weight.dtype, device=weight.device)
        self.plain = defaultdict[int, list[Tensor]](list)

    def write_index_keys(self, layer: int, keys: IndexKeys, batch: Batch) -> None:
        self.plain[layer].append(keys.finished())
        super().write_index_keys(layer, keys, batch)


@dataclass
class _Run:
    """One sequence through the model; ``begin`` is the first of the rows that the last pass holds.

    ``before``: by Full layer, of the answers' places, whether the place before was selected.
    """

    begin: int
    output: Output
    tape: Tape = field(default_factory=Tape)
    keys: dict[int, Tensor] = field(default_factory=dict)
    before: dict[int, list[float]] = field(default_factory=dict)


@torch.no_grad()
def _dense(model: GLM, example: Example) -> _Run:
    ids = torch.from_numpy(example.ids).to(model.lm_head.weight.device)
    batch = Batch.contiguous([len(ids)], ids.device)
    return _Run(0, model(ids, batch, BatchStore(), attention="dense"))


@torch.no_grad()
def _prefill(
    model: GLM, example: Example, topk: int, way: str, seed: int, progress: Callable[[float], None]
) -> _Run:  # fmt: skip
    """The haystack in chunks of which only keys are kept, then the bar and all behind it in one pass."""
    ids = torch.from_numpy(example.ids).to(model.lm_head.weight.device)
    bar = int((example.ids == ASK).nonzero()[0][-1])
    cache, generator = _Cache(model, len(ids)), torch.Generator().manual_seed(seed)
    request, last = cache.open(), model.config.num_hidden_layers - 1
    places = example.sources[example.sources >= 0]
    before = defaultdict[int, list[float]](list)
    borders = [*range(0, bar, PREFILL_CHUNK), bar, len(ids)]
    for begin, end in zip(borders, borders[1:], strict=False):
        batch, tape = cache.extend([request], [end - begin]), Tape()
        made, asked = _selection(way, batch.positions, topk, generator), begin == bar
        output = model(
            ids[begin:end], batch, cache, topk=topk, selections=None if made is None else [made] * (last + 1),
            tape=tape if asked else None, tail=None if asked else [0],
        )  # fmt: skip
        inside = torch.from_numpy(places[(places >= begin) & (places < end)])
        for layer in model.config.full_layers:
            selection_TK = output.selections[layer]
            if layer != last and selection_TK is not None:
                rows_QK = selection_TK.cpu()[inside - begin]
                before[layer] += (rows_QK == inside[:, None] - 1).any(1).float().tolist()
        progress(end / len(ids))
    return _Run(bar, output, tape, {layer: torch.cat(parts) for layer, parts in cache.plain.items()}, before)


def _selection(way: str, positions_T: Tensor, k: int, generator: torch.Generator) -> Tensor | None:
    """The Selection [T, k] that a control puts in place of the indexers'; None if they choose."""
    at = positions_T[:, None]
    places = torch.arange(k, device=at.device)
    if way == "window":
        found = (at - k + 1).clamp(min=0) + places
    elif way == "random":
        drawn = torch.rand(len(at), k, generator=generator, dtype=torch.float64).to(at.device)
        found = torch.where(at < k, places, (drawn * (at + 1)).long().sort(-1).values)
        again = torch.cat([torch.zeros_like(at, dtype=torch.bool), found[:, 1:] == found[:, :-1]], 1)
        found = found.masked_fill(again, 1 << 40).sort(-1).values
    else:
        return None
    return torch.where(found > at, -1, found).int()


# ------------------------------------------------------------------------------- what it found
@torch.no_grad()
def _judge(row: Row, model: GLM, example: Example, run: _Run) -> None:
    """Counts the answers."""
    rows = torch.from_numpy((example.sources >= 0).nonzero()[0] - run.begin)
    said = dict(
        zip((rows + run.begin).tolist(), model.logits(run.output.hidden[rows]).argmax(-1).tolist(), strict=True)
    )
    haystack = int((example.ids == ASK).nonzero()[0][-1])
    for answer in answers(example):
        right = all(said[i] == example.targets[i] for i in answer)
        depth = min(int(example.sources[answer[0]] * TENTHS // haystack), TENTHS - 1)
        row.right, row.asked = row.right + right, row.asked + 1
        row.depths[depth][0] += right
        row.depths[depth][1] += 1


@torch.no_grad()
def _look(model: GLM, example: Example, run: _Run) -> dict[int, dict[str, float]]:
    """By layer means over the rows that answer, see :class:`Row`."""
    asked = (example.sources >= 0).nonzero()[0]
    rows, places = torch.from_numpy(asked - run.begin), torch.from_numpy(example.sources[asked])
    found: dict[int, dict[str, float]] = {}
    for layer, selection_TK in enumerate(run.output.selections):
        assert selection_TK is not None
        selection_QK = selection_TK.cpu()[rows]
        held_QK = selection_QK == places[:, None]
        mass_QH = _attention(model, run, layer, rows, selection_QK).mul(held_QK[:, None]).sum(-1)
        found[layer] = {"mass": float(mass_QH.mean(0).max())}
        if layer in run.tape.indexer:
            found[layer]["needle"] = float(held_QK.any(1).float().mean())
            if run.before.get(layer):
                found[layer]["neighbour"] = fmean(run.before[layer])
            found[layer] |= _margin(run, layer, rows, places, selection_QK.shape[1])
    return found


def _attention(model: GLM, run: _Run, layer: int, rows: Tensor, selection_QK: Tensor) -> Tensor:
    """Attention of some rows to what they selected, [Q, H, K]."""
    batch = run.output.step.batch
    queries_QHA, keys_NA = run.tape.attention[layer][0][rows].float(), run.tape.attention[layer][1]
    chosen = selection_QK.long().clamp(min=0).to(keys_NA.device)
    slots_QK = storage_rows(chosen, batch.requests[rows][:, None], batch.table, batch.page_size)
    logits_QHK = queries_QHA @ keys_NA[slots_QK].float().mT * model.config.qk_head_dim**-0.5
    return logits_QHK.cpu().masked_fill((selection_QK < 0)[:, None], -torch.inf).softmax(-1)


def _margin(run: _Run, layer: int, rows: Tensor, places: Tensor, k: int) -> dict[str, float]:
    """How far the needle's score and the k-th best other's stand out, in standard deviations."""
    q_TJI, weights_TJ, _ = run.tape.indexer[layer]
    keys_SI = run.keys[layer].float()
    sigmas, cutoffs = [], []
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        seen = run.begin + row + 1
        scores_S = weights_TJ[row] @ (q_TJI[row].float() @ keys_SI[:seen].T).relu()
        others_S = torch.cat([scores_S[:place], scores_S[place + 1 :]])
        deviation, mean = torch.std_mean(others_S)
        sigmas.append(float((scores_S[place] - mean) / deviation))
        cutoffs.append(float((others_S.topk(min(k, len(others_S))).values[-1] - mean) / deviation))
    return {"sigma": fmean(sigmas), "cutoff": fmean(cutoffs)}


def cells(row: Row) -> dict[str, str]:
    """A row as text, by column."""

    def of(name: str) -> str:
        return " ".join(f"{values[name]:.2f}" for _, values in sorted(row.layers.items()) if name in values)

    return {
        "task": row.task, "way": row.way, "tokens": f"{row.length:,}", "right": f"{row.right} of {row.asked}",
        "share": f"{row.right / row.asked:.1%}", "95 %": f"{row.low:.1%} to {row.high:.1%}",
        "needle in top-k": of("needle"), "neighbour": of("neighbour"), "sigma": of("sigma"), "cut-off": of("cutoff"),
        "mass": of("mass"), "s": f"{row.seconds:.0f}",
    }  # fmt: skip
