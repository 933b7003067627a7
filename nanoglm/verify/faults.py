"""Planted faults: mistakes that engines have made, or could, without noticing.

Each replaces one piece of the code while the receipt's external rows run again (architecture spec 8). Below
k tokens most of them change nothing: that is how they went unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm import config, ops
from nanoglm.cache import PagedCache
from nanoglm.model import glm, indexer, keys, layers, mla, moe, mtp
from nanoglm.ops import cpu, torch_tiled
from nanoglm.weights import fp8, names


class Fault(NamedTuple):
    """One mistake: what it is, and which attributes it replaces by what."""

    name: str
    trap: str  # of architecture spec 8, or the section that states the right way
    patches: tuple[tuple[Any, str, Any], ...]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Within: the code makes this mistake."""
        with ExitStack() as stack:
            for target, attribute, mistake in self.patches:
                stack.enter_context(patch.object(target, attribute, mistake))
            yield


FAULTS: list[Fault] = []


def _plant(name: str, trap: str, *patches: tuple[Any, str, Any]) -> None:
    FAULTS.append(Fault(name, trap, patches))


# A cache writes keys in one op with norm and RoPE: mistakes in these are planted into the pieces, which then run.
def _write_finished_latent(self: PagedCache, layer: int, latents: keys.Latents, batch: ops.Batch) -> None:
    ops.cache_append(self._keys[layer], torch.cat(latents.finished(), 1), batch.slots)


def _write_finished_keys(self: PagedCache, layer: int, index_keys: keys.IndexKeys, batch: ops.Batch) -> None:
    ops.index_append(self._index_keys[layer], index_keys.finished(), batch.slots)


_in_pieces = (
    (PagedCache, "write_latent", _write_finished_latent),
    (PagedCache, "write_index_keys", _write_finished_keys),
)


# ------------------------------------------------------------------------------- RoPE
def _half_split(self: layers.Rotary, x: Tensor) -> Tensor:
    cos, sin = (self.cos, self.sin) if x.ndim == 2 else (self.cos[:, None], self.sin[:, None])
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _indexer_half_split(self: layers.Rotary, x: Tensor) -> Tensor:
    rope = 2 * self.cos.shape[-1]
    return torch.cat([_half_split(self, x[..., :rope]), x[..., rope:]], -1)


def _rope_last(self: layers.Rotary, x: Tensor) -> Tensor:
    rope = 2 * self.cos.shape[-1]
    return torch.cat([x[..., :-rope], self(x[..., -rope:])], -1)


_rotary_at = layers.Rotary.at


def _bf16_positions(positions: Tensor, dim: int, theta: float) -> layers.Rotary:
    return _rotary_at(positions.bfloat16().float(), dim, theta)


def _width_192(self: glm.GLM, positions: Tensor) -> layers.Rotary:
    wide, half = _rotary_at(positions, 192, self.config.rope_theta), self.config.qk_rope_head_dim // 2
    return layers.Rotary(wide.cos[:, :half], wide.sin[:, :half])


_plant("indexer RoPE half-split", "8.1", (layers.Rotary, "first", _indexer_half_split), *_in_pieces)
_plant("indexer RoPE on the last dims", "8.3", (layers.Rotary, "first", _rope_last), *_in_pieces)
_plant("main RoPE half-split", "8.7", (layers.Rotary, "__call__", _half_split), *_in_pieces)
_plant("RoPE positions in bf16", "8.16", (layers.Rotary, "at", staticmethod(_bf16_positions)))
_plant("RoPE width from config's head_dim", "8.8", (glm.GLM, "rotary", _width_192))


