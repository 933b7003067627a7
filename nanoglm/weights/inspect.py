"""What a checkpoint holds, told in lines."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import torch

from nanoglm.config import GLMConfig
from nanoglm.model import GLM
from nanoglm.weights.hf import Checkpoint, checkpoint_tensors

Lines = list[tuple[str, str]]


def describe_preset(name: str) -> Lines:
    """Schedule, shapes and counts of a preset; no weights exist."""
    with torch.device("meta"):
        module = GLM(GLMConfig.preset(name))
    return [("preset", f"{name} (random weights)"), *_shape(module)]


def describe(directory: Path) -> Lines:
    """The same of a checkpoint directory, with dtypes and what loading finds; reads headers only.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape or dtype.
    """
    checkpoint = Checkpoint(directory)
    module, report = checkpoint.load(device="meta")
    dtypes: Counter[str] = Counter()
    for name, shape in checkpoint.shards.shapes.items():
        dtypes[checkpoint.shards.dtypes[name]] += prod(shape)
    kinds = ", ".join(f"{dtype} {count:,}" for dtype, count in dtypes.most_common())
    lines = [("checkpoint", str(checkpoint.directory)), *_shape(module), ("values by dtype", kinds)]
    lines.append(("missing, unexpected", f"{len(report.missing)}, {len(report.unexpected)}"))
    if report.ignored:
        lines.append(("ignored", f"{len(report.ignored)} indexer tensors on Shared layers"))
    return lines


def _shape(module: GLM) -> Lines:
    c = module.config
    tensors = checkpoint_tensors(module)
    total = sum(t.numel() for t in tensors.values())
    mtp = sum(t.numel() for n, t in tensors.items() if n.startswith(f"model.layers.{c.num_hidden_layers}."))
    moe = sum(c.is_moe(i) for i in range(c.num_hidden_layers))
    return [
        (
            "layers",
            f"{c.num_hidden_layers}: {len(c.full_layers)} Full, {c.num_hidden_layers - len(c.full_layers)} Shared",
        ),
        ("schedule", c.pattern),
        ("hidden, heads", f"{c.hidden_size}, {c.num_attention_heads}"),
        ("latents q, kv + rope", f"{c.q_lora_rank}, {c.kv_lora_rank} + {c.qk_rope_head_dim}"),
        ("head nope, rope, value", f"{c.qk_nope_head_dim}, {c.qk_rope_head_dim}, {c.v_head_dim}"),
        ("indexer", f"{c.index_n_heads} heads of {c.index_head_dim}, top {c.index_topk}"),
        (
            "experts",
            f"{moe} layers of {c.n_routed_experts} + {c.n_shared_experts} shared, {c.num_experts_per_tok} per token",
        ),
        ("positions", f"{c.max_position_embeddings:,}, RoPE base {c.rope_theta:,.0f}"),
        ("latent norm eps", f"{c.latent_norm_eps}"),
        ("tensors", f"{len(tensors):,}"),
        ("parameters", f"{total:,} with MTP, {total - mtp:,} without" if mtp else f"{total:,} (no MTP layer)"),
    ]
