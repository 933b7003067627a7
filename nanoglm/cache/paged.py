"""The paged latent cache: what a request remembers.

A page names 64 logical tokens in every layer: one page id, one table per request. Storage is one
tensor per layer for latent and rope, ``[pages, 64, C + R]``, since whoever selects a token reads both,
and on Full layers and the MTP layer one for index keys, ``[pages, ...]`` in a layout that only ops know.
Selections hold logical positions; only ops translate them to pages.

A request's length decides what is visible. Rolling back n tokens shortens it and lets go of whole pages;
what the abandoned tokens left behind is never read and is overwritten when the positions return.

Several requests, and the prefix tree, may hold a page; it is free when nobody does. Held by several it is full, and
nobody writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.memory import keep_freed
from nanoglm.model.keys import IndexKeys, Latents
from nanoglm.ops import Batch, index_pool

PAGE = 64


class PagedCache:
    """Pools, page tables and lengths of all open requests; the model's ``Store`` for paged passes.

    Args:
        config: gives layers and widths. pages: how many pages of 64 tokens to hold.
        dtype, device: of the pools. index_dtype: of index keys, if another: int8 on a CPU and FP8 on
            a GPU are smaller and faster and select a little less exactly.
    """

    def __init__(
        self, config: GLMConfig, pages: int, *, dtype: torch.dtype = torch.float32,
        index_dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if torch.device(device).type == "cpu":
            keep_freed()
        self._widths = config.kv_lora_rank, config.qk_rope_head_dim
        layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
        self._keys = [torch.zeros(pages, PAGE, sum(self._widths), dtype=dtype, device=device) for _ in layers]
        self._index_keys = {
            i: index_pool(pages, PAGE, config.index_head_dim, index_dtype or dtype, device)
            for i in layers
            if config.has_indexer(i)
        }
        self._device = device
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._opened = 0

    # ---------------------------------------------------------------- requests
    def open(self, pages: Sequence[int] = ()) -> int:
        """A new request; returns its handle. It begins with the tokens of full ``pages`` that somebody holds."""
        self._opened += 1
        for page in pages:
            self.hold(page)
        self._tables[self._opened], self._lengths[self._opened] = list(pages), PAGE * len(pages)
        return self._opened

    def close(self, request: int) -> None:
        """Forgets a request and lets go of its pages."""
        for page in reversed(self._tables.pop(request)):
            self.release(page)
        del self._lengths[request]

    def hold(self, page: int) -> None:
        """One holder more of a page that has some."""
        assert self._holders[page] > 0, f"page {page} is free"
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less; without any the page is free."""
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold it."""
        return self._holders[page]

    def table(self, request: int) -> list[int]:
        """The request's pages, in order."""
        return list(self._tables[request])

    def length(self, request: int) -> int:
        """Tokens the request holds."""
        return self._lengths[request]

    def extend(self, requests: Sequence[int], counts: Sequence[int]) -> Batch:
        """Makes room for ``counts`` new tokens and returns the batch that fills it.

        Raises:
            InputError: not enough free pages; nothing has changed then.
        """
        wanted = [-(-(self._lengths[r] + n) // PAGE) for r, n in zip(requests, counts, strict=True)]
        missing = sum(max(0, w - len(self._tables[r])) for r, w in zip(requests, wanted, strict=True))
        if missing > len(self._free):
            raise InputError(f"cache has {len(self._free)} free pages of {PAGE} tokens; expected {missing}")
        for request, count, pages in zip(requests, counts, wanted, strict=True):
            table = self._tables[request]
            if count and self._lengths[request] % PAGE:
                assert self._holders[table[-1]] == 1, f"page {table[-1]} is shared; expected a page of its own to write"
            while len(table) < pages:
                table.append(self._free.pop())
                self._holders[table[-1]] = 1
            self._lengths[request] += count
        return self.last(requests, counts)

    def last(self, requests: Sequence[int], counts: Sequence[int]) -> Batch:
        """The batch of the last ``counts`` tokens of each, which have their room already."""
        lengths, tables = [self._lengths[r] for r in requests], [self._tables[r] for r in requests]
        width = max(len(table) for table in tables)
        padded = [table + [0] * (width - len(table)) for table in tables]
        return Batch.build(counts, lengths, torch.tensor(padded, dtype=torch.int32, device=self._device), PAGE)

    def rollback(self, request: int, tokens: int) -> None:
        """Takes back the last ``tokens`` tokens; the request is as if they had never come.

        Raises:
            InputError: the request holds fewer.
        """
        held = self._lengths[request]
        if not 0 <= tokens <= held:
            raise InputError(f"rollback of {tokens} tokens; expected 0 to {held}, what the request holds")
        self._lengths[request] = held - tokens
        table = self._tables[request]
        while len(table) > -(-self._lengths[request] // PAGE):
            self.release(table.pop())

    def needs(self, request: int, tokens: int) -> int:
        """How many free pages ``tokens`` more take."""
        return max(0, -(-(self._lengths[request] + tokens) // PAGE) - len(self._tables[request]))

    @property
    def pages(self) -> int:
        """How many there are."""
        return len(self._holders)

    @property
    def free_pages(self) -> int:
        """Pages no request holds."""
        return len(self._free)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in all layers, the MTP layer's included."""
        pools = [*self._keys, *self._index_keys.values()]
        return sum(pool.nbytes // (pool.shape[0] * PAGE) for pool in pools)

    # ---------------------------------------------------------------- the model's Store
    def write_latent(self, layer: int, latents: Latents, batch: Batch) -> None:
        latents.write(self._keys[layer], batch.slots)

    def latent(self, layer: int) -> tuple[Tensor, Tensor]:
        latent_NC, rope_NR = self._keys[layer].flatten(0, 1).split(self._widths, 1)
        return latent_NC, rope_NR

    def write_index_keys(self, layer: int, keys: IndexKeys, batch: Batch) -> None:
        keys.write(self._index_keys[layer], batch.slots)

    def index_keys(self, layer: int) -> Tensor:
        return self._index_keys[layer]
