"""The traps of architecture spec 8: parity holds, and the mistake others made would break it.

Each test plants one mistake and must see it, in the Selections or in the logits, on a sequence several
times longer than k. Short sequences hide most of them: that is how they went unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from parity.oracle import Trace, pair, run_theirs
from torch import Tensor

from nanoglm.config import GLMConfig
from nanoglm.model import GLM, BatchStore, block, indexer, layers, mla, moe
from nanoglm.ops import Batch, torch_tiled

CONFIG = GLMConfig.preset("tiny")
IDS = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def models() -> tuple[GLM, Trace]:
    theirs, ours = pair(CONFIG, 11)
    return ours, run_theirs(theirs, CONFIG, IDS.tolist())


@torch.no_grad()
def errors(model: GLM, expected: Trace) -> tuple[float, bool]:
    """Relative error of the logits, and whether all Selections agree."""
    output = model(IDS, Batch.contiguous([len(IDS)]), BatchStore())
    difference = (model.logits(output.hidden) - expected.logits).abs().max() / expected.logits.abs().max()
    same = all(torch.equal(a, b) for a, b in zip(output.selections, expected.selections, strict=True))
    return float(difference), same


@pytest.fixture
def broken(models: tuple[GLM, Trace], monkeypatch: pytest.MonkeyPatch):
    """Shows parity, plants the mistake, and demands that it shows."""
    model, expected = models

    def check(target: object, name: str, mistake: object, *, selections: bool = True) -> None:
        assert errors(model, expected)[0] <= 1e-5 and errors(model, expected)[1]
        monkeypatch.setattr(target, name, mistake)
        error, same = errors(model, expected)
        assert error > 1e-4
        if selections:
            assert not same

    return check


def half_split(self: layers.Rotary, x: Tensor) -> Tensor:
    cos, sin = (self.cos, self.sin) if x.ndim == 2 else (self.cos[:, None], self.sin[:, None])
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def test_indexer_rope_is_interleaved(broken: Callable[..., None]) -> None:
    def mistake(self: indexer.Indexer, x: Tensor, rotary: layers.Rotary) -> Tensor:
        return torch.cat([half_split(rotary, x[..., : self.rope_dim]), x[..., self.rope_dim :]], -1)

    broken(indexer.Indexer, "_rope_first", mistake)


def test_indexer_rope_is_on_the_first_dims(broken: Callable[..., None]) -> None:
    def mistake(self: indexer.Indexer, x: Tensor, rotary: layers.Rotary) -> Tensor:
        return torch.cat([x[..., : -self.rope_dim], rotary(x[..., -self.rope_dim :])], -1)

    broken(indexer.Indexer, "_rope_first", mistake)


def test_main_rope_is_interleaved(broken: Callable[..., None]) -> None:
    broken(layers.Rotary, "__call__", half_split)


def test_k_norm_is_a_layernorm_with_bias(broken: Callable[..., None]) -> None:
    def rms(self: layers.LayerNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias

    broken(layers.LayerNorm, "forward", rms)


def test_k_norm_bias_counts(broken: Callable[..., None]) -> None:
    def without(self: layers.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)

    broken(layers.LayerNorm, "forward", without)


def test_k_norm_eps_is_1e_6() -> None:
    """The eps shows on small keys only, so the value itself is pinned; transformers' module has the same."""
    theirs, ours = pair(CONFIG, 11)
    mine = {m.self_attn.indexer.k_norm.eps for m in ours.layers if m.self_attn.indexer}
    assert mine == {theirs.model.layers[0].self_attn.indexer.k_norm.eps} == {1e-6}


