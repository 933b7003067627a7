"""The kernels of routed experts at GLM-5.2's real shape, for compilation without a GPU."""

from __future__ import annotations

from typing import Any

from nanoglm.ops.triton import experts as kernels

D, W = 6144, 2048
POINTERS = {"ids": "*i64", "weights": "*fp32", "d_weights": "*fp32"} | dict.fromkeys(
    ["order", "borders", "tiles"], "*i32"
)
NUMBERS = {"dim", "width", "size", "outputs", "inputs", "slots", "bound", "choices"}


def cases(architecture: str, dtype: str = "bf16") -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(kernel, signature, constexprs, options) of each kernel in each of an architecture's tiles, in bf16."""

    def case(kernel: Any, constants: dict[str, Any], warps: int, stages: int) -> tuple[Any, Any, Any, Any]:
        names = {name: "i32" if name in NUMBERS else POINTERS.get(name, f"*{dtype}") for name in kernel.arg_names}
        signature = names | dict.fromkeys(constants, "constexpr")
        return kernel, signature, constants, {"num_warps": warps, "num_stages": stages}

    wide = {"WIDE": False}
    found = [
        case(kernels._plan, {"ROWS": 128, "EACH": False, "BLOCK": 2048}, 4, 1),
        case(kernels._combine, {"K": 8, "BLOCK": 1024}, 4, 1),
        case(kernels._combine, {"weights": None, "K": 8, "BLOCK": 1024}, 4, 1),
        case(kernels._swiglu_gradient, {"BLOCK": 1024}, 4, 1),
    ]
    for tiles in kernels.TILES[architecture]:
        products = [
            (kernels._gate_up, {"SWIGLU": True}, tiles.pair, D, W),
            (kernels._gate_up, {"SWIGLU": False}, tiles.pair, D, W),
            (kernels._product, {"GATHER": False, "TRANSPOSED": False}, tiles.single, W, D),  # down
            (kernels._product, {"GATHER": True, "TRANSPOSED": True}, tiles.single, D, W),  # hidden's gradient
            (kernels._product, {"GATHER": False, "TRANSPOSED": True}, tiles.single, 2 * W, D),  # x's gradient
        ]
        for kernel, flags, tile, size, outputs in products:
            constants = flags | kernels._options(tiles.rows, tile, size, outputs) | wide
            found.append(case(kernel, constants, constants.pop("num_warps"), constants.pop("num_stages")))
    rows, tile = kernels.GRADIENT_TILES[architecture]
    for gather_left in (True, False):
        constants = {"GATHER_LEFT": gather_left, "ROWS": rows, "COLUMNS": tile.columns, "INNER": tile.inner}
        constants |= {"EVEN_ROWS": True, "EVEN_COLUMNS": True} | wide
        found.append(case(kernels._weight_gradient, constants, tile.warps, tile.stages))
    return found
