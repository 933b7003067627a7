"""One decoder layer: attention under a Selection, then the feed-forward part."""

from __future__ import annotations

from torch import Tensor, nn

from nanoglm.config import GLMConfig
from nanoglm.model.layers import MLP, RMSNorm
from nanoglm.model.mla import MLA
from nanoglm.model.moe import MoE
from nanoglm.model.step import Pass


class DecoderLayer(nn.Module):
    """Pre-norm residual layer (architecture spec 2.1): x + Attn(norm(x)), then x + FFN(norm(x))."""

    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size)

    def write_keys(self, x_TD: Tensor, step: Pass) -> None:
        """Only what other tokens will attend to; nothing of the residual stream."""
        self.self_attn.write_keys(self.input_layernorm(x_TD), step)

    def forward(self, x_TD: Tensor, step: Pass, selection: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the residual stream [T, D] and the Selection for the layers that share it."""
        attended_TD, selection = self.self_attn(self.input_layernorm(x_TD), step, selection)
        x_TD = x_TD + attended_TD
        b_TD = self.post_attention_layernorm(x_TD)
        if not isinstance(self.mlp, MoE):
            return x_TD + self.mlp(b_TD), selection
        y_TD, ids_Tk, scores_TE = self.mlp(b_TD, step.routes[self.layer] if step.routes is not None else None)
        if step.tape is not None:
            step.tape.experts[self.layer], step.tape.scores[self.layer] = ids_Tk, scores_TE
        return x_TD + y_TD, selection
