"""The single mapping between names on disk and names in memory.

On disk, routed experts are separate: ``mlp.experts.{e}.{gate,up,down}_proj.weight``. In memory they
are two 3-D parameters per layer, ``mlp.experts.gate_up_proj`` (gate rows first) and
``mlp.experts.down_proj``. Everything else is identity. Source: architecture spec 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

EXPERTS = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")
STACKED = re.compile(r".*\.mlp\.experts\.(gate_up|down)_proj")
# Kept in fp32 whatever the model's dtype: bf16 moves the router's choice (trap 4) and near-tied
# selections; transformers keeps the same two.
KEEP_FP32 = re.compile(r".*(e_score_correction_bias|indexer\.weights_proj\.weight)")
# What the FP8 files store as e4m3: all projections but the router, the indexers' head weights and eh_proj
# (spec 4.1; the published exclusion list calls weights_proj `indexers_proj`, a name no tensor has: trap 13).
FP8 = re.compile(
    r".*\.((q_a|q_b|kv_b|o|gate|up|down)_proj|kv_a_proj_with_mqa|wq_b|wk)\.weight|.*\.mlp\.experts\.(gate_up|down)_proj"
)
SCALE = "_scale_inv"  # behind a quantised weight's name
LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.")
INDEXER = re.compile(r"model\.layers\.(?P<layer>\d+)\.self_attn\.indexer\..*")


class Place(NamedTuple):
    """Where a tensor of the disk belongs: a parameter, and for an expert its slice."""

    parameter: str
    expert: int | None = None
    part: str | None = None  # gate, up or down

    def view(self, parameter: Tensor) -> Tensor:
        """The part of the in-memory parameter that the tensor fills."""
        if self.expert is None:
            return parameter
        whole = parameter[self.expert]
        half = whole.shape[0] // 2
        return {"gate": whole[:half], "up": whole[half:], "down": whole}[self.part or "down"]


def place(name: str) -> Place:
    """Disk name to memory."""
    match = EXPERTS.fullmatch(name)
    if match is None:
        return Place(name)
    part = match["part"]
    return Place(f"{match['prefix']}.{'down' if part == 'down' else 'gate_up'}_proj", int(match["expert"]), part)


def disk_tensors(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Memory to disk: a stacked parameter as one tensor per expert, anything else as it is.

    Yields views; works on meta tensors.
    """
    if not STACKED.fullmatch(name):
        yield name, value
        return
    prefix, kind = name.rsplit(".", 1)
    parts = ("down",) if kind == "down_proj" else ("gate", "up")
    for expert in range(value.shape[0]):
        for part in parts:
            disk = f"{prefix}.{expert}.{part}_proj.weight"
            yield disk, place(disk).view(value)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor has in memory when the model is loaded in ``dtype``."""
    return torch.float32 if KEEP_FP32.fullmatch(name) else dtype
