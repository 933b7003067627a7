"""Nats and bits per byte of a text: dense attention, all-Full sparse and IndexShare side by side.

The text is cut into windows of ``context`` tokens, each scored on its own, every token but the
first of a window predicted once. Bytes are those of the predicted tokens, so tokenizers of different
vocabularies compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.api import Model
from nanoglm.errors import InputError
from nanoglm.model import Attention
from nanoglm.ops import count_work
from nanoglm.weights import SHARED_INDEXERS, Checkpoint


@dataclass(frozen=True)
class Row:
    """One way of attending, scored on the text."""

    name: str
    nats_per_token: float
    nats_per_byte: float
    pairs_scored: int  # by the indexers; 0 for dense attention
    rows_attended: int  # by sparse attention; 0 for dense, which reads every earlier row

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
    progress: Callable[[float], None] = lambda share: None,
) -> list[Row]:
    """Scores ``text`` (its first ``tokens`` tokens) in each way the model can attend.

    Args:
        full: the model with an indexer on every layer, for the all-Full row; see :func:`all_full`.
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
    ways: list[tuple[str, Model, Attention]] = [("dense", model, "dense")]
    if len(model.config.full_layers) == model.config.num_hidden_layers:
        full = model
    if full is not None:
        ways.append(("all-Full sparse", full, "sparse"))
    if full is not model:
        ways.append(("IndexShare", model, "sparse"))
    rows = []
    for number, (name, scored, attention) in enumerate(ways):
        nats, count = 0.0, 0
        with count_work() as work:
            for i in range(0, len(windows), batch):
                part = windows[i : i + batch]
                for window, logits in zip(part, scored.logits(part, attention=attention), strict=True):
                    nats += float(_nats(logits, window))
                    count += len(window) - 1
                progress((number + (i + len(part)) / len(windows)) / len(ways))
        rows.append(Row(name, nats / count, nats / size, work.pairs_scored, work.rows_attended))
    return rows


def _nats(logits: Tensor, window: list[int]) -> Tensor:
    targets = logits.new_tensor(window[1:]).long()
    return F.cross_entropy(logits[:-1].float(), targets, reduction="sum").double()
