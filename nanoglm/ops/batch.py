"""Batch: where the rows of a ragged batch stand, and where their keys lie.

Every op sees tokens packed as ``[T]``, one request after another, no padding. Keys lie in
storage rows; a page table translates a request's logical positions into them. Training and
whole-sequence scoring use the same rule with pages of one row, so no op has two code paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from nanoglm.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Geometry of one forward pass over T tokens of B requests.

    Attributes:
        borders: B + 1 row numbers; request b owns rows ``borders[b]:borders[b + 1]``.
        lengths: B counts; tokens of request b that exist after this pass (cached + new). Its new
            rows are the last ones, so row r stands at ``lengths[b] - (borders[b + 1] - r)``.
        positions: int64 [T], logical position of each row within its request.
        requests: int64 [T], the request each row belongs to.
        table: int32 [B, P], page table; page ``table[b, p // page_size]`` holds position p.
        page_size: logical tokens per page.
        rope_positions: int64 [T], what each row's rotation stands for if that is not its position (skipped
            positions in training); visibility, keys and Selections know ``positions`` only.
    """

    borders: tuple[int, ...]
    lengths: tuple[int, ...]
    positions: Tensor
    requests: Tensor
    table: Tensor
    page_size: int
    rope_positions: Tensor | None = None

    @classmethod
    def build(cls, counts: Sequence[int], lengths: Sequence[int], table: Tensor, page_size: int) -> Batch:
        """``counts`` new rows per request, ``lengths`` tokens per request afterwards."""
        borders = [0]
        for count in counts:
            borders.append(borders[-1] + count)
        device = table.device
        spans = [torch.arange(n - c, n, device=device) for c, n in zip(counts, lengths, strict=True)]
        requests = torch.arange(len(counts), device=device)
        repeats = torch.tensor(list(counts), device=device)
        return cls(
            borders=tuple(borders),
            lengths=tuple(lengths),
            positions=torch.cat(spans),
            requests=requests.repeat_interleave(repeats),
            table=table,
            page_size=page_size,
        )

    @classmethod
    def contiguous(cls, counts: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Whole sequences whose keys are the batch's own rows: pages of one token."""
        if not counts or min(counts) <= 0:
            raise InputError(f"sequence lengths are {list(counts)}; expected at least one token in each")
        first = torch.tensor([sum(counts[:b]) for b in range(len(counts))], device=device)
        offsets = torch.arange(max(counts), device=device)
        # Past a sequence's end the table repeats its last row: readable, never visible.
        last = torch.tensor(list(counts), device=device) - 1
        table = first[:, None] + torch.minimum(offsets[None], last[:, None])
        return cls.build(counts, counts, table.int(), 1)

    def tail(self, counts: Sequence[int]) -> tuple[Batch, Tensor]:
        """The same requests with only the last ``counts`` of their rows, and which rows those are, int64.

        Raises:
            InputError: a request has fewer rows.
        """
        for b, n in enumerate(counts):
            if not 0 <= n <= (held := self.borders[b + 1] - self.borders[b]):
                raise InputError(f"tail of request {b} is {n} rows; expected 0 to {held}, what the batch holds")
        ends = zip(self.borders[1:], counts, strict=True)
        rows = torch.cat([torch.arange(end - n, end, device=self.positions.device) for end, n in ends])
        borders = (0, *accumulate(counts))
        rope = None if self.rope_positions is None else self.rope_positions[rows]
        positions, requests = self.positions[rows], self.requests[rows]
        return replace(self, borders=borders, positions=positions, requests=requests, rope_positions=rope), rows

    @property
    def turns(self) -> Tensor:
        """int64 [T]: where each row stands for RoPE."""
        return self.positions if self.rope_positions is None else self.rope_positions

    def ordered(self, rows: Tensor) -> Tensor:
        """Storage rows [N, ...] as those of all tokens of each request in turn, [sum of lengths, ...], if pages are
        single rows (the batch's own alone stand in that order already); a cache's stay as they lie."""
        return rows if self.page_size != 1 or len(rows) == len(self.positions) else rows[self._keys]

    @cached_property  # every layer asks
    def _keys(self) -> Tensor:
        return torch.cat([self.table[b, :length] for b, length in enumerate(self.lengths)]).long()

    @cached_property  # every layer asks
    def slots(self) -> Tensor:
        """int64 [T]: the storage row of each of this batch's own tokens."""
        return storage_rows(self.positions, self.requests, self.table, self.page_size)

    def located(
        self, selection: Tensor, locate: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``locate(selection, requests, table, page_size)``, remembered until another Selection comes: layers that
        share one get the same object. It must not be written to meanwhile, and lives as long as the batch."""
        last = self._last
        if not last or last[0][0] is not selection:
            last.clear()  # before there are two
            last.append((selection, locate(selection, self.requests, self.table, self.page_size)))
        return last[0][1]

    @cached_property  # a list, for the class is frozen
    def _last(self) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        return []


def storage_rows(positions: Tensor, requests: Tensor, table: Tensor, page_size: int) -> Tensor:
    """Logical positions to storage rows; ``positions`` broadcasts against ``requests``. int64."""
    pages = table[requests, positions // page_size].long()
    return pages * page_size + positions % page_size
