"""The forward kernels at GLM-5.2's shape, for compilers: (kernel, signature, constants, options)."""

from __future__ import annotations

from typing import Any

from nanoglm.ops.triton import attention, select

Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def signature(pointers: dict[str, str], integers: str, floats: str = "") -> dict[str, str]:
    """Types of run-time arguments, as Triton names them."""
    plain = dict.fromkeys(integers.split(), "i32") | dict.fromkeys(floats.split(), "fp32")
    return {name: f"*{kind}" for name, kind in pointers.items()} | plain


def cases(architecture: str) -> list[Case]:
    select_tiles = select.TILES.get(architecture, select.TILES["portable"])
    attention_tiles = attention.TILES.get(architecture, attention.TILES["portable"])
    scored = signature(
        {"q": "bf16", "weights": "fp32", "keys": "bf16", "table": "i32", "requests": "i64", "positions": "i64",
         "scores": "fp32", "peaks": "fp32"},
        "rows width table_width q_row q_head heads dim",
    )  # fmt: skip
    chosen = signature(
        {"scores": "fp32", "peaks": "fp32", "places": "i32", "positions": "i64", "out": "i32"}, "width k"
    )
    attended = signature(
        {"q_latent": "bf16", "q_rope": "bf16", "latent": "bf16", "rope": "bf16", "selection": "i32", "requests": "i64",
         "table": "i32", "out": "bf16", "sums": "fp32"},
        "heads latent_dim rope_dim selected table_width latent_row rope_row split_size", "scale",
    )  # fmt: skip
    joined = signature({"parts": "fp32", "sums": "fp32", "out": "bf16"}, "heads latent_dim splits")
    found: list[Case] = []
    for page in (1, 64):
        constants = {
            "PAGE": page, "ROWS": max(1, select_tiles.columns // 32), "HEADS": 32, "DIM": 128,
            "KEYS": select_tiles.keys, "CHUNK": select_tiles.chunk, "GROUP": 16, "WIDE": False,
            "STAGES": select_tiles.stages,
        }  # fmt: skip
        found.append((select._score, scored, constants, {"num_warps": select_tiles.warps}))
        for split in (False, True):
            constants = {
                "PAGE": page, "HEADS": attention_tiles.heads, "LATENT": 512, "ROPE": 64, "KEYS": attention_tiles.keys,
                "SPLIT": split, "WIDE": False, "STAGES": attention_tiles.stages,
            }  # fmt: skip
            out = attended | ({"out": "*fp32"} if split else {})
            found.append((attention._attend, out, constants, {"num_warps": attention_tiles.warps}))
    top = {"GROUP": 16, "PLACES": select_tiles.places}
    found.append((select._choose, chosen, top, {"num_warps": select_tiles.top_warps}))
    found.append((attention._join, joined, {"SPLITS": 16, "LATENT": 512}, {"num_warps": 4}))
    return found
