"""Nats and bits per byte of a text: dense attention, all-Full sparse and IndexShare side by side.

The text is cut into windows of ``context`` tokens, each scored on its own, every token but the
first of a window predicted once. Bytes are those of the predicted tokens, so tokenizers of different
vocabularies compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.api import Model
from nanoglm.cache import PAGE, PagedCache
from nanoglm.errors import InputError
from nanoglm.model import Attention, BatchStore
from nanoglm.ops import Batch, count_work
from nanoglm.weights import SHARED_INDEXERS, Checkpoint


@dataclass(frozen=True)
class Row:
    """One way of attending, scored on the text."""

    name: str
    nats_per_token: float
    nats_per_byte: float
    pairs_scored: int  # by the indexers; 0 for dense attention
    rows_attended: int  # by sparse attention; 0 for dense, which reads every earlier row
    overlap: float | None = None  # of its Selections with those of exact index keys, over rows that see more than k

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_byte / math.log(2)


def all_full(directory: Path, *, dtype: torch.dtype = torch.float32) -> Model | None:
    """The checkpoint with an indexer on every layer, if it brings indexers for its Shared layers."""
    if not (directory / SHARED_INDEXERS).is_file():
        return None
    module, report = Checkpoint(directory, all_full=True).load(dtype=dtype)
    return Model(module, None, report)


def evaluate(
    model: Model,
    text: str,
    *,
    context: int = 512,
    batch: int = 8,
    tokens: int | None = None,
    full: Model | None = None,
    index_dtype: torch.dtype | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Row]:
    """Scores ``text`` (its first ``tokens`` tokens) in each way the model can attend.

    Args:
        full: the model with an indexer on every layer, for the all-Full row; see :func:`all_full`.
        index_dtype: of index keys, for one more row: IndexShare from a cache that keeps them so.
        progress: called with the share done, 0 to 1.

    Raises:
        InputError: the text is shorter than two tokens, or context is out of range.
    """
    if not 2 <= context <= model.config.max_position_embeddings:
        raise InputError(f"context is {context}; expected 2 to {model.config.max_position_embeddings}")
    if tokens is not None and tokens < 2:
        raise InputError(f"tokens is {tokens}; expected at least 2")
    ids = model.tokenizer.encode(text)
    ids = ids[:tokens]
    windows = [ids[i : i + context] for i in range(0, len(ids), context)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise InputError(f"text holds {len(ids)} tokens; expected at least 2")
    size = sum(len(model.tokenizer.token_bytes(i, skip_special=False)) for window in windows for i in window[1:])
    ways: list[tuple[str, Scorer]] = [("dense", partial(_packed, model, "dense"))]
    if len(model.config.full_layers) == model.config.num_hidden_layers:
        full = model
    if full is not None:
        ways.append(("all-Full sparse", partial(_packed, full, "sparse")))
    if full is not model:
        ways.append(("IndexShare", partial(_packed, model, "sparse")))
    agreement = [0, 0]
    if index_dtype is not None:
        name = f"index keys {str(index_dtype).removeprefix('torch.')}"
        ways.append((name, partial(_cached, model, index_dtype, agreement)))
    rows = []
    for number, (name, scorer) in enumerate(ways):
        nats, count = 0.0, 0
        with count_work() as work:
            for i in range(0, len(windows), batch):
                part = windows[i : i + batch]
                for window, logits in zip(part, scorer(part), strict=True):
                    nats += float(_nats(logits, window))
                    count += len(window) - 1
                progress((number + (i + len(part)) / len(windows)) / len(ways))
        rows.append(Row(name, nats / count, nats / size, work.pairs_scored, work.rows_attended))
    if agreement[1]:
        rows[-1] = replace(rows[-1], overlap=agreement[0] / agreement[1])
    return rows


Scorer = Callable[[list[list[int]]], list[Tensor]]  # logits of each sequence


def _packed(model: Model, attention: Attention, part: list[list[int]]) -> list[Tensor]:
    return model.logits(part, attention=attention)


@torch.no_grad()
def _cached(model: Model, index_dtype: torch.dtype, agreement: list[int], part: list[list[int]]) -> list[Tensor]:
    """The same through a paged cache; ``agreement`` grows by selected positions that both chose, and by all."""
    config, weight, counts = model.config, model.module.lm_head.weight, [len(ids) for ids in part]
    pages = sum(-(-n // PAGE) for n in counts)
    cache = PagedCache(config, pages, dtype=weight.dtype, index_dtype=index_dtype, device=weight.device)
    batch = cache.extend([cache.open() for _ in part], counts)
    packed = torch.tensor([i for ids in part for i in ids], device=weight.device)
    output = model.module(packed, batch, cache)
    with count_work():  # of its own
        exact = model.module(packed, Batch.contiguous(counts, weight.device), BatchStore())
    rows = (batch.positions >= config.index_topk).nonzero().squeeze(-1)
    for layer in config.full_layers:
        ours, theirs = output.selections[layer], exact.selections[layer]
        assert ours is not None and theirs is not None
        exactly = torch.zeros(len(rows), max(counts), dtype=torch.bool, device=weight.device)
        exactly.scatter_(1, theirs[rows].long(), True)
        agreement[0] += int(exactly.gather(1, ours[rows].long()).sum())
        agreement[1] += ours[rows].numel()
    return list(model.module.logits(output.hidden).split(counts))


def _nats(logits: Tensor, window: list[int]) -> Tensor:
    targets = logits.new_tensor(window[1:]).long()
    return F.cross_entropy(logits[:-1].float(), targets, reduction="sum").double()
