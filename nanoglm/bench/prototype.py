"""A rival's kernels, given as a folder with ``dsa_cpu.cpp``: compiled here and called on the same inputs."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from nanoglm.errors import InputError
from nanoglm.ops.cpu import BLOCK

SOURCE = "dsa_cpu.cpp"


class Prototype:
    """One request, no pages: keys are packed once, as it wants them, outside the timed part.

    Raises:
        InputError: no such source, or it does not compile.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / SOURCE).is_file():
            raise InputError(f"prototype is {folder}; expected a folder with {SOURCE}")
        with TemporaryDirectory() as place:
            library = Path(place) / "rival.so"
            flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            try:
                subprocess.run(
                    ["g++", *flags, str(folder / SOURCE), "-o", str(library)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
            except (OSError, subprocess.CalledProcessError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                raise InputError(
                    f"prototype {folder / SOURCE} does not compile: {said[0] if said else error}"
                ) from None
            self._lib = ctypes.CDLL(str(library))  # stays loaded when the file is gone

    def indexer(self, q: Tensor, weights: Tensor, keys: Tensor, k: int, kind: str) -> Callable[[], Tensor]:
        """Of the last queries [T, J, I] of all keys [N, I], fp32; ``kind`` bf16 or int8. Top-k included."""
        (queries, heads, dim), count = q.shape, keys.shape[0]
        room = -(-count // BLOCK) * BLOCK
        kept = found, counts = torch.full((queries, k), -1, dtype=torch.int32), torch.empty(queries, dtype=torch.int32)
        tail = (
            c_int64(queries), c_int64(count - queries), c_int(heads), c_int(dim), c_int(k),
            _at(found), _at(counts), c_void_p(0), c_int(1), c_int(0),
        )  # fmt: skip
        if kind == "bf16":
            q, keys, packed = q.bfloat16(), keys.bfloat16(), torch.zeros(room, dim, dtype=torch.bfloat16)
            self._lib.pack_k_bf16(_at(keys), c_int64(count), c_int(dim), _at(packed))

            def run_bf16() -> Tensor:
                self._lib.indexer_bf16(_at(q), _at(weights), _at(packed), *tail)
                return kept[0]  # with counts, of which tail knows the address alone

            return run_bf16
        packed, scale = torch.zeros(room, dim, dtype=torch.uint8), torch.zeros(room)
        self._lib.pack_k_i8(_at(keys), c_int64(count), c_int(dim), _at(packed), _at(scale))
        q8, scaled = torch.empty(q.shape, dtype=torch.int8), torch.empty_like(weights)
        start = torch.empty(weights.shape, dtype=torch.int32)

        def run() -> Tensor:  # queries are quantised in our op too
            self._lib.quant_q_i8(
                _at(q), _at(weights), c_int64(queries), c_int(heads), c_int(dim), _at(q8), _at(scaled), _at(start)
            )
            self._lib.indexer_i8(_at(q8), _at(scaled), _at(start), _at(packed), _at(scale), *tail)
            return kept[0]

        return run

    def attention(self, given: dict[str, Any]) -> Callable[[], Tensor]:
        """Of the inputs of :func:`nanoglm.ops.sparse_attention`; scales queries and joins rope parts beforehand."""
        q = torch.cat([given["q_latent"], given["q_rope"]], -1).float().mul(given["scale"]).bfloat16()
        rows = torch.cat([given["latent"], given["rope"]], -1).contiguous()
        selection, latent = given["selection"], given["latent"].shape[1]
        (queries, heads, width), k = q.shape, selection.shape[1]
        counts, out = (selection >= 0).sum(1).int(), torch.empty(queries, heads, latent, dtype=torch.bfloat16)

        def run() -> Tensor:
            refused = self._lib.sparse_mla(
                _at(q), _at(rows), _at(selection), _at(counts), c_int64(queries), c_int(heads), c_int(k), c_int(width),
                c_int(latent), _at(out),
            )  # fmt: skip
            if refused:
                raise InputError(f"the prototype has no attention of width {width}")
            return out

        return run


def _at(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())
