"""Beyond DSA: a plain multi-head transformer, whose layers choose by an oracle, as a stack to search and compare.

Nothing in it was trained to be sparse. What a layer attends to most, the mean of its heads, is the Selection that an
ideal indexer would give; so overlap and search say how far index sharing would carry a model that has no indexer
(OmniKV, Kascade: indexcache spec 7.1). Any other ``select(layer, q, k)`` can take the oracle's place.

Shape legend: L tokens of a sequence, T of the batch, D width, H heads, A head dim, K selected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoglm.indexcache.stack import Layer
from nanoglm.model import BatchStore
from nanoglm.model.layers import MLP, Linear, RMSNorm, Rotary
from nanoglm.model.step import Pass
from nanoglm.ops import Batch

# layer, q [L, H, A], k [L, H, A] after RoPE -> int32 [L, K]: positions ascending, -1 after the valid ones
Select = Callable[[int, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, index: int, width: int, heads: int) -> None:
        super().__init__()
        self.index, self.heads = index, heads
        self.select: Select | None = None  # dense without one
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.qkv_proj, self.o_proj = Linear(width, 3 * width), Linear(width, width)
        self.mlp = MLP(width, 8 * width // 3)

    def forward(self, x_TD: Tensor, step: Pass, selection: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As :class:`nanoglm.model.block.DecoderLayer`."""
        parts = self.qkv_proj(self.input_layernorm(x_TD)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q_THA, k_THA, v_THA = step.rotary(parts[0]), step.rotary(parts[1]), parts[2]
        borders, attended, chosen = step.batch.borders, list[Tensor](), list[Tensor]()
        for begin, end in zip(borders, borders[1:], strict=False):
            q, k, v = (x[begin:end] for x in (q_THA, k_THA, v_THA))
            mask = None
            if step.replay or self.select is not None:
                if step.replay:
                    assert selection is not None
                    own = selection[begin:end]
                else:
                    assert self.select is not None
                    own = self.select(self.index, q, k)
                chosen.append(own)
                mask = held(own, end - begin)
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            o_HLA = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[0]
            attended.append(o_HLA.transpose(0, 1).flatten(1))
        x_TD = x_TD + self.o_proj(torch.cat(attended))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD)), torch.cat(chosen) if chosen else None


class Transformer(nn.Module):
    """A decoder of such blocks; embedding and head are one matrix.

    Attributes:
        pattern, width: as of every :class:`nanoglm.indexcache.stack.Stack`.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, theta: float = 1e4) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(i, width, heads) for i in range(layers)])
        self.norm = RMSNorm(width, 1e-6)
        self.head_dim, self.theta = width // heads, theta
        self.pattern, self.width = "F" * layers, 4 * width

    @torch.no_grad()
    def initialise(self, seed: int = 0, deviation: float = 0.06, shared: float = 0.0) -> Transformer:
        """As :meth:`nanoglm.model.GLM.initialise`."""
        generator = torch.Generator().manual_seed(seed)
        for name, value in self.named_parameters():
            smaller = (2 * len(self.layers)) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            if value.ndim > 1:
                nn.init.normal_(value, 0.0, deviation * smaller, generator=generator)
            else:
                value.fill_(1.0)
        self.embed_tokens.weight += shared
        return self

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return cast(list[Block], list(self.layers))

    def selecting(self, select: Select | None, topk: int = 0) -> Transformer:
        """The same model, whose layers choose ``topk`` so; without ``select`` they attend to all. Returns self."""
        for block in self.blocks:
            block.select = select
        self.width = 4 * self.embed_tokens.embedding_dim + 4 * topk
        return self

    def forward(self, ids_T: Tensor, batch: Batch) -> Tensor:
        """Logits [T, V]."""
        x_TD, step = self.begin(ids_T, batch)
        for i in range(len(self.layers)):
            x_TD, _ = self.layer(i)(x_TD, step, None)
        return self.logits(x_TD)

    # ------------------------------------------------------------------------ as a Stack
    def begin(self, ids_T: Tensor, batch: Batch) -> tuple[Tensor, Pass]:
        step = Pass(batch, Rotary.at(batch.turns, self.head_dim, self.theta), BatchStore())
        return self.embed_tokens(ids_T), step

    def layer(self, index: int) -> Layer:
        return self.blocks[index]

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(self.norm(x_TD), self.embed_tokens.weight)


def oracle(k: int) -> Select:
    """The ``k`` positions to which all heads together give most attention."""

    def select(layer: int, q_LHA: Tensor, k_LHA: Tensor) -> Tensor:
        length = len(q_LHA)
        scores_HLL = q_LHA.transpose(0, 1) @ k_LHA.permute(1, 2, 0) * q_LHA.shape[-1] ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=q_LHA.device).triu(1)
        mean_LL = scores_HLL.masked_fill(future, -torch.inf).softmax(-1).mean(0).masked_fill(future, -1.0)
        best = mean_LL.topk(min(k, length), -1).indices
        best = torch.where(future.gather(1, best), length, best).sort(-1).values
        best = torch.cat([best, best.new_full((length, k - best.shape[1]), length)], 1)
        return torch.where(best < length, best, -1).int()

    return select


def held(selection_LK: Tensor, length: int) -> Tensor:
    """A Selection as a mask [L, L]."""
    places = torch.where(selection_LK < 0, length, selection_LK).long()
    mask = torch.zeros(len(selection_LK), length + 1, dtype=torch.bool, device=selection_LK.device)
    return mask.scatter(1, places, True)[:, :length]
