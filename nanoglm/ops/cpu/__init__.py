"""C++ kernels for the CPU, called with ctypes; see csrc/.

One shared library per instruction set lies beside this file if a compiler was there at installation; the best
that the processor supports is used. Without any, or for dtypes it does not serve, ``torch_tiled`` answers.
Threads are torch's: the number is passed with every call, and torch's OpenMP library, which is loaded first,
is the one the kernels find.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.ops import torch_tiled
from nanoglm.ops.batch import storage_rows
from nanoglm.ops.work import tally

SETS = ("avx512", "avx2", "portable")  # best first
FOLDER = Path(__file__).parent  # of the libraries
GROUP, BLOCK = 16, 64
DTYPES = (torch.float32, torch.bfloat16)
_FEW_PRODUCTS = 1 << 17  # below that, waking a second thread costs more than it does


@dataclass(frozen=True)
class Library:
    """The kernels of one instruction set."""

    name: str
    handle: Any

    def select(
        self, q: Tensor, weights: Tensor, packed: Tensor, table: Tensor, borders: Sequence[int],
        lengths: Sequence[int], k: int,
    ) -> Tensor:  # fmt: skip
        """``packed`` holds blocks of 64 keys as :func:`pack` makes them; ``table`` [B, P] names them in order."""
        q, weights, table = _even(q).contiguous(), weights.float().contiguous(), table.int().contiguous()
        out = torch.empty(q.shape[0], k, dtype=torch.int32)
        self.handle.nanoglm_select(
            _bf16(q), _at(q), _at(weights), _at(packed), _at(table), _long(table.shape[1]), _longs(borders),
            _longs(lengths), _long(len(lengths)), q.shape[1], q.shape[2], k, _at(out), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def sparse_attention(
        self, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
        table: Tensor, page_size: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """As :func:`nanoglm.ops.sparse_attention`."""
        q_latent, q_rope, latent, rope = (x.contiguous() for x in (q_latent, q_rope, latent, rope))
        selection, requests, table = selection.int().contiguous(), requests.contiguous(), table.int().contiguous()
        out = torch.empty_like(q_latent)
        count, heads, c = q_latent.shape
        self.handle.nanoglm_sparse_attention(
            _bf16(q_latent), _at(q_latent), _at(q_rope), _at(latent), _at(rope), _at(selection), _at(requests),
            _at(table), _long(table.shape[1]), _long(page_size), _long(count), heads, c, rope.shape[1],
            selection.shape[1], ctypes.c_float(scale), _at(out), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
        """Routed experts; None if this library has no product of that dtype."""
        x, ids, weights = x.contiguous(), ids.long().contiguous(), weights.float().contiguous()
        gate_up, down = gate_up.contiguous(), down.contiguous()
        out = torch.empty_like(x)
        experts, dim, width = down.shape
        few = x.shape[0] * ids.shape[1] * dim * width < _FEW_PRODUCTS
        failed = self.handle.nanoglm_experts(
            _bf16(x), _at(x), _at(ids), _at(weights), _at(gate_up), _at(down), _long(x.shape[0]), ids.shape[1], experts,
            dim, width, _at(out), 1 if few else torch.get_num_threads(),
        )  # fmt: skip
        return None if failed else out


@cache
def library(name: str) -> Library | str:
    """The kernels of one instruction set, or one sentence why they are not to be had."""
    file = FOLDER / f"kernels_{name}.so"
    if not file.is_file():
        return f"{name}: not built (no compiler at installation, or it refused)"
    try:
        handle = ctypes.CDLL(str(file))
    except OSError as error:
        return f"{name}: cannot be loaded ({error})"
    if not handle.nanoglm_supported():
        return f"{name}: this processor does not support it"
    return Library(name, handle)


@cache
def best() -> Library | None:
    """The best library this processor runs; None if there is none."""
    found = (library(name) for name in SETS)
    return next((lib for lib in found if isinstance(lib, Library)), None)


def pack(keys: Tensor) -> Tensor:
    """[N, I] -> blocks of 64 keys in groups of 16, zeros behind the last.

    fp32 [blocks, 4, I, 16]; bf16 [blocks, 4, I / 2, 16, 2], pairs of dims side by side as dot products read them.
    """
    keys = F.pad(_even(keys), (0, 0, 0, -keys.shape[0] % BLOCK))
    if keys.dtype == torch.bfloat16:
        return keys.view(-1, BLOCK // GROUP, GROUP, keys.shape[1] // 2, 2).transpose(2, 3).contiguous()
    return keys.view(-1, BLOCK // GROUP, GROUP, keys.shape[1]).transpose(2, 3).contiguous()


def packs(page_size: int, dtype: torch.dtype) -> bool:
    """Whether a pool of such pages is kept packed."""
    return best() is not None and page_size == BLOCK and dtype in DTYPES


def packed_pool(pages: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Zeros in the layout of :func:`pack`, a page a block."""
    if dtype == torch.bfloat16:
        return torch.zeros(pages, BLOCK // GROUP, -(-dim // 2), GROUP, 2, dtype=dtype)
    return torch.zeros(pages, BLOCK // GROUP, dim, GROUP, dtype=dtype)


def append_packed(pool: Tensor, keys: Tensor, slots: Tensor) -> None:
    """Writes keys [T, I] at storage rows slots int64 [T] of a packed pool."""
    keys = _even(keys)
    if keys.dtype == torch.bfloat16:
        keys = keys.view(-1, keys.shape[1] // 2, 2)
    pool.flatten(0, 1)[slots // GROUP, :, slots % GROUP] = keys


# ------------------------------------------------------------------------------- the ops
def select(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int, borders: Sequence[int],
    lengths: Sequence[int], k: int,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.select`. A packed pool is read as it lies, rows of keys are packed first."""
    lib = best()
    if lib is not None and keys.ndim > 3:
        _tally_pairs(borders, lengths)
        return lib.select(q.to(keys.dtype), weights, keys, table, borders, lengths, k)
    keys = keys.flatten(0, -2)
    if lib is None or keys.dtype not in DTYPES or q.dtype != keys.dtype:
        return torch_tiled.select(q, weights, keys, table, page_size, borders, lengths, k)
    _tally_pairs(borders, lengths)
    packed, blocks, first = [], [], 0
    for b, length in enumerate(lengths):
        at = torch.arange(length)
        packed.append(pack(keys[storage_rows(at, torch.full_like(at, b), table, page_size)]))
        blocks.append(torch.arange(first, first := first + packed[-1].shape[0], dtype=torch.int32))
    return lib.select(
        q, weights, torch.cat(packed), torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True), borders, lengths, k
    )


def sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
    table: Tensor, page_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.sparse_attention`."""
    lib = best()
    if lib is None or any(x.dtype not in DTYPES or x.dtype != q_latent.dtype for x in (q_rope, latent, rope)):
        return torch_tiled.sparse_attention(
            q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale
        )
    if work := tally():
        work.rows_attended += int((selection >= 0).sum())
    return lib.sparse_attention(q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As :func:`nanoglm.ops.experts`."""
    lib, alike = best(), x.dtype in DTYPES and x.dtype == gate_up.dtype == down.dtype
    out = lib.experts(x, ids, weights, gate_up, down) if lib is not None and alike else None
    return torch_tiled.experts(x, ids, weights, gate_up, down) if out is None else out


def _tally_pairs(borders: Sequence[int], lengths: Sequence[int]) -> None:
    """Counts the visible pairs of a batch, if somebody counts."""
    if work := tally():
        for b, length in enumerate(lengths):
            rows = borders[b + 1] - borders[b]
            work.pairs_scored += rows * length - rows * (rows - 1) // 2


def _even(x: Tensor) -> Tensor:
    """bf16 dims in pairs."""
    return F.pad(x, (0, 1)) if x.dtype == torch.bfloat16 and x.shape[-1] % 2 else x


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


_long = ctypes.c_int64


def _longs(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