def test_indexer_has_its_relu(broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    best = torch_tiled._best_keys

    def mistake(*args: object) -> Tensor:
        with monkeypatch.context() as within:
            within.setattr(torch.Tensor, "relu_", lambda self: self)
            return best(*args)

    broken(torch_tiled, "_best_keys", mistake)


def test_indexer_weights_may_be_negative(broken: Callable[..., None]) -> None:
    forward = indexer.Indexer.forward

    def mistake(self: indexer.Indexer, *args: Tensor) -> indexer.IndexerInputs:
        q, weights, keys = forward(self, *args)
        return indexer.IndexerInputs(q, weights.softmax(-1), keys)

    broken(indexer.Indexer, "forward", mistake)


def test_self_can_be_selected(broken: Callable[..., None]) -> None:
    select = torch_tiled.select

    def mistake(q, weights, keys, table, page_size, borders, lengths, k) -> Tensor:
        """The newest key is written too late: scoring sees zeros in its place."""
        out = []
        for row in range(len(q)):
            seen = keys.clone()
            seen[row] = 0
            out.append(
                select(q[: row + 1], weights[: row + 1], seen, table, page_size, [0, row + 1], [row + 1], k)[-1:]
            )
        return torch.cat(out)

    broken(torch_tiled, "select", mistake)


def test_shared_layers_take_the_last_full_layers_selection(models: tuple[GLM, Trace]) -> None:
    model, expected = models
    assert errors(model, expected)[1]
    wrong = [expected.selections[0]] * 4  # layer 3 with layer 0's instead of layer 2's
    with torch.no_grad():
        output = model(IDS, Batch.contiguous([100]), BatchStore(), selections=wrong)
        assert (model.logits(output.hidden) - expected.logits).abs().max() > 1e-3


def test_router_bias_is_for_choice_only(broken: Callable[..., None]) -> None:
    def mistake(self: moe.Router, x: Tensor) -> tuple[Tensor, Tensor]:
        choice = self.forward_fp32(x).sigmoid() + self.e_score_correction_bias
        weights, ids = choice.topk(self.topk)
        return ids, weights / weights.sum(-1, keepdim=True) * self.scale

    broken(moe.Router, "route", mistake, selections=False)


def test_router_bias_is_fp32(broken: Callable[..., None]) -> None:
    """Trap 4: near 6.9 bf16 has a step of 0.03, and other experts are chosen."""
    route = moe.Router.route

    def mistake(self: moe.Router, x: Tensor) -> tuple[Tensor, Tensor]:
        exact = self.e_score_correction_bias
        self.e_score_correction_bias = exact.bfloat16().float()
        try:
            return route(self, x)
        finally:
            self.e_score_correction_bias = exact

    broken(moe.Router, "route", mistake, selections=False)


def test_routed_weights_are_normalised_and_scaled(broken: Callable[..., None], models: tuple[GLM, Trace]) -> None:
    broken(models[0].layers[1].mlp.gate, "scale", 1.0, selections=False)


def test_shared_expert_is_not_scaled(broken: Callable[..., None]) -> None:
    def mistake(self: moe.MoE, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = self.gate.route(x)
        return self.experts(x, ids, weights) + self.gate.scale * self.shared_experts(x), ids

    broken(moe.MoE, "forward", mistake, selections=False)


def test_absorbed_scale_is_that_of_the_expanded_head(broken: Callable[..., None], models: tuple[GLM, Trace]) -> None:
    broken(models[0].layers[1].self_attn, "scale", (CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim) ** -0.5)


def test_the_normed_latent_is_cached(broken: Callable[..., None], models: tuple[GLM, Trace]) -> None:
    broken(models[0].layers[0].self_attn.kv_a_layernorm, "forward", lambda x: x)


def test_indexer_reads_the_normed_query_latent(broken: Callable[..., None], models: tuple[GLM, Trace]) -> None:
    attention = models[0].layers[0].self_attn
    forward = attention.indexer.forward
    broken(attention.indexer, "forward", lambda x, cq, rotary: forward(x, attention.q_a_proj(x), rotary))


def test_latent_norm_eps_is_switchable() -> None:
    """Trap 5: 1e-6 equals transformers, 1e-5 is what vLLM, SGLang and the authors use; they differ."""
    theirs, ours = pair(CONFIG, 11)
    for name, value in theirs.named_parameters():  # small latents make the eps count
        if "_a_proj" in name:
            value.data.mul_(1e-2)
    expected = run_theirs(theirs, CONFIG, IDS.tolist())
    ours.load_state_dict(theirs.state_dict(), strict=False)
    assert errors(ours, expected)[0] <= 1e-5
    other = GLM(CONFIG.replace(latent_norm_eps=1e-5)).initialise()
    other.load_state_dict(ours.state_dict())
    assert errors(other, expected)[0] > 1e-4


def test_head_dim_of_the_config_is_ignored() -> None:
    """Trap 8: the published file says 192; RoPE has the width of qk_rope_head_dim."""
    raw = CONFIG.to_dict()
    assert GLMConfig.from_dict(raw | {"head_dim": 192}) == GLMConfig.from_dict(raw | {"head_dim": 64}) == CONFIG


def test_modules_named_here_exist() -> None:
    """The planted mistakes replace what the model really calls."""
    assert mla.Indexer is indexer.Indexer and block.MoE is moe.MoE
