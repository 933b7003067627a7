"""The lightning indexer: which k earlier tokens each token attends to.

Few small heads score every visible token; the k best become the Selection, which this layer and
the Shared layers after it attend under. Traps (architecture spec 8): RoPE turns the *first* dims
here (the last in the main attention) and is interleaved; the key norm is a LayerNorm with bias and
eps 1e-6; head weights may be negative and are taken in fp32; a token may select itself.

Shape legend: T tokens, D hidden, Q query latent, J indexer heads, I index dim, K selected.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from nanoglm.config import GLMConfig
from nanoglm.model.keys import IndexKeys
from nanoglm.model.layers import LayerNorm, Linear, Rotary


class IndexerInputs(NamedTuple):
    """What scoring needs: I[t, s] = sum_j weights[t, j] * relu(q[t, j] · keys[s])."""

    q_TJI: Tensor
    weights_TJ: Tensor  # fp32, with J^-0.5 and I^-0.5 folded in (both positive, so after the ReLU)
    keys_TI: Tensor  # of all tokens of the sequences: more than rows where these hold only the last ones


class Indexer(nn.Module):
    """Projections of the indexer (architecture spec 2.6, steps 1 to 4)."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.wk = Linear(config.hidden_size, self.dim)
        self.k_norm = LayerNorm(self.dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)

    def keys(self, x_TD: Tensor, rotary: Rotary) -> IndexKeys:
        """Index keys [T, I] of the layer's normed hidden state, which enters detached."""
        return IndexKeys(self.wk(x_TD.detach()), self.k_norm, rotary)

    def queries(self, x_TD: Tensor, cq_TQ: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Queries [T, J, I] and weights fp32 [T, J]. x: the layer's normed hidden state; cq: the normed query
        latent. Both enter detached: the indexer learns from its own loss and never moves the backbone."""
        x_TD, cq_TQ = x_TD.detach(), cq_TQ.detach()
        q_TJI = self.wq_b(cq_TQ).unflatten(-1, (self.heads, self.dim))
        weights_TJ = self.weights_proj.forward_fp32(x_TD) * (self.heads * self.dim) ** -0.5
        return rotary.first(q_TJI), weights_TJ
