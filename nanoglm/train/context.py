"""Context parallelism: a sequence lies on several ranks, each of which holds a stretch of it.

Rank r of n has tokens [r L / n, (r + 1) L / n) of every sequence of L tokens (in order, not zigzag: training spec 1.6).
What other tokens attend to, latents with rotated keys and index keys, is gathered over the group in every layer; its
gradient comes back as a sum. All else is done for a rank's own rows: attention, Selections, experts, losses.

The model knows nothing of it: a :class:`Part` is a sample whose batch says where its rows stand and where the keys of
their sequences lie, as in decoding, and whose store gathers what is written.

Shape legend: T rows of this rank, N rows of the group (n times the most that a rank has), B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanoglm.errors import InputError
from nanoglm.model import BatchStore
from nanoglm.model.keys import IndexKeys, Latents
from nanoglm.ops import Batch
from nanoglm.train.data import Sample

# torch 2.13 gave these two new names and warns of the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Context:
    """The ranks that share sequences.

    Attributes:
        rank, size: this one's place among them. sent: bytes that it gave to others.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.sent = 0

    def part(self, whole: Sample) -> Part:
        """This rank's rows of whole sequences.

        Raises:
            InputError: none is so long that every rank has some.
        """
        if max(whole.counts) < self.size:
            raise InputError(
                f"sequences have at most {max(whole.counts)} tokens; expected at least {self.size}, one for each rank"
            )
        starts = [0, *accumulate(whole.counts)]
        spans = [self.span(n) for n in whole.counts]
        pieces = [torch.arange(s + a, s + b) for s, (a, b) in zip(starts, spans, strict=False)]
        rows = torch.cat(pieces).to(whole.ids.device)
        counts = tuple(b - a for a, b in spans)
        return Part(whole.ids[rows], whole.targets[rows], counts, whole=whole, rows=rows, context=self)

    def span(self, length: int, rank: int | None = None) -> tuple[int, int]:
        """Where the stretch of a rank, this one if none is named, begins and ends."""
        rank = self.rank if rank is None else rank
        return rank * length // self.size, (rank + 1) * length // self.size

    def gather(self, x: Tensor, most: int) -> Tensor:
        """[T, ...] of every rank, each padded to ``most`` rows, one after another: [N, ...]. Its gradient is added over
        the ranks."""
        self.sent += x.nbytes * (self.size - 1)
        whole: Tensor = _Gather.apply(F.pad(x, (0, 0) * (x.ndim - 1) + (0, most - len(x))), self.group)
        return whole

    def total(self, x: Tensor) -> Tensor:
        """The sum over these ranks, without gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x


@dataclass(frozen=True, kw_only=True)
class Part(Sample):
    """A rank's rows of sequences.

    Attributes:
        counts: rows of each sequence that are here. whole: the sequences. rows: int64 [T], which rows of ``whole``.
    """

    whole: Sample
    rows: Tensor
    context: Context

    @cached_property
    def most(self) -> int:
        """Rows of the rank that has most."""
        context = self.context
        spans = [[context.span(n, rank) for n in self.whole.counts] for rank in range(context.size)]
        return max(sum(b - a for a, b in each) for each in spans)

    @cached_property
    def batch(self) -> Batch:
        """As in decoding: the sequences go up to this rank's last rows; the table leads to the rows gathered."""
        whole, context = self.whole.batch, self.context
        table = torch.zeros(whole.table.shape, dtype=whole.table.dtype)
        for rank in range(context.size):
            at = rank * self.most
            for b, (begin, end) in enumerate(context.span(n, rank) for n in self.whole.counts):
                table[b, begin:end] = torch.arange(at, at := at + end - begin, dtype=table.dtype)
        return replace(
            whole, borders=(0, *accumulate(self.counts)), lengths=tuple(context.span(n)[1] for n in self.whole.counts),
            positions=whole.positions[self.rows], requests=whole.requests[self.rows], table=table.to(self.ids.device),
            rope_positions=None if whole.rope_positions is None else whole.rope_positions[self.rows],
        )  # fmt: skip

    def split(self, tokens: int | None) -> list[Sample]:
        """The sequences in parts of at most so many tokens, of each this rank's rows."""
        return [self.context.part(part) for part in self.whole.split(tokens)]

    def later(self, values_T: Tensor, by: int) -> tuple[Tensor, Tensor]:
        order = self.batch.table[self.whole.batch.requests, self.whole.batch.positions].long()
        values, inside = self.whole.later(self.context.gather(values_T.detach(), self.most)[order], by)
        return values[self.rows], inside[self.rows]

    def total(self, x: Tensor) -> Tensor:
        return self.context.total(x)

    def store(self) -> BatchStore:
        return _GatheringStore(self)


class _GatheringStore(BatchStore):
    """Keeps the keys of whole sequences."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def write_latent(self, layer: int, latents: Latents, batch: Batch) -> None:
        latent_TC, rope_TR = latents.finished()
        both_NA = self.part.context.gather(torch.cat([latent_TC, rope_TR], -1), self.part.most)
        latent_NC, rope_NR = both_NA.split([latent_TC.shape[-1], rope_TR.shape[-1]], -1)
        self._latent[layer] = latent_NC, rope_NR

    def write_index_keys(self, layer: int, keys: IndexKeys, batch: Batch) -> None:
        self._index_keys[layer] = self.part.context.gather(keys.finished(), self.part.most)


class _Gather(torch.autograd.Function):
    """All-gather of rows; backward reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = x.new_empty(group.size() * len(x), *x.shape[1:])
        _all_gather(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        _reduce_scatter(mine, grad.contiguous(), group=ctx.group)
        return mine, None
