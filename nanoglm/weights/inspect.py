"""What a checkpoint holds, told in lines."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

import torch

from nanoglm.config import GLMConfig
from nanoglm.model import GLM
from nanoglm.weights import fp8
from nanoglm.weights.files import DTYPES, INDEX_FILE, read_index
from nanoglm.weights.hf import Checkpoint, Report, account, check_counts, checkpoint_tensors
from nanoglm.weights.names import SCALE

Lines = list[tuple[str, str]]


def describe_preset(name: str) -> Lines:
    """Schedule, shapes and counts of a preset; no weights exist."""
    return [("preset", f"{name} (random weights)"), *_shape(GLMConfig.preset(name))]


def describe(directory: Path) -> tuple[Lines, Report]:
    """The same of a checkpoint directory, with dtypes, sizes and what loading finds; that also by itself.

    Reads headers only. config.json and the index file are enough: where shards are not there, names are
    accounted for and sizes follow from the configuration.

    Raises:
        CheckpointError: a tensor of a wrong shape or dtype, or damaged files.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = read_index(index)
        files = set(weight_map.values())
        here = sum((directory / file).is_file() for file in files)
        if here < len(files):
            return _describe_index(directory, weight_map, here)
    checkpoint = Checkpoint(directory)
    entries, size = checkpoint.shards.entries.values(), Counter[str]()
    for entry in entries:
        size[entry.dtype] += entry.end - entry.begin
    values = Counter({dtype: nbytes // DTYPES[dtype].itemsize for dtype, nbytes in size.items()})
    lines = [
        ("checkpoint", str(directory)),
        *_shape(checkpoint.config),
        ("files", f"{len({e.file for e in entries})}, all here"),
        ("values by dtype", ", ".join(f"{dtype} {count:,}" for dtype, count in values.most_common())),
        ("size", _bytes(size.total())),
        *_names(checkpoint.shards.shapes, checkpoint.report),
    ]
    return lines, checkpoint.report


def _describe_index(directory: Path, weight_map: dict[str, str], here: int) -> tuple[Lines, Report]:
    config = GLMConfig.from_file(directory)
    if not any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in weight_map):
        config = config.replace(num_nextn_predict_layers=0)
    check_counts(config, dict.fromkeys(weight_map, (config.n_routed_experts,)))
    shapes, report = account(config, weight_map)
    # Scales are counted as fp32; only a header can tell that they are single bytes.
    size = 0
    for name, shape in shapes.items():
        wide = name.endswith((SCALE, "e_score_correction_bias"))
        size += prod(shape) * (4 if wide else 1 if name + SCALE in shapes else 2)
    raw = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8")).get("metadata")
    total = raw.get("total_size") if isinstance(raw, dict) else None
    lines = [
        ("checkpoint", str(directory)),
        *_shape(config),
        ("files", f"{here} of {len(set(weight_map.values()))} here: told from names alone, not from headers"),
        ("size", f"{_bytes(size)} by the configuration"),
        *([("size by the index", _bytes(total))] if type(total) is int else []),
        *_names(weight_map, report),
    ]
    return lines, report


def _names(names: dict[str, str] | dict[str, tuple[int, ...]], report: Report) -> Lines:
    scales = sum(name.endswith(SCALE) for name in names)
    quantised = f", {scales:,} of them scales of FP8 blocks of {fp8.BLOCK} x {fp8.BLOCK}" if scales else ""
    lines = [("names", f"{len(names):,}{quantised}")]
    for kind, found in (("missing", report.missing), ("unexpected", report.unexpected)):
        lines.append((kind, f"{len(found):,}" + (f": {', '.join(found[:3])}" if found else "")))
    if report.ignored:
        lines.append(("ignored", f"{len(report.ignored)} indexer tensors on Shared layers"))
    return lines


def _bytes(count: int) -> str:
    return f"{count:,} bytes ({count / 1e9:,.2f} GB)"


def _shape(c: GLMConfig) -> Lines:
    with torch.device("meta"):
        tensors = checkpoint_tensors(GLM(c))
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
