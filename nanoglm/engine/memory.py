"""How a byte budget is shared out: weights, what a step needs, and pages for all that is left."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanoglm.cache import PAGE, PagedCache
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.ops import scratch


@dataclass(frozen=True)
class Memory:
    """Bytes of each part, of latents and index keys those of one page, and how many pages of 64 tokens there are.

    ``scratch`` is what one op holds at most while it runs.
    """

    weights: int
    activations: int
    scratch: int
    latents: int
    index_keys: int
    pages: int

    @property
    def workspace(self) -> int:
        """Bytes that a step needs."""
        return self.activations + self.scratch

    @property
    def cache(self) -> int:
        """Bytes of all pages."""
        return self.pages * (self.latents + self.index_keys)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.workspace + self.cache

    @property
    def tokens(self) -> int:
        """How many fit."""
        return self.pages * PAGE

    def __str__(self) -> str:
        parts = {
            "weights": self.weights, "workspace": self.workspace, "latents": self.pages * self.latents,
            "index keys": self.pages * self.index_keys,
        }  # fmt: skip
        said = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in parts.items())
        return f"{said}: {self.pages:,} pages, {self.tokens:,} tokens"


def needed(model: GLM, pages: int, rows: int, logits: int, index_dtype: torch.dtype | None = None) -> Memory:
    """What a pass over ``rows`` tokens, of which ``logits`` are asked for, takes beside a cache of so many pages."""
    config, weight = model.config, model.lm_head.weight
    weights = sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())
    cache = PagedCache(config, 1, dtype=weight.dtype, index_dtype=index_dtype, device=weight.device)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    latents = PAGE * layers * (config.kv_lora_rank + config.qk_rope_head_dim) * weight.dtype.itemsize
    active = config.num_experts_per_tok + config.n_shared_experts
    width = max(config.intermediate_size, config.moe_intermediate_size * active)
    row = (
        8 * config.hidden_size
        + config.num_attention_heads * (2 * config.qk_head_dim + 2 * config.kv_lora_rank + config.v_head_dim)
        + config.q_lora_rank + config.index_n_heads * config.index_head_dim + 2 * config.index_topk + 3 * width
    )  # fmt: skip
    activations = 4 * (rows * row + 3 * logits * config.vocab_size)  # in fp32 at most
    index_keys = PAGE * cache.bytes_per_token - latents
    return Memory(weights, activations, scratch(weight.device), latents, index_keys, pages)


def share(
    model: GLM, total: float, *, budget: int = 1024, most: int = 64, drafts: int = 0,
    index_dtype: torch.dtype | None = None,
) -> Memory:  # fmt: skip
    """What an engine may take of ``total`` bytes; budget, most and drafts as :class:`Engine` takes them.

    Raises:
        InputError: no page fits.
    """
    one = needed(model, 1, budget, most * (drafts + 1), index_dtype)
    pages = int((total - one.weights - one.workspace) // (one.latents + one.index_keys))
    if pages < 1:
        raise InputError(
            f"memory is {total / 1e9:.3g} GB; expected more than {one.total / 1e9:.3g} GB: weights "
            f"{one.weights / 1e9:.3g}, workspace {one.workspace / 1e9:.3g} and one page"
        )
    return replace(one, pages=pages)