# ------------------------------------------------------------------------------- indexer
def _rms(self: layers.LayerNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def _no_bias(self: layers.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)


def _eps_1e_5(self: layers.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


_best_keys, _queries, _select = torch_tiled._best_keys, indexer.Indexer.queries, torch_tiled.select


def _no_relu(*args: Any) -> Tensor:
    with patch.object(torch.Tensor, "relu_", lambda self: self):
        return _best_keys(*args)


def _weights(change: Any) -> Any:
    """The indexer with its head weights changed."""

    def queries(self: indexer.Indexer, x: Tensor, cq: Tensor, rotary: layers.Rotary) -> tuple[Tensor, Tensor]:
        q_TJI, weights_TJ = _queries(self, x, cq, rotary)
        return q_TJI, change(self, weights_TJ)

    return queries


def _without_head_scale(self: indexer.Indexer, weights_TJ: Tensor) -> Tensor:
    return weights_TJ * self.heads**0.5


def _softmax_weights(self: indexer.Indexer, weights_TJ: Tensor) -> Tensor:
    return weights_TJ.softmax(-1)


def _bf16_weights(self: indexer.Indexer, weights_TJ: Tensor) -> Tensor:
    return weights_TJ.bfloat16().float()


def _half_of_the_heads(self: indexer.Indexer, weights_TJ: Tensor) -> Tensor:
    return weights_TJ * (torch.arange(self.heads) < self.heads // 2)


def _raw_query_latent(self: mla.MLA, x: Tensor, cq: Tensor, *rest: Any) -> Any:
    return _mla_select(self, x, self.q_a_proj(x), *rest)


_mla_select = mla.MLA._select


def _late_key(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int, borders: Any, lengths: Any, k: int
) -> Tensor:
    """The newest key is written after scoring: each row sees zeros in its own place."""
    out = []
    for b, length in enumerate(lengths):
        for row in range(borders[b], borders[b + 1]):
            newest = length - (borders[b + 1] - row)
            seen = keys.clone()
            seen[int(table[b, newest // page_size]) * page_size + newest % page_size] = 0
            one = slice(row, row + 1)
            out.append(_select(q[one], weights[one], seen, table[b : b + 1], page_size, [0, 1], [newest + 1], k))
    return torch.cat(out)


def _self_excluded(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int, borders: Any, lengths: Any, k: int
) -> Tensor:
    """A row may select only what came before it (the first row has nothing else than itself)."""
    out = []
    for b, length in enumerate(lengths):
        for row in range(borders[b], borders[b + 1]):
            visible = max(1, length - (borders[b + 1] - row))
            one = slice(row, row + 1)
            out.append(_select(q[one], weights[one], keys, table[b : b + 1], page_size, [0, 1], [visible], k))
    return torch.cat(out)


# These three lie inside scoring: they are planted into the PyTorch backend, which then runs.
_torch_backend = (cpu, "best", lambda: None)
_plant("indexer without ReLU", "8.6", _torch_backend, (torch_tiled, "_best_keys", _no_relu))
_plant("k_norm as RMSNorm", "8.2", (layers.LayerNorm, "forward", _rms), *_in_pieces)
_plant("k_norm without its bias", "8.2", (layers.LayerNorm, "forward", _no_bias), *_in_pieces)
_plant("k_norm with eps 1e-5", "8.2", (layers.LayerNorm, "forward", _eps_1e_5), *_in_pieces)
_plant("head weights without n_heads^-0.5", "2.6", (indexer.Indexer, "queries", _weights(_without_head_scale)))
_plant("softmax over head weights", "2.6", (indexer.Indexer, "queries", _weights(_softmax_weights)))
_plant("head weights in bf16", "2.6", (indexer.Indexer, "queries", _weights(_bf16_weights)))
_plant("indexer heads sharded, not summed", "8.18", (indexer.Indexer, "queries", _weights(_half_of_the_heads)))
_plant("indexer reads the un-normed query latent", "2.6", (mla.MLA, "_select", _raw_query_latent))
_plant("newest key written after scoring", "2.6", _torch_backend, (torch_tiled, "select", _late_key))
_plant("self not selectable", "2.6", _torch_backend, (torch_tiled, "select", _self_excluded))


# ------------------------------------------------------------------------------- sharing
_glm_forward, _types_from_rule = glm.GLM.forward, config.types_from_rule


def _first_full(self: glm.GLM, *args: Any, **kwargs: Any) -> Any:
    """Shared layers take the previous Full layer's Selection, not the last one's."""
    output = _glm_forward(self, *args, **kwargs | {"keep_selections": True})
    full = self.config.full_layers
    wrong, sources = [], [0, *full]
    for i in range(self.config.num_hidden_layers):
        before = [s for s in sources if s <= i]
        wrong.append(output.selections[i if self.config.has_indexer(i) else before[-2]])
    if kwargs.get("selections") is not None:
        return output
    return _glm_forward(self, *args, **kwargs | {"selections": wrong})


_plant("schedule off by one", "1.3", (config, "types_from_rule", lambda n, freq, offset: _types_from_rule(
    n, freq, offset + 1)))  # fmt: skip
_plant("Shared layers run a random indexer of their own", "8.9",
       (config.GLMConfig, "has_indexer", lambda self, layer: True))  # fmt: skip
_plant("Shared layers take an older Selection", "2.7", (glm.GLM, "forward", _first_full))


# ------------------------------------------------------------------------------- attention
_mla_init = mla.MLA.__init__


def _scale_576(self: mla.MLA, c: config.GLMConfig, layer: int) -> None:
    _mla_init(self, c, layer)
    self.scale = (c.kv_lora_rank + c.qk_rope_head_dim) ** -0.5


def _unchanged(x_TD: Tensor) -> Tensor:
    return x_TD


def _raw_latent(self: mla.MLA, c: config.GLMConfig, layer: int) -> None:
    _mla_init(self, c, layer)
    self.kv_a_layernorm.forward = _unchanged  # type: ignore[method-assign]  # that is the mistake


def _dense(self: glm.GLM, ids: Tensor, batch: ops.Batch, *args: Any, **kwargs: Any) -> Any:
    form = "dense" if batch.page_size == 1 else "sparse"
    output = _glm_forward(self, ids, batch, *args, **kwargs)  # Selections are made, and not obeyed
    return output._replace(hidden=_glm_forward(self, ids, batch, *args, **kwargs | {"attention": form}).hidden)


def _latent_eps(self: mla.MLA, c: config.GLMConfig, layer: int) -> None:
    _mla_init(self, c.replace(latent_norm_eps=1e-5), layer)


_plant("scale 576^-0.5 in the absorbed form", "2.5", (mla.MLA, "__init__", _scale_576))
_plant("un-normed latent cached", "2.4", (mla.MLA, "__init__", _raw_latent), *_in_pieces)
_plant("latent norms with another eps", "8.5", (mla.MLA, "__init__", _latent_eps))
_plant("attention to every token", "2.6", (glm.GLM, "forward", _dense))


# ------------------------------------------------------------------------------- cache
_write_index_keys = PagedCache.write_index_keys


def _short_prefill(self: PagedCache, layer: int, index_keys: keys.IndexKeys, batch: ops.Batch) -> None:
    """All of a short prefix is selected anyway, so its keys are not kept; later rows look for them."""
    if max(batch.lengths) > 16:
        _write_index_keys(self, layer, index_keys, batch)


_plant("short prefill leaves index keys unwritten", "2.6", (PagedCache, "write_index_keys", _short_prefill))


# ------------------------------------------------------------------------------- experts
_route, _choose, _place_view = moe.Router.route, moe.Router._choose, names.Place.view


def _bias_in_weights(self: moe.Router, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    scores = self.forward_fp32(x).sigmoid()
    weights, ids = (scores + self.e_score_correction_bias).topk(self.topk)
    return ids, weights / weights.sum(-1, keepdim=True) * self.scale, scores


def _unscaled(self: moe.Router, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    ids, weights, scores = _route(self, x, ids)
    return ids, weights / self.scale, scores


def _bf16_bias(self: moe.Router, choice: Tensor) -> Tensor:
    bias = self.e_score_correction_bias
    return _choose(self, choice - bias + bias.bfloat16().float())


def _unnormalised(self: moe.Router, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    ids, _, scores = _route(self, x, ids)
    return ids, scores.gather(-1, ids) * self.scale, scores


def _softmax_router(self: moe.Router, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    with patch.object(ops, "sigmoid", lambda logits: logits.softmax(-1)):
        return _route(self, x, ids)


def _shared_scaled(self: moe.MoE, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    ids, weights, scores = self.gate.route(x, ids)
    assert self.shared_experts is not None
    return self.experts(x, ids, weights) + self.gate.scale * self.shared_experts(x), ids, scores


def _up_first(self: names.Place, parameter: Tensor) -> Tensor:
    swapped = {"gate": "up", "up": "gate"}.get(self.part or "", self.part)
    return _place_view(self._replace(part=swapped), parameter)


_plant("router bias in the gate value", "2.9", (moe.Router, "route", _bias_in_weights))
_plant("routed scaling 2.5 missing", "2.9", (moe.Router, "route", _unscaled))
_plant("router bias in bf16", "8.4", (moe.Router, "_choose", _bf16_bias))
_plant("gate values not normalised", "2.9", (moe.Router, "route", _unnormalised))
_plant("softmax router", "2.9", (moe.Router, "route", _softmax_router))
_plant("shared expert scaled by 2.5", "2.9", (moe.MoE, "forward", _shared_scaled))
_plant("expert files with up before gate", "4.4", (names.Place, "view", _up_first))


# ------------------------------------------------------------------------------- MTP
_draft, _mtp_draft = glm.GLM.draft, mtp.MTPLayer.draft


def _pre_norm(self: Any, next_TD: Tensor, hidden: Tensor, step: Any, selection: Any) -> Any:
    """What is recycled is the state before shared_head.norm; what is read off is right."""
    kept: list[Tensor] = []
    hook = self.shared_head.norm.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    if step.reuse_keys:
        hidden = self._recycled
    m, selection = _mtp_draft(self, next_TD, hidden, step, selection)
    hook.remove()
    self._recycled = kept[0]
    return m, selection


def _remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = _glm_forward(self, *args, **kwargs | {"keep_selections": True})
    self._last_selection = output.selections[-1]
    return output


def _main_selection(self: Any, *args: Any, **kwargs: Any) -> Any:
    m, _ = _draft(self, *args, **kwargs)
    return m, self._last_selection


def _main_selection_throughout(self: Any, ids: Tensor, hidden: Tensor, step: Any, **kwargs: Any) -> Any:
    wrong = kwargs | {"selection": self._last_selection}
    if wrong.get("depth"):
        return _draft(self, ids, hidden, step, **wrong)
    embedding = self.model.embed_tokens(ids)
    return self.mtp.draft(embedding, hidden, replace(step, replay=True, routes=None), self._last_selection)


def _swapped(self: mtp.MTPLayer, next_TD: Tensor, hidden: Tensor, step: Any, selection: Any) -> Any:
    halves = self.eh_proj.weight.chunk(2, -1)
    with patch.object(self.eh_proj, "weight", torch.nn.Parameter(torch.cat(halves[::-1], -1))):
        return _mtp_draft(self, next_TD, hidden, step, selection)


def _dense_draft(self: mtp.MTPLayer, next_TD: Tensor, hidden: Tensor, step: Any, selection: Any) -> Any:
    return _mtp_draft(self, next_TD, hidden, replace(step, attention="dense"), selection)


def _own_keys(self: mtp.MTPLayer, next_TD: Tensor, hidden: Tensor, step: Any, selection: Any) -> Any:
    """Later steps write keys and select anew over them, as GLM-5.1 did."""
    return _mtp_draft(self, next_TD, hidden, replace(step, reuse_keys=False, replay=False), None)


def _still(self: glm.GLM, ids: Tensor, hidden: Tensor, step: Any, *, depth: int = 0, selection: Any = None) -> Any:
    """Later steps rotate queries as if they stood where step 0 does."""
    if not depth:
        return _draft(self, ids, hidden, step)
    return self.mtp.draft(self.model.embed_tokens(ids), hidden, step.draft(step.rotary), selection)


def _before_final_norm(self: Any, *args: Any, **kwargs: Any) -> Any:
    kept: list[Tensor] = []
    hook = self.model.norm.register_forward_pre_hook(lambda _m, a: kept.append(a[0]))
    output = _glm_forward(self, *args, **kwargs)
    hook.remove()
    self._raw_hidden = kept[0]
    return output


def _raw_hidden(self: Any, ids: Tensor, hidden: Tensor, step: Any, **kwargs: Any) -> Any:
    return _draft(self, ids, hidden if kwargs.get("depth") else self._raw_hidden, step, **kwargs)


_remember = (glm.GLM, "forward", _remembering)
_plant("MTP recycles before the norm", "8.11", (mtp.MTPLayer, "draft", _pre_norm))
_plant("MTP later steps use the last layer's Selection", "8.11", _remember, (glm.GLM, "draft", _main_selection))
_plant("MTP step 0 uses the last layer's Selection", "8.11", _remember,
       (glm.GLM, "draft", _main_selection_throughout))  # fmt: skip
_plant("MTP concatenates hidden state first", "3.1", (mtp.MTPLayer, "draft", _swapped))
_plant("MTP attends densely", "8.12", (mtp.MTPLayer, "draft", _dense_draft))
_plant("MTP drafts attend to drafts", "3.2", (mtp.MTPLayer, "draft", _own_keys))
_plant("MTP later steps at the same position", "3.3", (glm.GLM, "draft", _still))
_plant("MTP takes the state before the final norm", "3.1", (glm.GLM, "forward", _before_final_norm),
       (glm.GLM, "draft", _raw_hidden))  # fmt: skip


# ------------------------------------------------------------------------------- FP8
_dequantise = fp8.dequantise


def _floor_of_rows(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Scale rows for whole blocks only: the last 64 of 576 rows get none."""
    _dequantise(weight, scale, out)
    whole = weight.shape[-2] // 128 * 128
    if whole:
        out[..., whole:, :] = 0
    return out


def _divided(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    return _dequantise(weight, 1 / scale.float(), out)


def _transposed_blocks(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    rows, columns = scale.shape[-2:]
    return _dequantise(weight, scale.mT.reshape(*scale.shape[:-2], rows, columns), out)


def _kv_b_raw(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """kv_b_proj split for absorption with its scales left behind."""
    if weight.shape[-1] == 512 and weight.shape[-2] != 576:
        return out.copy_(weight.float())
    return _dequantise(weight, scale, out)


_plant("FP8: fifth scale row of 576 dropped", "8.13", (fp8, "dequantise", _floor_of_rows))
_plant("FP8: divided by weight_scale_inv", "4.1", (fp8, "dequantise", _divided))
_plant("FP8: blocks transposed", "4.1", (fp8, "dequantise", _transposed_blocks))
_plant("FP8: kv_b absorbed without its scales", "8.13", (fp8, "dequantise", _kv_b_raw))
