"""The forward kernels at GLM-5.2's shape, for compilers: (kernel, signature, constants, options)."""

from __future__ import annotations

from typing import Any

from nanoglm.ops.triton import attention, hopper, rows, select

Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def signature(pointers: dict[str, str], integers: str, floats: str = "") -> dict[str, str]:
    """Types of run-time arguments, as Triton names them."""
    plain = dict.fromkeys(integers.split(), "i32") | dict.fromkeys(floats.split(), "fp32")
    return {name: f"*{kind}" for name, kind in pointers.items()} | plain


def cases(architecture: str) -> list[Case]:
    select_tiles = select.TILES.get(architecture, select.TILES["portable"])
    attention_tiles = attention.TILES.get(architecture, attention.TILES["portable"])
    scored = signature(
        {"q": "bf16", "weights": "fp32", "keys": "bf16", "scales": "fp32", "table": "i32", "requests": "i64",
         "positions": "i64", "scores": "fp32", "peaks": "fp32"},
        "rows width table_width q_row q_head heads dim key_page scale_page",
    )  # fmt: skip
    chosen = signature(
        {"scores": "fp32", "peaks": "fp32", "places": "i32", "positions": "i64", "out": "i32"}, "width k"
    )
    located = signature(
        {"selection": "i32", "requests": "i64", "table": "i32", "rows": "i32", "counts": "i32"}, "selected table_row"
    )
    attended = signature(
        {"q_latent": "bf16", "q_rope": "bf16", "latent": "bf16", "rope": "bf16", "rows": "i32", "counts": "i32",
         "out": "bf16", "sums": "fp32"},
        "heads latent_dim rope_dim selected latent_row rope_row split_size", "scale",
    )  # fmt: skip
    joined = signature({"parts": "fp32", "sums": "fp32", "out": "bf16"}, "heads latent_dim splits")
    found: list[Case] = []
    for page in (1, 64):
        constants = {
            "SCALED": False, "PAGE": page, "ROWS": max(1, select_tiles.columns // 32), "HEADS": 32, "DIM": 128,
            "KEYS": select_tiles.keys, "CHUNK": select_tiles.chunk, "GROUP": 16, "WIDE": False,
            "STAGES": select_tiles.stages,
        }  # fmt: skip
        found.append((select._score, scored, constants, {"num_warps": select_tiles.warps}))
        if page == 64 and architecture.startswith("sm_"):
            eight = scored | {"q": "*fp8e4nv", "keys": "*fp8e4nv"}
            found.append((select._score, eight, constants | {"SCALED": True}, {"num_warps": select_tiles.warps}))
        found.append((attention._locate, located, {"PAGE": page, "BLOCK": 2048}, {"num_warps": 4}))
    for split in (False, True):
        constants = {
            "HEADS": attention_tiles.heads, "LATENT": 512, "ROPE": 64, "KEYS": attention_tiles.keys, "SPLIT": split,
            "LONG": False, "WIDE": False, "STAGES": attention_tiles.stages,
        }  # fmt: skip
        out = attended | ({"out": "*fp32"} if split else {})
        if architecture == "sm_90":
            fixed = {name: kind for name, kind in out.items() if name not in ("latent_dim", "rope_dim")}
            shape = {"HEADS": 64, "LATENT": 512, "ROPE": 64, "KEYS": attention_tiles.keys}
            found.append((hopper.attend, fixed, shape | {"SPLIT": split, "LONG": False}, {"num_warps": 8}))
        found.append((attention._attend, out, constants, {"num_warps": attention_tiles.warps}))
    for places, warps in ((1024, 4), (4096, 16)):
        found.append((select._choose, chosen, {"GROUP": 16, "PLACES": places}, {"num_warps": warps}))
    turned = {"cos": "fp32", "sin": "fp32", "slots": "i64"}
    latents = signature({"pool": "bf16", "kv": "bf16", "weight": "bf16"} | turned, "kv_row latent half", "eps")
    found.append((rows._write_latent, latents, {"LATENT": 512, "HALF": 32}, {"num_warps": 4}))
    keys = signature(
        {"pool": "bf16", "scales": "fp32", "keys": "bf16", "weight": "bf16", "bias": "bf16"} | turned,
        "key_row pool_page scale_page page_size dim half", "eps",
    )  # fmt: skip
    found.append((rows._write_index_keys, keys, {"SCALED": False, "PAIRS": 64}, {"num_warps": 1}))
    if architecture.startswith("sm_"):
        eight = keys | {"pool": "*fp8e4nv"}
        found.append((rows._write_index_keys, eight, {"SCALED": True, "PAIRS": 64}, {"num_warps": 1}))
    found.append((attention._join, joined, {"SPLITS": 16, "LATENT": 512}, {"num_warps": 4}))
    return found
