"""Multi-head latent attention under a Selection.

Every token is cached as one latent c (after its norm) and one rotated key k_rope that all heads
share. Two forms compute the same thing: *absorbed* carries the query into latent space and attends
to the selected latents themselves (inference, long context); *expanded* turns latents into per-head
keys and values first (training at short length, dense attention).

Shape legend: T tokens, N storage rows, D hidden, Q query latent, H heads, C latent, R rope,
A = nope + rope, V value dim, K selected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoglm import ops
from nanoglm.config import GLMConfig
from nanoglm.model.indexer import Indexer, IndexerInputs
from nanoglm.model.keys import Latents
from nanoglm.model.layers import Linear, RMSNorm
from nanoglm.model.step import Pass


class MLA(nn.Module):
    """Latent attention of one layer, with its indexer if the layer is Full (spec 2.4 to 2.7)."""

    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.topk = layer, config.index_topk
        self.heads, self.nope, self.rope = (
            config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        )  # fmt: skip
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        self.scale = config.qk_head_dim**-0.5  # also in the absorbed form, not 576^-0.5
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, config.latent_norm_eps)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, config.hidden_size)
        self.indexer = Indexer(config) if config.has_indexer(layer) else None

    def forward(self, x_TD: Tensor, step: Pass, selection: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns [T, D] and the Selection it attended under: its own if Full, else the one received."""
        cq_TQ = self.q_a_layernorm(self.q_a_proj(x_TD))
        q_nope_THA, q_rope_THR = self.q_b_proj(cq_TQ).unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], -1)
        q_rope_THR = step.rotary(q_rope_THR)
        if not step.reuse_keys:
            self.write_keys(x_TD, step)
        if self.indexer is not None:
            selection = self._select(x_TD, cq_TQ, step, selection)
        if step.attention != "dense" and selection is None:
            raise RuntimeError(f"layer {self.layer} is Shared and got no Selection from an earlier Full layer")
        attend = self._absorbed if step.attention == "sparse" else self._expanded
        o_THV = attend(q_nope_THA, q_rope_THR, step, selection)
        return self.o_proj(o_THV.flatten(1)), selection

    def write_keys(self, x_TD: Tensor, step: Pass) -> None:
        """Keeps the latents and, on a Full layer, the index keys of these tokens."""
        latents = Latents(self.kv_a_proj_with_mqa(x_TD), self.kv_a_layernorm, step.rotary)
        step.store.write_latent(self.layer, latents, step.batch)
        if self.indexer is not None and (step.attention != "dense" or step.recording is not None):
            step.store.write_index_keys(self.layer, self.indexer.keys(x_TD, step.rotary), step.batch)

    def _select(self, x_TD: Tensor, cq_TQ: Tensor, step: Pass, given: Tensor | None) -> Tensor | None:
        """The Full layer's own Selection, or ``given`` when the pass replays recorded ones."""
        assert self.indexer is not None
        chooses = not step.replay and step.attention != "dense"
        if not chooses and step.recording is None:
            return given
        q_TJI, weights_TJ = self.indexer.queries(x_TD, cq_TQ, step.rotary)
        if step.recording is not None:
            keys_SI = step.batch.ordered(step.store.index_keys(self.layer))
            step.recording.indexer[self.layer] = IndexerInputs(q_TJI, weights_TJ, keys_SI)
        if not chooses:
            return given
        selection = ops.select(q_TJI, weights_TJ, step.store.index_keys(self.layer), step.batch, step.topk or self.topk)
        if step.recording is not None:
            step.recording.selections[self.layer] = selection
        return selection

    def _up(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj as W_UK [H, nope, C] and W_UV [H, V, C]."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, self.nope + self.value))
        return weight[:, : self.nope], weight[:, self.nope :]

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, step: Pass, selection: Tensor | None) -> Tensor:
        assert selection is not None
        w_uk, w_uv = self._up()
        latent_NC, rope_NR = step.store.latent(self.layer)
        q_latent_THC = ops.headwise(q_nope, w_uk)
        if step.recording is not None:  # all heads share the keys of absorbed queries
            queries, keys = torch.cat([q_latent_THC, q_rope], -1), torch.cat([latent_NC, rope_NR], -1)
            step.recording.attention[self.layer] = queries.detach(), step.batch.ordered(keys).detach()
        o_THC = ops.sparse_attention(
            q_latent_THC.contiguous(), q_rope, latent_NC, rope_NR, selection, step.batch, self.scale
        )
        return ops.headwise(o_THC, w_uv.mT)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, step: Pass, selection: Tensor | None) -> Tensor:
        latent_NC, rope_NR = map(step.batch.ordered, step.store.latent(self.layer))
        kv_NHA = self.kv_b_proj(latent_NC).unflatten(-1, (self.heads, -1))
        k_nope_NHA, v_NHV = kv_NHA.split([self.nope, self.value], -1)
        q_THA = torch.cat([q_nope, q_rope], -1)
        k_NHA = torch.cat([k_nope_NHA, rope_NR[:, None].expand(-1, self.heads, -1)], -1)
        if step.recording is not None:
            step.recording.attention[self.layer] = q_THA.detach(), k_NHA.detach()
        batch = step.batch
        return ops.dense_attention(q_THA, k_NHA, v_NHV, batch.borders, self.scale, selection, batch.lengths)
