"""transformers' GLM as the oracle: the same random weights in both, its top-k under our tie rule.

torch.topk leaves the order of equal scores open, so transformers' indexer is given our total rule: a
stable descending sort, which is higher score first (-0.0 = +0.0), then lower position. Nothing else of
transformers is changed. Both latent norms use eps 1e-6, which transformers hard-codes.

transformers has no MTP layer: :class:`ComposedMTP` puts one together from its decoder layer, attention, MoE
and norms as the spec says.

Importing this module needs transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from nanoglm import ops
from nanoglm.config import FULL, GLMConfig
from nanoglm.model import GLM, BatchStore, Tape
from nanoglm.ops import Batch

# By name, so that type checkers do not walk through all of transformers.
transformers: Any = import_module("transformers")
hf: Any = import_module("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa")

FIELDS = ("architectures", "model_type", "moe_router_dtype", "latent_norm_eps")


@contextmanager
def silent() -> Iterator[None]:
    """Within: transformers prints no progress bars and no load reports."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def hf_config(config: GLMConfig) -> Any:
    """transformers' configuration object of the same model, eager everywhere."""
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
    forward = hf.GlmMoeDsaIndexer.forward

    def stable(self: Tensor, k: int, dim: int = -1) -> Any:
        assert dim == -1
        if scores is not None:
            scores.append(self.clone())
        order = self.sort(dim=-1, descending=True, stable=True)
        return torch.return_types.topk((order.values[..., :k], order.indices[..., :k]))

    def indexer(*args: Any, **kwargs: Any) -> Tensor:
        with patch.object(torch.Tensor, "topk", stable):
            return forward(*args, **kwargs)

    with patch.object(hf.GlmMoeDsaIndexer, "forward", indexer):
        yield


@dataclass
class Trace:
    """What a pass left: hidden states after each layer, Selections, scores, logits."""

    logits: Tensor
    final: Tensor  # [T, D], after the final norm
    hidden: list[Tensor] = field(default_factory=list)
    selections: list[Tensor] = field(default_factory=list)  # one int32 [T, k] a layer, ours in form
    scores: dict[int, Tensor] = field(default_factory=dict)  # per Full layer [T, T]


@torch.no_grad()
def run_theirs(model: Any, config: GLMConfig, ids: list[int]) -> Trace:
    """One sequence through transformers, in ``config``'s schedule."""
    hidden: list[Tensor] = []
    chosen: list[Tensor] = []
    scores: list[Tensor] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda _m, _i, out: hidden.append(out[0][0])))
        hooks.append(layer.self_attn.register_forward_hook(lambda _m, _i, out: chosen.append(out[2][0])))
    with our_tie_rule(scores):
        final = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    selections = [as_selection(c, config.index_topk) for c in chosen]
    kept = dict(zip(config.full_layers, (s[0] for s in scores), strict=True))
    return Trace(model.lm_head(final)[0], final[0], hidden, selections, kept)


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


@torch.no_grad()
def run_ours(
    model: GLM, sequences: list[list[int]], forced: Mapping[tuple[int, int], Tensor] | None = None
) -> list[Trace]:
    """All sequences as one ragged batch. ``forced`` replaces single Selection rows, keyed (Full layer, batch row)."""
    counts = [len(ids) for ids in sequences]
    hidden: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, _inputs, output: hidden.__setitem__(layer, output[0])

    hooks = [module.register_forward_hook(keep(i)) for i, module in enumerate(model.layers)]
    select, full = ops.select, iter(model.config.full_layers)

    def replaying(*args: Any) -> Tensor:
        selection, layer = select(*args), next(full, None)
        for (at, row), value in (forced or {}).items():
            if at == layer:
                selection[row] = value
        return selection

    tape = Tape()
    packed = torch.tensor([i for ids in sequences for i in ids])
    try:
        with patch.object(ops, "select", replaying):
            output = model(packed, Batch.contiguous(counts), BatchStore(), tape=tape)
    finally:
        for hook in hooks:
            hook.remove()
    logits, final = model.logits(output.hidden).split(counts), output.hidden.split(counts)
    layers = [hidden[i].split(counts) for i in range(len(model.layers))]
    chosen = [s.split(counts) for s in output.selections if s is not None]
    traces = [Trace(logits[b], final[b], [h[b] for h in layers], [s[b] for s in chosen]) for b in range(len(counts))]
    for layer, inputs in tape.indexer.items():
        for trace, q, weights, keys in zip(traces, *(x.split(counts) for x in inputs), strict=True):
            trace.scores[layer] = torch.einsum("tj,tjs->ts", weights, torch.einsum("tji,si->tjs", q, keys).relu())
    return traces


