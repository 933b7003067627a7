"""transformers' GLM as the oracle: the same random weights in both, its top-k under our tie rule.

torch.topk leaves the order of equal scores open, so transformers' indexer is given our total rule: a
stable descending sort, which is higher score first (-0.0 = +0.0), then lower position. Nothing else of
transformers is changed. Both latent norms use eps 1e-6, which transformers hard-codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoglm.config import GLMConfig
from nanoglm.model import GLM

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf  # noqa: E402  # only if it is there

FIELDS = ("architectures", "model_type", "moe_router_dtype", "latent_norm_eps")


def hf_config(config: GLMConfig) -> Any:
    raw = {k: v for k, v in config.to_dict().items() if k not in FIELDS}
    # eager experts too: the grouped GEMM it would choose refuses widths that are no multiple of 16 bytes
    return transformers.GlmMoeDsaConfig(**raw, attn_implementation="eager", experts_implementation="eager")


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every tensor random: matrices of unit gain, norms near 1, k_norm with a bias, router bias in [6.8, 7.1]."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            value.copy_(6.8 + 0.3 * torch.rand(value.shape, generator=generator))
        elif value.ndim > 1:
            value.copy_(noise * (1.0 if "embed" in name else value.shape[-1] ** -0.5))
        elif name.endswith("bias"):
            value.copy_(0.3 * noise)
        elif "inv_freq" not in name:
            value.copy_(1 + 0.2 * noise)


def pair(config: GLMConfig, seed: int = 0) -> tuple[Any, GLM]:
    """transformers' model and ours with the same weights (the MTP layer, if any, is ours alone)."""
    theirs = hf.GlmMoeDsaForCausalLM(hf_config(config)).eval()
    randomise(theirs, seed)
    ours = GLM(config.replace(latent_norm_eps=1e-6)).initialise(seed).eval()
    if config.num_nextn_predict_layers:
        randomise(ours.mtp, seed + 1)
    unknown = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unknown.unexpected_keys
    assert all(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in unknown.missing_keys)
    return theirs, ours


@contextmanager
def our_tie_rule(scores: list[Tensor] | None = None) -> Iterator[None]:
    """Within: the indexers' ``topk`` is a stable sort, and what they sort is kept in ``scores``, [1, S, T]."""
    forward, original = hf.GlmMoeDsaIndexer.forward, torch.Tensor.topk

    def stable(self: Tensor, k: int, dim: int = -1) -> Any:
        assert dim == -1
        if scores is not None:
            scores.append(self.clone())
        order = self.sort(dim=-1, descending=True, stable=True)
        return torch.return_types.topk((order.values[..., :k], order.indices[..., :k]))

    def indexer(*args: Any, **kwargs: Any) -> Tensor:
        torch.Tensor.topk = stable  # type: ignore[method-assign]  # put back below
        try:
            return forward(*args, **kwargs)
        finally:
            torch.Tensor.topk = original  # type: ignore[method-assign]  # as it was

    hf.GlmMoeDsaIndexer.forward = indexer
    try:
        yield
    finally:
        hf.GlmMoeDsaIndexer.forward = forward


@dataclass
class Trace:
    """What a pass left: hidden states after each layer, Selections, scores, logits."""

    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    selections: list[Tensor] = field(default_factory=list)  # one int32 [T, k] a layer, ours in form
    scores: dict[int, Tensor] = field(default_factory=dict)  # per Full layer [T, T]


@torch.no_grad()
def run_theirs(model: Any, config: GLMConfig, ids: list[int]) -> Trace:
    """One sequence through transformers."""
    hidden: list[Tensor] = []
    chosen: list[Tensor] = []
    scores: list[Tensor] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda _m, _i, out: hidden.append(out[0][0])))
        hooks.append(layer.self_attn.register_forward_hook(lambda _m, _i, out: chosen.append(out[2][0])))
    with our_tie_rule(scores):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    selections = [as_selection(c, config.index_topk) for c in chosen]
    return Trace(logits, hidden, selections, dict(zip(config.full_layers, (s[0] for s in scores), strict=True)))


def as_selection(chosen: Tensor, k: int) -> Tensor:
    """transformers' indices [T, min(k, T)], which include masked positions, as our Selection."""
    rows = torch.arange(len(chosen))[:, None]
    far = torch.iinfo(torch.int32).max
    kept = torch.where(chosen.long() <= rows, chosen.long(), far).sort(-1).values
    out = torch.full((len(chosen), k), -1, dtype=torch.int32)
    out[:, : kept.shape[1]] = torch.where(kept == far, -1, kept).int()
    return out


def near_tie(scores: Tensor, row: int, k: int) -> float:
    """Distance of the k-th and the next best visible score of a row; infinite if all are selected."""
    visible = scores[row, : row + 1].sort(descending=True).values
    return float("inf") if len(visible) <= k else float(visible[k - 1] - visible[k])
