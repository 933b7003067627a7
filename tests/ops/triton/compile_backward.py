"""The kernels of gradients and of the indexers' loss at GLM-5.2's shape, for compilers: (kernel, signature, constants,
options)."""

from __future__ import annotations

from typing import Any

from nanoglm.ops.triton import attention_backward, kl

Case = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]
H, C, R, K, J, I = 64, 512, 64, 2048, 32, 128  # noqa: E741


def case(kernel: Any, types: str, constants: dict[str, Any], warps: int, stages: int = 3) -> Case:
    """types: of run-time arguments in their order; all else is constant."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True))
    return kernel, signature, constants, {"num_warps": warps, "num_stages": stages}


def cases(architecture: str) -> list[Case]:
    tiles = attention_backward.TILES.get(architecture, attention_backward.TILES["portable"])
    found = []
    for grad in (True, False):  # attention's gradients, and a teacher of the indexers
        tile = tiles.scores
        constants = {
            "H": H, "C": C if grad else C + R, "R": R if grad else 0, "K": K, "BLOCK_H": tile.heads,
            "BLOCK_K": tile.keys, "BLOCK_C": tile.columns, "BLOCK_R": tile.columns if grad else 16, "GRAD": grad,
            "WIDE": False,
        }  # fmt: skip
        types = "*bf16 i32 i32 " * 3 + "*bf16 i32 *bf16 i32 *i32 *i32 *fp32 *fp32 fp32"
        found.append(case(attention_backward._scores_kernel, types, constants, tile.warps, tile.stages))
    constants = {"H": H, "K": K, "STEP": 2 * K, "BLOCK": K}
    found.append(case(attention_backward._softmax_kernel, "*fp32 *fp32 *bf16 *bf16 *i32 fp32", constants, 4))
    for wide in (C, R):
        tile = tiles.queries
        block = min(wide, tile.columns)
        constants = {
            "H": H, "W": wide, "K": K, "STEP": 2 * K, "BLOCK_H": tile.heads, "BLOCK_K": tile.keys, "BLOCK_W": block,
            "WIDE": False,
        }  # fmt: skip
        types = "*bf16 *bf16 i32 *i32 *i32 *bf16 i32 i32"
        found.append(case(attention_backward._query_kernel, types, constants, tile.warps, tile.stages))
        for atomic in (True, False):
            tile = tiles.keys
            constants = {
                "H": H, "W": wide, "K": K, "STEP": 2 * K, "HEADS": H, "BLOCK_K": tile.keys,
                "BLOCK_W": min(wide, tile.columns), "GRAD": wide == C, "ATOMIC": atomic, "WIDE": False,
            }  # fmt: skip
            types = "*bf16 *bf16 i32 i32 *bf16 *bf16 i32 i32 *i32 *i32 *fp32 i32"
            found.append(case(attention_backward._key_kernel, types, constants, tile.warps, tile.stages))
    for wide in (C, R, I):
        constants = {"W": wide, "BLOCK": wide, "RUN": attention_backward.RUN}
        types = "*i64 *i32 *fp32 i32 *fp32 i32 i32"
        found.append(case(attention_backward._add_runs_kernel, types, constants, 4))
    constants = {"H": H, "K": K, "BLOCK_H": kl.TEACHER_ELEMENTS // K, "BLOCK": K}
    found.append(case(kl._attention_kernel, "*fp32 *i32 *fp32 fp32", constants, 8))
    keys, warps, stages = kl.TILES.get(architecture, kl.TILES["portable"])
    for atomic in (True, False):
        constants = {
            "J": J, "WIDTH": I, "K": K, "HEADS": J, "DIM": I, "BLOCK_K": keys, "ATOMIC": atomic, "WIDE": False
        }  # fmt: skip
        types = "*bf16 i32 i32 *fp32 i32 i32 *bf16 i32 *i32 *i32 *fp32 *fp32 *fp32 *fp32 *fp32"
        found.append(case(kl._index_kernel, types, constants, warps, stages))
    return found
