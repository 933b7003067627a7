"""Keys on their way into a store: projected, and not yet what others attend to.

A latent takes a norm and its rope key a rotation, an index key both (architecture spec 2.4, 2.6). Whole sequences
keep them ``finished``, as tensors with gradients; a cache has them written, which is the same in one op: it reads the
norms' parameters and does not call the modules.

Shape legend: T tokens, C latent, R rope, A = C + R, I index dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nanoglm import ops
from nanoglm.model.layers import LayerNorm, RMSNorm, Rotary


@dataclass(frozen=True, eq=False)
class Latents:
    """Projected latents and rope keys side by side, [T, C + R]."""

    kv_TA: Tensor
    norm: RMSNorm
    rotary: Rotary

    def finished(self) -> tuple[Tensor, Tensor]:
        """Normed latents [T, C] and rotated rope keys [T, R]."""
        latent = len(self.norm.weight)
        c_TC, k_rope_TR = self.kv_TA.split([latent, self.kv_TA.shape[1] - latent], -1)
        return self.norm(c_TC), self.rotary(k_rope_TR)

    def write(self, pool: Tensor, slots_T: Tensor) -> None:
        """The same into a pool [pages, page_size, C + R] at these storage rows; no gradient."""
        norm, rotary = self.norm, self.rotary
        ops.write_latent(pool, self.kv_TA, norm.weight, norm.eps, rotary.cos, rotary.sin, slots_T)


@dataclass(frozen=True, eq=False)
class IndexKeys:
    """Projected index keys [T, I]."""

    keys_TI: Tensor
    norm: LayerNorm
    rotary: Rotary

    def finished(self) -> Tensor:
        """Normed, then rotated, [T, I]."""
        return self.rotary.first(self.norm(self.keys_TI))

    def write(self, pool: Tensor, slots_T: Tensor) -> None:
        """The same into a pool of ``ops.index_pool`` at these storage rows; no gradient."""
        norm, rotary = self.norm, self.rotary
        ops.write_index_keys(pool, self.keys_TI, norm.weight, norm.bias, norm.eps, rotary.cos, rotary.sin, slots_T)
