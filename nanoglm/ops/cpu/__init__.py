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

from nanoglm.ops import kl, torch_tiled
from nanoglm.ops.batch import storage_rows
from nanoglm.ops.work import tally, tally_pairs

SETS = ("avx512", "avx2", "portable")  # best first
FOLDER = Path(__file__).parent  # of the libraries
GROUP, BLOCK = 16, 64
DTYPES = (torch.float32, torch.bfloat16)
_FEW_PRODUCTS = 1 << 17  # below that, waking a second thread costs more than it does
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # of packed index keys, as select.cpp counts them
_PLAIN = (Tensor, torch.nn.Parameter)
_TYPES = {"i": ctypes.c_int, "q": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
_SIGNATURES = {  # of csrc's exported functions
    "select": "ippppqppqiiipi",
    "sparse_attention": "ipppqpqpppqqqiiiifpi",
    "sparse_attention_backward": "ppppqpqpppqqqiiiifppppi",
    "indexer_kl": "pppqpiippiiiiqqfppppi",
    "experts": "ippppppqqqiiiipi",
    "experts_int8": "pppppppqiiiipi",
    "linear": "ipqqpqqiqiiipii",
    "rms_norm": "ipqpfqipi",
    "rotate": "ipqqppqiiipi",
    "top": "pqiipi",
    "quantise": "ipqippi",
    "append": "ppqipi",
    "write_latent": "ipqpfpppqiipi",
    "write_index_keys": "ippppqiiipi",
}


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
        if packed.dtype == torch.uint8:
            q, scale = quantise(q)
            weights = weights.float() * scale
        kind = _KINDS[packed.dtype]
        q, weights, table = _whole(q).contiguous(), weights.float().contiguous(), table.int().contiguous()
        out = torch.empty(q.shape[0], k, dtype=torch.int32)
        self.handle.nanoglm_select(
            kind, q.data_ptr(), weights.data_ptr(), packed.data_ptr(), table.data_ptr(), table.shape[1],
            _longs(borders), _longs(lengths), len(lengths), q.shape[1], q.shape[2], k, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def sparse_attention(
        self, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
        table: Tensor, page_size: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """As :func:`nanoglm.ops.sparse_attention`."""
        q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
        latent, rope = (x if x.stride(1) == 1 else x.contiguous() for x in (latent, rope))
        selection, requests, table = selection.int().contiguous(), requests.contiguous(), table.int().contiguous()
        out = torch.empty_like(q_latent)
        count, heads, c = q_latent.shape
        self.handle.nanoglm_sparse_attention(
            _bf16(q_latent), q_latent.data_ptr(), q_rope.data_ptr(), latent.data_ptr(), latent.stride(0),
            rope.data_ptr(), rope.stride(0), selection.data_ptr(), requests.data_ptr(), table.data_ptr(),
            table.shape[1], page_size, count, heads, c, rope.shape[1], selection.shape[1], scale, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def sparse_attention_backward(
        self, grad: Tensor, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor,
        requests: Tensor, table: Tensor, page_size: int, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q_latent, q_rope, latent and rope, fp32; bits do not depend on the number of threads."""
        grad, q_latent, q_rope = grad.contiguous(), q_latent.contiguous(), q_rope.contiguous()
        latent, rope = (x if x.stride(1) == 1 else x.contiguous() for x in (latent, rope))
        selection, requests, table = selection.int().contiguous(), requests.contiguous(), table.int().contiguous()
        found = (
            torch.empty_like(q_latent),
            torch.empty_like(q_rope),
            latent.new_zeros(latent.shape),
            rope.new_zeros(rope.shape),
        )
        count, heads, c = q_latent.shape
        self.handle.nanoglm_sparse_attention_backward(
            grad.data_ptr(), q_latent.data_ptr(), q_rope.data_ptr(), latent.data_ptr(), latent.stride(0),
            rope.data_ptr(), rope.stride(0), selection.data_ptr(), requests.data_ptr(), table.data_ptr(),
            table.shape[1], page_size, count, heads, c, rope.shape[1], selection.shape[1], scale,
            *(x.data_ptr() for x in found), torch.get_num_threads(),
        )  # fmt: skip
        return found

    def indexer_kl(
        self, q: Tensor, weights: Tensor, keys: Tensor, queries: Sequence[Tensor], teacher_keys: Sequence[Tensor],
        length: int, before: int, scale: float, selection: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Over a Selection, keys shared by the teachers' heads, fp32; bits do not depend on how many threads run."""
        q, weights, keys, selection = (x.contiguous() for x in (q, weights, keys, selection.int()))
        queries, teacher_keys = ([x.contiguous() for x in each] for each in (queries, teacher_keys))
        grads = torch.empty_like(q), torch.empty_like(weights), torch.zeros_like(keys)
        sums = q.new_empty(q.shape[0], dtype=torch.float64)
        (count, heads, dim), (_, main_heads, main_dim) = q.shape, queries[0].shape
        self.handle.nanoglm_indexer_kl(
            q.data_ptr(), weights.data_ptr(), keys.data_ptr(), count, selection.data_ptr(), heads, dim,
            *(_longs([x.data_ptr() for x in each]) for each in (queries, teacher_keys)), len(queries), main_heads,
            main_dim, selection.shape[1], length, before + length, scale, *(x.data_ptr() for x in (sums, *grads)),
            torch.get_num_threads(),
        )  # fmt: skip
        return sums.sum().float(), *grads

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Routed experts."""
        x, ids, weights = x.contiguous(), ids.long().contiguous(), weights.float().contiguous()
        gate_up, down = gate_up.contiguous(), down.contiguous()
        out = torch.empty_like(x)
        experts, dim, width = down.shape
        gate = gate_up.data_ptr()
        self.handle.nanoglm_experts(
            _bf16(x), x.data_ptr(), ids.data_ptr(), weights.data_ptr(), gate, gate + width * dim * x.element_size(),
            down.data_ptr(), 2 * width * dim, width * dim, x.shape[0], ids.shape[1], experts, dim, width,
            out.data_ptr(), _threads(ids.numel() * dim * width),
        )  # fmt: skip
        return out

    def experts_int8(
        self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor,
        down_scale: Tensor,
    ) -> Tensor:  # fmt: skip
        """Routed experts with int8 weights."""
        wide, ids, weights = x.float().contiguous(), ids.long().contiguous(), weights.float().contiguous()
        gate_up, down = gate_up.contiguous(), down.contiguous()
        gate_up_scale, down_scale = gate_up_scale.contiguous(), down_scale.contiguous()
        out = torch.empty_like(wide)
        experts, dim, width = down.shape
        self.handle.nanoglm_experts_int8(
            wide.data_ptr(), ids.data_ptr(), weights.data_ptr(), gate_up.data_ptr(), gate_up_scale.data_ptr(),
            down.data_ptr(), down_scale.data_ptr(), x.shape[0], ids.shape[1], experts, dim, width, out.data_ptr(),
            _threads(ids.numel() * dim * width),
        )  # fmt: skip
        return out.to(x.dtype)

    def mlp(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """SwiGLU of x [T, D]."""
        x, gate, up, down = x.contiguous(), gate.contiguous(), up.contiguous(), down.contiguous()
        out = torch.empty_like(x)
        dim, width = down.shape
        self.handle.nanoglm_experts(
            _bf16(x), x.data_ptr(), None, None, gate.data_ptr(), up.data_ptr(), down.data_ptr(), 0, 0, x.shape[0], 1, 1,
            dim, width, out.data_ptr(), _threads(x.shape[0] * dim * width),
        )  # fmt: skip
        return out

    def linear(self, x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] with weight [out, in] of its dtype, or fp32 -> [T, out] in x's dtype or fp32."""
        if x.stride(1) != 1:
            x = x.contiguous()
        weight = weight.contiguous()
        (count, inputs), outputs = x.shape, weight.shape[0]
        y = x.new_empty(count, outputs, dtype=dtype)
        kind = _bf16(x) * (1 if x.dtype is weight.dtype else 2)
        self.handle.nanoglm_linear(
            kind, x.data_ptr(), x.stride(0), 0, weight.data_ptr(), inputs, 0, 0, count, 1, inputs, outputs,
            y.data_ptr(), dtype == torch.float32, _threads(count * inputs * outputs),
        )  # fmt: skip
        return y

    def headwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, H, a] with weight [H, a, b] -> [T, H, b]."""
        if x.stride(2) != 1:
            x = x.contiguous()
        if 1 not in weight.stride()[1:]:
            weight = weight.contiguous()
        along = weight.stride(2) == 1
        (count, heads, inputs), outputs = x.shape, weight.shape[2]
        y = x.new_empty(count, heads, outputs)
        self.handle.nanoglm_linear(
            _bf16(x), x.data_ptr(), x.stride(0), x.stride(1), weight.data_ptr(), weight.stride(1 if along else 2),
            weight.stride(0), along, count, heads, inputs, outputs, y.data_ptr(), 0,
            _threads(count * heads * inputs * outputs),
        )  # fmt: skip
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, D] -> the same shape."""
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape)
        self.handle.nanoglm_rms_norm(
            _bf16(x), x.data_ptr(), x.stride(0), weight.data_ptr(), eps, *x.shape, y.data_ptr(), _threads(x.numel())
        )
        return y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, reuse: bool = False) -> Tensor:
        """x [T, I] or [T, H, I] -> the same shape, the first dims rotated."""
        assert 2 * cos.shape[1] <= x.shape[-1], f"RoPE of {2 * cos.shape[1]} dims; there are {x.shape[-1]}"
        if x.stride(-1) != 1:
            x = x.contiguous()
        y = x if reuse and x.is_contiguous() else x.new_empty(x.shape)
        cos, sin = cos.contiguous(), sin.contiguous()
        heads, head_step = (1, 0) if x.ndim == 2 else (x.shape[1], x.stride(1))
        self.handle.nanoglm_rotate(
            _bf16(x), x.data_ptr(), x.stride(0), head_step, cos.data_ptr(), sin.data_ptr(), x.shape[0], heads,
            x.shape[-1], 2 * cos.shape[1], y.data_ptr(), _threads(x.numel()),
        )  # fmt: skip
        return y

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the function of that name."""
        x, dim = x.contiguous(), x.shape[-1]
        y, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:-1])
        self.handle.nanoglm_quantise(
            _bf16(x), x.data_ptr(), scale.numel(), dim, y.data_ptr(), scale.data_ptr(), _threads(x.numel())
        )
        return y, scale

    def append(self, pool: Tensor, keys: Tensor, slots: Tensor) -> None:
        """Keys [T, I] of the pool's dtype, in whole dwords, to rows slots int64 [T] of a packed pool."""
        keys, slots = keys.contiguous(), slots.contiguous()
        count, dwords = keys.shape[0], keys.shape[1] * keys.element_size() // 4
        self.handle.nanoglm_append(
            keys.data_ptr(), slots.data_ptr(), count, dwords, pool.data_ptr(), _threads(keys.numel())
        )

    def write_latent(
        self, pool: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
    ) -> None:
        """kv [T, C + R], normed and rotated, to rows slots int64 [T] of a pool [pages, page_size, C + R]."""
        assert pool.is_contiguous()
        if kv.stride(1) != 1:
            kv = kv.contiguous()
        cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
        latent = weight.shape[0]
        self.handle.nanoglm_write_latent(
            _bf16(kv), kv.data_ptr(), kv.stride(0), weight.data_ptr(), eps, cos.data_ptr(), sin.data_ptr(),
            slots.data_ptr(), kv.shape[0], latent, kv.shape[1] - latent, pool.data_ptr(), _threads(kv.numel()),
        )  # fmt: skip

    def write_index_keys(
        self, pool: Tensor, keys: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor,
        slots: Tensor,
    ) -> None:  # fmt: skip
        """Keys [T, I], normed and rotated, to rows slots int64 [T] of a packed pool of their dtype or int8.

        The norm is torch's, as in training: bits follow from the order in which it adds up.
        """
        assert pool.is_contiguous() and 2 * cos.shape[1] <= keys.shape[1]
        normed = torch.layer_norm(keys.float(), weight.shape, weight.float(), bias.float(), eps)
        cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
        self.handle.nanoglm_write_index_keys(
            _bf16(keys), normed.data_ptr(), cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), *keys.shape,
            2 * cos.shape[1], pool.dtype is torch.uint8, pool.data_ptr(), _threads(keys.numel()),
        )  # fmt: skip

    def top(self, scores: Tensor, k: int) -> Tensor:
        """fp32 [T, n] -> int64 [T, k]."""
        scores = scores.contiguous()
        (count, n), out = scores.shape, torch.empty(scores.shape[0], k, dtype=torch.int64)
        self.handle.nanoglm_top(scores.data_ptr(), count, n, k, out.data_ptr(), _threads(scores.numel() * k))
        return out


@cache
def library(name: str) -> Library | str:
    """The kernels of one instruction set, or one sentence why they are not to be had."""
    file = FOLDER / f"kernels_{name}.so"
    if not file.is_file():
        return f"{name}: not built (no compiler at installation, or it refused)"
    try:
        handle = ctypes.CDLL(str(file))
        for function, signature in _SIGNATURES.items():
            getattr(handle, f"nanoglm_{function}").argtypes = [_TYPES[letter] for letter in signature]
    except (OSError, AttributeError) as error:
        return f"{name}: cannot be loaded ({error})"
    if not handle.nanoglm_supported():
        return f"{name}: this processor does not support it"
    return Library(name, handle)


@cache
def best() -> Library | None:
    """The best library this processor runs; None if there is none."""
    found = (library(name) for name in SETS)
    return next((lib for lib in found if isinstance(lib, Library)), None)


def direct(*tensors: Tensor) -> Library | None:
    """The kernels, if they may be called as plain functions: CPU tensors of one dtype, no gradient, nobody tracing."""
    if torch.compiler.is_compiling():
        return None
    lib, dtype = best(), tensors[0].dtype
    if lib is None or dtype not in DTYPES:
        return None
    gradients = torch.is_grad_enabled()
    for x in tensors:
        if x.dtype is not dtype or not x.is_cpu or type(x) not in _PLAIN or (gradients and x.requires_grad):
            return None
    return lib


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., I] -> int8 of the same shape and fp32 scales [...]: symmetric, the largest value becomes 127."""
    lib = direct(x)
    return lib.quantise(x) if lib else torch_tiled.quantise(x)


def pack(keys: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[N, I] -> blocks of 64 keys in groups of 16, zeros behind the last, as :func:`packed_pool` lays them out."""
    pool = packed_pool(-(-keys.shape[0] // BLOCK), keys.shape[1], dtype or keys.dtype)
    append_packed(pool, keys, torch.arange(keys.shape[0]))
    return pool


def packs(page_size: int, dtype: torch.dtype) -> bool:
    """Whether a pool of such pages is kept packed."""
    return dtype == torch.int8 or best() is not None and page_size == BLOCK and dtype in DTYPES


def packed_pool(pages: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Zeros for 64 keys a page, as the kernels read them.

    fp32 [pages, 4, I, 16]; bf16 [pages, 4, I / 2, 16, 2]; int8 as uint8 [pages, 4, I / 4 + 1, 16, 4]: 128 is
    added to each value, and the last dword of a key is its fp32 scale.
    """
    if dtype == torch.float32:
        return torch.zeros(pages, BLOCK // GROUP, dim, GROUP, dtype=dtype)
    per = 2 if dtype == torch.bfloat16 else 4
    dwords = -(-dim // per) + (per == 4)
    return torch.zeros(pages, BLOCK // GROUP, dwords, GROUP, per, dtype=dtype if per == 2 else torch.uint8)


def append_packed(pool: Tensor, keys: Tensor, slots: Tensor) -> None:
    """Writes keys [T, I] at storage rows slots int64 [T] of a packed pool."""
    if pool.dtype == torch.uint8:
        keys, scale = quantise(keys)
        values = (_whole(keys).to(torch.int16) + 128).to(torch.uint8)
        keys = torch.cat([values, scale[:, None].view(torch.uint8)], 1)
    keys = _whole(keys.to(pool.dtype))
    if lib := best():
        return lib.append(pool, keys, slots)
    if pool.ndim == 5:
        keys = keys.unflatten(1, (-1, pool.shape[4]))
    pool.flatten(0, 1)[slots // GROUP, :, slots % GROUP] = keys


def unpack(pool: Tensor, dim: int) -> Tensor:
    """The keys of a packed pool as rows [pages * 64, I], for the PyTorch backend; int8 as the fp32 it stands for."""
    rows = pool.flatten(0, 1).movedim(1, 2).flatten(0, 1).flatten(1)
    if pool.dtype != torch.uint8:
        return rows[:, :dim]
    scale = rows[:, -4:].contiguous().view(torch.float32)
    return (rows[:, :dim].float() - 128) * scale


# ------------------------------------------------------------------------------- the ops
def select(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int, borders: Sequence[int],
    lengths: Sequence[int], k: int,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.select`. A packed pool is read as it lies, rows of keys are packed first."""
    lib = best()
    if lib is not None and keys.ndim > 3:
        tally_pairs(borders, lengths)
        q = q if keys.dtype == torch.uint8 else q.to(keys.dtype)
        return lib.select(q, weights, keys, table, borders, lengths, k)
    if keys.dtype == torch.uint8:
        values, scale = quantise(q)
        q, weights, keys = values.float(), weights.float() * scale, unpack(keys, q.shape[-1])[:, None]
    keys = keys.flatten(0, -2)
    if lib is None or keys.dtype not in DTYPES or q.dtype != keys.dtype:
        return torch_tiled.select(q, weights, keys, table, page_size, borders, lengths, k)
    tally_pairs(borders, lengths)
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


def sparse_attention_backward(
    grad: Tensor, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
    table: Tensor, page_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`nanoglm.ops.torch_tiled.sparse_attention_backward`; fp32 alone has a kernel."""
    lib, floats = best(), (grad, q_latent, q_rope, latent, rope)
    alike = all(x.dtype is torch.float32 for x in floats)
    run = torch_tiled.sparse_attention_backward if lib is None or not alike else lib.sparse_attention_backward
    return run(grad, q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale)


def indexer_kl(
    q: Tensor, weights: Tensor, keys: Tensor, queries: Sequence[Tensor], teacher_keys: Sequence[Tensor], length: int,
    before: int, scale: float, selection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`nanoglm.ops.kl.indexer_kl`; fp32 over a Selection with absorbed teachers has a kernel."""
    lib = best()
    alike = all(x.dtype is torch.float32 for x in (q, weights, keys, *queries, *teacher_keys))
    if lib is None or selection is None or not alike or any(x.ndim == 3 for x in teacher_keys):
        return kl.indexer_kl(q, weights, keys, queries, teacher_keys, length, before, scale, selection)
    return lib.indexer_kl(q, weights, keys, queries, teacher_keys, length, before, scale, selection)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As :func:`nanoglm.ops.experts`."""
    lib, alike = best(), x.dtype in DTYPES and x.dtype == gate_up.dtype == down.dtype
    run = torch_tiled.experts if lib is None or not alike else lib.experts
    return run(x, ids, weights, gate_up, down)


def experts_int8(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """As :func:`nanoglm.ops.experts_int8`."""
    run = torch_tiled.experts_int8 if (lib := best()) is None else lib.experts_int8
    return run(x, ids, weights, gate_up, gate_up_scale, down, down_scale)


def _whole(x: Tensor) -> Tensor:
    """Zeros behind the last dim, to whole dwords."""
    missing = -x.shape[-1] % (4 // x.element_size())
    return F.pad(x, (0, missing)) if missing else x


def _bf16(x: Tensor) -> int:
    return int(x.dtype is torch.bfloat16)


def _threads(products: int) -> int:
    return 1 if products < _FEW_PRODUCTS else torch.get_num_threads()


def _longs(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