class Flip(NamedTuple):
    """A Selection row that differs from transformers'."""

    layer: int
    row: int  # of the batch
    gap: float  # between transformers' k-th and next score: what decides whether it may
    wanted: Tensor


def first_flips(found: list[Trace], expected: list[Trace]) -> list[Flip]:
    """Those of the first layer where Selections differ; later layers differ in consequence."""
    source = 0
    for layer in range(len(expected[0].selections)):
        source = layer if layer in expected[0].scores else source
        flips, first = [], 0
        for mine, wanted in zip(found, expected, strict=True):
            ours, theirs = mine.selections[layer], wanted.selections[layer]
            for row in (ours != theirs).any(-1).nonzero().flatten().tolist():
                gap = near_tie(wanted.scores[source], row, theirs.shape[1])
                flips.append(Flip(source, first + row, gap, theirs[row]))
            first += len(ours)
        if flips:
            return flips
    return []


class ComposedMTP(nn.Module):
    """The MTP layer of transformers' parts over one sequence (architecture spec 3.1, 3.3).

    Step 0 is transformers' whole decoder layer; later steps project queries one position further, attend
    to step 0's keys under step 0's top-k, and take what came out of the final norm. Parameters are random.
    """

    def __init__(self, config: GLMConfig, seed: int) -> None:
        super().__init__()
        index = config.num_hidden_layers
        with_it = config.replace(
            num_hidden_layers=index + 1, indexer_types=(FULL,) * (index + 1),
            mlp_layer_types=(*config.mlp_layer_types, "sparse"),
        )  # fmt: skip
        self.hf_config = hf_config(with_it)
        self.layer = hf.GlmMoeDsaDecoderLayer(self.hf_config, index)
        self.enorm, self.hnorm, self.norm = (
            hf.GlmMoeDsaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3)
        )
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.rope = hf.GlmMoeDsaRotaryEmbedding(self.hf_config)
        randomise(self, seed)
        self.eval()

    def checkpoint(self) -> dict[str, Tensor]:
        """Its parameters under the names of an MTP layer, experts stacked as in memory."""
        prefix = f"model.layers.{self.hf_config.num_hidden_layers - 1}."
        names = {"norm.weight": "shared_head.norm.weight"}
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("rope.")}
        return {prefix + names.get(k, k.removeprefix("layer.")): v for k, v in state.items()}

    @torch.no_grad()
    def step(self, embedding: Tensor, hidden: Tensor, depth: int) -> Tensor:
        """m [T, D] of draft step ``depth``; embedding of the next tokens [T, D], hidden [T, D]."""
        z = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], -1))[None]
        angles = self.rope(z, torch.arange(z.shape[1])[None] + depth)
        causal = torch.full((1, 1, z.shape[1], z.shape[1]), torch.finfo(torch.float32).min).triu(1)
        if depth == 0:
            self._angles, self._input = angles, self.layer.input_layernorm(z)
            with our_tie_rule():
                y, self._chosen = self.layer(z, attention_mask=causal, position_embeddings=angles)
            return self.norm(y[0])
        y = z + self._attend(self.layer.input_layernorm(z), angles, causal)
        return self.norm((y + self.layer.mlp(self.layer.post_attention_layernorm(y)))[0])

    def _attend(self, x: Tensor, angles: tuple[Tensor, Tensor], causal: Tensor) -> Tensor:
        """transformers' eager attention with the queries of this step and step 0's keys and top-k."""
        attention = self.layer.self_attn
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
        q = q.view(1, x.shape[1], -1, attention.qk_head_dim).transpose(1, 2)
        q_pass, q_rot = q.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], -1)
        q_rot, _ = hf.apply_rotary_pos_emb_interleave(q_rot, q_rot, *angles)
        sizes = [attention.kv_lora_rank, attention.qk_rope_head_dim]
        latent, k_rot = attention.kv_a_proj_with_mqa(self._input).split(sizes, -1)
        _, k_rot = hf.apply_rotary_pos_emb_interleave(k_rot[:, None], k_rot[:, None], *self._angles)
        keys, values = attention.expand_kv(attention.kv_a_layernorm(latent)[:, None], k_rot)
        hidden = torch.ones_like(causal[:, 0], dtype=torch.bool).scatter(-1, self._chosen.long(), False)[:, None]
        mask = causal.masked_fill(hidden, torch.finfo(torch.float32).min)
        out, _ = hf.eager_attention_forward(
            attention, torch.cat([q_pass, q_rot], -1), keys, values, mask, attention.scaling
        )
        return attention.o_proj(out.reshape(1, x.shape[1], -1))
