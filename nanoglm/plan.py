"""What a configuration costs: parameters, FLOPs per token, cache, weights, and which memory they fit.

Parameters and tensors are counted on the model itself, built without storage. FLOPs and cache sizes follow
architecture spec 5 to 7; every figure is derived, none measured. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import torch

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.memory import parse_bytes
from nanoglm.model import GLM
from nanoglm.weights.fp8 import scale_shape
from nanoglm.weights.hf import named_tensors
from nanoglm.weights.names import FP8, INDEXER, LAYER, STACKED

FORMATS = ("bf16", "fp8", "int4_g64")
CACHE_BYTES = 2  # bf16


def plan(config: GLMConfig, length: int) -> dict[str, Any]:
    """All figures of one configuration at a context of ``length`` tokens, as plain numbers.

    Returns:
        ``parameters`` (total, without_mtp, active in the layers, active_with_head, all_full: the total
        with an indexer on every layer); ``flops_per_token`` at that context (indexshare, all_full, ratio,
        ratio_without_attention_and_head: of projections, experts and indexers alone); ``cache_bytes`` in
        bf16 (latent, index, total; mtp beside them; index_all_full); ``weight_bytes`` with the MTP layer
        (bf16; fp8 with fp32 scales per 128 x 128; int4_g64 with a 16-bit scale per 64 values, of the same
        matrices); ``tensors`` and, with their scales, ``tensors_fp8``.

    Raises:
        InputError: length is not positive.
    """
    if not 1 <= length <= 1 << 40:
        raise InputError(f"length is {length}; expected at least 1 and at most 2**40")
    tensors = _tensors(config)
    layers, full = config.num_hidden_layers, len(config.full_layers)
    count = {name: alike * prod(shape) for name, (alike, shape) in tensors.items()}
    mtp = sum(n for name, n in count.items() if _layer(name) == layers)
    indexer = sum(n for name, n in count.items() if INDEXER.fullmatch(name) and _layer(name) == 0)
    share = config.num_experts_per_tok / config.n_routed_experts
    active = sum(
        n * (share if STACKED.fullmatch(name) else 1) for name, n in count.items() if 0 <= _layer(name) < layers
    )
    head = config.vocab_size * config.hidden_size
    width = config.kv_lora_rank + config.qk_rope_head_dim
    rows = layers * min(length, config.index_topk)
    attention = rows * config.num_attention_heads * 2 * (width + config.kv_lora_rank)

    def flops(indexers: int) -> int:
        scoring = 2 * indexer + 2 * config.index_n_heads * config.index_head_dim * length
        return round(2 * (active - full * indexer)) + indexers * scoring

    shared, every = flops(full), flops(layers)
    rest = attention + 2 * head
    return {
        "length": length,
        "pattern": config.pattern,
        "parameters": {
            "total": sum(count.values()),
            "without_mtp": sum(count.values()) - mtp,
            "active": round(active),
            "active_with_head": round(active) + head,
            "all_full": sum(count.values()) + (layers - full) * indexer,
        },
        "flops_per_token": {
            "indexshare": shared + rest,
            "all_full": every + rest,
            "ratio": (every + rest) / (shared + rest),
            "ratio_without_attention_and_head": every / shared,
        },
        "cache_bytes": _cache(config, length),
        "weight_bytes": {kind: sum(k * _bytes(n, s, kind) for n, (k, s) in tensors.items()) for kind in FORMATS},
        "tensors": sum(alike for alike, _ in tensors.values()),
        "tensors_fp8": sum(alike * (2 if FP8.fullmatch(name) else 1) for name, (alike, _) in tensors.items()),
    }


def _cache(config: GLMConfig, length: int) -> dict[str, int]:
    layers, full = config.num_hidden_layers, len(config.full_layers)
    latent = (config.kv_lora_rank + config.qk_rope_head_dim) * CACHE_BYTES * length  # of one layer
    index = config.index_head_dim * CACHE_BYTES * length
    return {
        "latent": layers * latent,
        "index": full * index,
        "total": layers * latent + full * index,
        "mtp": (latent + index) * config.num_nextn_predict_layers,
        "index_all_full": layers * index,
    }


def served_cache(config: GLMConfig, kind: str, mtp: bool) -> int:
    """Bytes of cache per token in the engines' layouts (serving spec 6.1): latents in bf16, in FP8 with a scale per
    128 values and RoPE in bf16, or in llama.cpp's q8_0; index keys in FP8, in llama.cpp bf16 (inferred).

    Args:
        kind: bf16, fp8 or q8_0. mtp: with the MTP layer's.
    """
    latent, rope, key = config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
    fp8 = latent + 4 * -(-latent // 128) + 2 * rope
    layer = {"bf16": 2 * (latent + rope), "fp8": fp8, "q8_0": 34 * -(-(latent + rope) // 32)}[kind]
    index = 2 * key if kind == "q8_0" else key + 4 * -(-key // 128)
    return (config.num_hidden_layers + mtp) * layer + (len(config.full_layers) + mtp) * index


def _tensors(config: GLMConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By name in memory: how many tensors it is on disk, and the shape of each (experts are stacked, gate on up)."""
    with torch.device("meta"):
        named = {name: tuple(tensor.shape) for name, tensor in named_tensors(GLM(config))}
    found = {}
    for name, shape in named.items():
        match = STACKED.fullmatch(name)
        halves = 2 if match and match[1] == "gate_up" else 1
        found[name] = (halves * shape[0], (shape[1] // halves, shape[2])) if match else (1, shape)
    return found


def _layer(name: str) -> int:
    match = LAYER.match(name)
    return int(match["layer"]) if match else -1


def _bytes(name: str, shape: tuple[int, ...], kind: str) -> int:
    """Bytes of one tensor on disk in a format."""
    values = prod(shape)
    if kind == "bf16" or not FP8.fullmatch(name):
        return values * (4 if name.endswith("e_score_correction_bias") else 2)
    if kind == "fp8":
        return values + 4 * prod(scale_shape(shape))
    return -(-values // 2) + 2 * shape[0] * -(-shape[1] // 64)


def lines(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of :func:`plan` as lines to print."""
    parameters, flops = figures["parameters"], figures["flops_per_token"]
    cache, weights = figures["cache_bytes"], figures["weight_bytes"]
    return [
        ("schedule", figures["pattern"]),
        ("parameters", f"{parameters['total']:,} with MTP, {parameters['without_mtp']:,} without"),
        ("all layers Full", f"{parameters['all_full']:,}"),
        ("active per token", f"{parameters['active_with_head']:,} with the head"),
        (f"FLOPs at {figures['length']:,}", f"{flops['indexshare'] / 1e9:,.1f} G per token with IndexShare, "
         f"{flops['all_full'] / 1e9:,.1f} G all-Full: {flops['ratio']:.2f} times"),
        ("", f"{flops['ratio_without_attention_and_head']:.2f} times without core attention and head"),
        ("cache, bf16", f"{_gb(cache['total'])} GB: latents {_gb(cache['latent'])}, index keys {_gb(cache['index'])} "
         f"(all-Full {_gb(cache['index_all_full'])}); MTP {_gb(cache['mtp'])} more"),
        *((f"weights, {kind}", f"{_gb(weights[kind])} GB") for kind in FORMATS),
        ("tensors", f"{figures['tensors']:,}; {figures['tensors_fp8']:,} names in FP8 form"),
    ]  # fmt: skip


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f}"


# ------------------------------------------------------------------------------- what fits where
@dataclass
class Tier:
    """A memory: its capacity and bandwidth in bytes (per second), None if not given; what was put there."""

    name: str
    capacity: float
    bandwidth: float | None
    held: dict[str, float] = field(default_factory=dict)
    read: float = 0.0  # bytes per generated token


def place(config: GLMConfig, length: int, kind: str, tiers: Sequence[Tier]) -> float | None:
    """Fills the tiers in order with the dense part, the cache and the routed experts, and bounds the speed.

    Batch 1, main model without MTP, every byte needed is read once per token, experts chosen evenly,
    tiers read at the same time, no time for arithmetic: an upper bound (quantisation spec 5).

    Returns:
        Tokens per second at most; None if a tier that is read has no bandwidth given.
    """
    tensors = {n: t for n, t in _tensors(config).items() if _layer(n) < config.num_hidden_layers}
    size = {name: alike * _bytes(name, shape, kind) for name, (alike, shape) in tensors.items()}
    routed = sum(n for name, n in size.items() if STACKED.fullmatch(name))
    embedding = 0 if config.tie_word_embeddings else size["model.embed_tokens.weight"]  # one row is read
    cache = _cache(config, length)
    scored = cache["index"] + cache["latent"] * min(length, config.index_topk) // length
    dense = sum(size.values()) - routed
    parts = (
        ("dense part", dense, dense - embedding),
        ("cache", cache["total"], scored),
        ("experts", routed, routed * config.num_experts_per_tok / config.n_routed_experts),
    )
    for name, needed, read in parts:
        left = float(needed)
        for tier in tiers:
            taken = min(left, tier.capacity - sum(tier.held.values()))
            if taken > 0:
                tier.held[name] = taken
                tier.read += read * taken / needed
                left -= taken
    if any(tier.read and tier.bandwidth is None for tier in tiers):
        return None
    return 1 / max(tier.read / tier.bandwidth for tier in tiers if tier.bandwidth)


def tiers(
    memory: str | None = None,
    ram: str | None = None,
    memory_bandwidth: str | None = None,
    ram_bandwidth: str | None = None,
    disk_bandwidth: str | None = None,
) -> list[Tier]:
    """The memories that were named, and the disk behind them."""
    named = (("memory", memory, memory_bandwidth), ("ram", ram, ram_bandwidth))
    found = [
        Tier(name, parse_bytes(name, size) or 0, parse_bytes(f"{name}-bandwidth", speed))
        for name, size, speed in named
        if size is not None
    ]
    return [*found, Tier("disk", inf, parse_bytes("disk-bandwidth", disk_bandwidth))]
