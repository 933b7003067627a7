"""Checkpoints of any size that take no room on disk: files with holes, which read as zeros."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nanoglm.config import GLMConfig

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
Stored = tuple[str, tuple[int, ...]]  # dtype and shape


def sparse_checkpoint(folder: Path, config: GLMConfig, tensors: dict[str, Stored], shards: int) -> int:
    """Writes config.json, the index file and ``shards`` files. Returns the bytes of all tensors."""
    names, weight_map, total = list(tensors), {}, 0
    for shard in range(shards):
        held = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in held:
            dtype, shape = tensors[name]
            begin, end = end, end + BYTES[dtype] * torch.Size(shape).numel()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(raw).to_bytes(8, "little") + raw)
            opened.truncate(8 + len(raw) + end)
        total += end
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return total
