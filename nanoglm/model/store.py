"""Where a pass keeps its keys: in the batch itself, or in a paged cache.

The model writes a layer's new latents and index keys, and attends to the storage rows that come
back. ``BatchStore`` is the whole-sequence case (training, scoring); ``cache.PagedCache`` the other.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from nanoglm.model.keys import IndexKeys, Latents
from nanoglm.ops import Batch


class Store(Protocol):
    """Storage rows per layer; rows are addressed by the batch's page table."""

    def write_latent(self, layer: int, latents: Latents, batch: Batch) -> None:
        """Keeps this batch's latents and rope keys, after norm and RoPE."""

    def latent(self, layer: int) -> tuple[Tensor, Tensor]:
        """All storage rows of a layer: latent [N, C] and rope [N, R]."""
        ...

    def write_index_keys(self, layer: int, keys: IndexKeys, batch: Batch) -> None:
        """Keeps this batch's index keys, after norm and RoPE (Full layers only)."""

    def index_keys(self, layer: int) -> Tensor:
        """All storage rows of a Full layer's index keys, [N, I] or a pool of ``ops.index_pool``."""
        ...


class BatchStore:
    """Keys of whole sequences: the batch's own rows are the storage rows. Keeps gradients."""

    def __init__(self) -> None:
        self._latent: dict[int, tuple[Tensor, Tensor]] = {}
        self._index_keys: dict[int, Tensor] = {}

    def write_latent(self, layer: int, latents: Latents, batch: Batch) -> None:
        self._latent[layer] = latents.finished()

    def latent(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._latent[layer]

    def write_index_keys(self, layer: int, keys: IndexKeys, batch: Batch) -> None:
        self._index_keys[layer] = keys.finished()

    def index_keys(self, layer: int) -> Tensor:
        return self._index_keys[layer]
