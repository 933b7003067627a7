"""Mixture of experts: a router that chooses with a bias and weighs without it.

Shape legend: T tokens, D hidden, E experts, G groups, k experts per token, W expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoglm import ops
from nanoglm.config import GLMConfig
from nanoglm.model.layers import MLP, Linear


class Router(Linear):
    """Which experts a token visits, and with what weight (architecture spec 2.9, steps 1 to 4).

    Always fp32: the trained bias lies near 6.9, where bf16 has a step of 0.03, and 98 % of tokens
    would choose other experts (trap 4).
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config.hidden_size, config.n_routed_experts)
        self.topk, self.groups, self.topk_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def route(self, x_TD: Tensor, ids_Tk: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns expert ids int64 [T, k], weights fp32 [T, k] and all scores fp32 [T, E]; ``ids_Tk`` replays a
        recorded choice."""
        scores_TE = ops.sigmoid(self.forward_fp32(x_TD))
        if ids_Tk is None:
            ids_Tk = self._choose(scores_TE.detach() + self.e_score_correction_bias)
        weights_Tk = scores_TE.gather(-1, ids_Tk)  # without the bias: it is for choice only
        if self.normalise:
            weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
        return ids_Tk, weights_Tk * self.scale, scores_TE

    def _choose(self, choice_TE: Tensor) -> Tensor:
        """The k best experts of the best groups (with one group, of all)."""
        if self.groups > 1:
            choice_TGE = choice_TE.unflatten(-1, (self.groups, -1))
            best_TG = choice_TGE.topk(min(2, choice_TGE.shape[-1]), -1).values.sum(-1)
            kept = ops.top(best_TG, self.topk_groups)
            dropped_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(-1, kept, False)
            choice_TE = choice_TGE.masked_fill(dropped_TG[..., None], -torch.inf).flatten(-2)
        return ops.top(choice_TE, self.topk)


class Experts(nn.Module):
    """The routed experts of a layer as two 3-D parameters, named as transformers names them."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))  # gate rows first
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        return ops.experts(x_TD, ids_Tk, weights_Tk, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts plus the shared expert, which is neither gated nor scaled (spec 2.9, step 5)."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, width) if width else None

    def forward(self, x_TD: Tensor, ids_Tk: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns [T, D], the chosen experts int64 [T, k] (the given ones, if any) and the router's scores [T, E]."""
        ids_Tk, weights_Tk, scores_TE = self.gate.route(x_TD, ids_Tk)
        y_TD = self.experts(x_TD, ids_Tk, weights_Tk)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD, ids_Tk, scores_TE
