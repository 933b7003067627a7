"""The ops: the only place that knows hardware.

One name and one signature each, registered with ``torch.library`` under ``nanoglm::`` with fake
and autograd, so devices, ``torch.compile`` and autograd work as PyTorch users expect. A backend
registers a kernel for its device under the same name; ``torch_tiled`` serves every other device,
and ``reference`` is each op's specification in the obvious form, for tests.

Ops return new tensors and alias no input. Those under *cache* mutate a pool; :func:`rotate` may take an input's memory
where it is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nanoglm.errors import InputError
from nanoglm.ops import cpu, kl, torch_tiled
from nanoglm.ops.batch import Batch
from nanoglm.ops.cpu import quantise
from nanoglm.ops.kl import attention as attention_of
from nanoglm.ops.torch_tiled import dense_attention, layer_norm, sigmoid, silu, wide
from nanoglm.ops.work import Work, count_work

__all__ = [
    "Batch", "Work", "attention_of", "cache_append", "captures", "count_work", "dense_attention", "experts",
    "experts_int8", "headwise", "index_append", "index_pool", "indexer_kl", "layer_norm", "linear", "linear_fp32",
    "mlp", "quantise", "rms_norm", "rotate", "scratch", "select", "sigmoid", "silu", "sparse_attention", "top", "wide",
    "write_index_keys", "write_latent",
]  # fmt: skip


# ------------------------------------------------------------------------------ GPUs
@cache
def _triton() -> ModuleType | None:
    """The kernels for CUDA and ROCm; None where Triton is not installed. Nothing imports it before it is needed."""
    try:
        return import_module("nanoglm.ops.triton.dispatch")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


def _gpu(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """An op on such a device: the kernel of that name, else its plain version."""

    def run(*arguments: Any) -> Any:
        kernels = _triton()
        with torch.cuda.device_of(arguments[0]):  # Triton launches on whichever is current
            return (getattr(kernels, name) if kernels else plain)(*arguments)

    return run


def captures(weight: Tensor) -> bool:
    """Whether the ops of a model with such weights never wait for the device: its passes can be captured as a graph."""
    return weight.is_cuda and (kernels := _triton()) is not None and weight.dtype in kernels.DTYPES


def scratch(device: torch.device) -> int:
    """Bytes that an op holds at most beside what it takes and returns, where that is much."""
    return int(kernels.scratch()) if device.type == "cuda" and (kernels := _triton()) else 0


def _beside(x: Tensor) -> ModuleType | None:
    """The kernels, where x lies on a GPU and nobody traces, for what is no registered op."""
    return None if torch.compiler.is_compiling() or not x.is_cuda else _triton()


def _gpu_rows(*tensors: Tensor) -> Any:
    """The kernels for rows by themselves, where these tensors have some; a compiler fuses the plain forms itself."""
    return kernels.direct(*tensors) if (kernels := _beside(tensors[0])) else None


# ------------------------------------------------------------------------------ rows by themselves
# Composites of PyTorch's own operators for autograd and tracing; plain inference on a CPU has kernels.
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] with weight [out, in] -> [T, out]; a row's bits do not depend on T."""
    lib = cpu.direct(x, weight)
    return lib.linear(x, weight) if lib else torch_tiled.linear(x, weight)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """The same with exact products, sums and result in fp32 whatever the dtypes."""
    lib = cpu.direct(x) and cpu.direct(weight)
    if x.dtype is not weight.dtype is not torch.float32:
        lib = None
    return lib.linear(x, weight, torch.float32) if lib else torch_tiled.linear(wide(x), wide(weight))


def headwise(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, a] with weight [H, a, b] -> [T, H, b]; a row's bits do not depend on T."""
    lib = cpu.direct(x, weight)
    return lib.headwise(x, weight) if lib else torch_tiled.headwise(x, weight)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU, (silu(x gateᵀ) * (x upᵀ)) downᵀ: x [T, D], gate and up [W, D], down [D, W] -> [T, D]."""
    if lib := cpu.direct(x, gate, up, down):
        return lib.mlp(x, gate, up, down)
    if rows := _gpu_rows(x, gate, up, down):
        return linear(rows.swiglu(linear(x, gate), linear(x, up)), down)
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * x / sqrt(mean(x²) + eps) over the last of two dims, in fp32, cast once (architecture spec 2.2)."""
    lib = cpu.direct(x, weight) or _gpu_rows(x, weight)
    return lib.rms_norm(x, weight, eps) if lib else torch_tiled.rms_norm(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, reuse: bool = False) -> Tensor:
    """Interleaved RoPE in fp32, in place of its pair, of the first R dims of x [T, ...] or [T, H, ...]; cos and sin are
    fp32 [T, R / 2]. Further dims stay. reuse: x is needed no more, and may become the result."""
    lib = cpu.direct(x) or _gpu_rows(x)
    return lib.rotate(x, cos, sin, reuse) if lib else torch_tiled.rotate(x, cos, sin)


def top(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest fp32 scores [T, n] under the total tie rule, best first: int64 [T, k]."""
    lib = cpu.direct(scores) if scores.dtype is torch.float32 else None
    return lib.top(scores, k) if lib else torch_tiled.top(scores, k)


# ------------------------------------------------------------------------------ selection
@torch.library.custom_op("nanoglm::select", mutates_args=())
def _select(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int,
    borders: Sequence[int], lengths: Sequence[int], k: int, requests: Tensor, positions: Tensor,
) -> Tensor:  # fmt: skip
    return torch_tiled.select(q, weights, keys.flatten(0, -2), table, page_size, borders, lengths, k)


_select.register_kernel("cpu")(lambda *arguments: cpu.select(*arguments[:8]))
_select.register_kernel("cuda")(_gpu("select", lambda *arguments: torch_tiled.select(*arguments[:8])))


@_select.register_fake
def _(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int,
    borders: Sequence[int], lengths: Sequence[int], k: int, requests: Tensor, positions: Tensor,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], k, dtype=torch.int32)


def select(q: Tensor, weights: Tensor, keys: Tensor, batch: Batch, k: int) -> Tensor:
    """The Selection of each row: its k best-scoring visible positions (architecture spec 2.6).

    Args:
        q: [T, J, I] indexer queries after RoPE. weights: fp32 [T, J], scales folded in.
        keys: [N, I] index keys in storage rows, or a pool of :func:`index_pool`; this batch's own are written.
        k: width of the Selection (``index_topk``), whatever the length.

    Returns:
        int32 [T, k], logical positions ascending, -1 after the valid ones. No gradient.
    """
    q, weights, keys = q.detach(), weights.detach(), keys.detach()
    arguments = q, weights, keys, batch.table, batch.page_size, batch.borders, batch.lengths, k
    return cpu.select(*arguments) if cpu.direct(q) else _select(*arguments, batch.requests, batch.positions)


# ------------------------------------------------------------------------------ attention
@torch.library.custom_op("nanoglm::sparse_attention", mutates_args=())
def _sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
    table: Tensor, page_size: int, scale: float, rows: Tensor | None = None, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch_tiled.sparse_attention(q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale)


_sparse_attention.register_kernel("cpu")(lambda *arguments: cpu.sparse_attention(*arguments[:9]))
_sparse_attention.register_kernel("cuda")(
    _gpu("sparse_attention", lambda *arguments: torch_tiled.sparse_attention(*arguments[:9]))
)


@_sparse_attention.register_fake
def _(q_latent: Tensor, *_: Any) -> Tensor:
    return q_latent.new_empty(q_latent.shape)


@torch.library.custom_op("nanoglm::sparse_attention_backward", mutates_args=())
def _sparse_attention_backward(
    grad: Tensor, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor,
    requests: Tensor, table: Tensor, page_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch_tiled.sparse_attention_backward(
        grad, q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale
    )


_sparse_attention_backward.register_kernel("cpu")(cpu.sparse_attention_backward)
_sparse_attention_backward.register_kernel("cuda")(
    _gpu("sparse_attention_backward", torch_tiled.sparse_attention_backward)
)


@_sparse_attention_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs[:4])


def _sparse_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.page_size, ctx.scale = inputs[7:9]


def _sparse_attention_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = _sparse_attention_backward(grad, *ctx.saved_tensors, ctx.page_size, ctx.scale)
    return *grads, *[None] * 7


_sparse_attention.register_autograd(_sparse_attention_grad, setup_context=_sparse_attention_setup)


@torch.library.custom_op("nanoglm::locate", mutates_args=(), device_types="cuda")
def _locate(selection: Tensor, requests: Tensor, table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Storage rows of a Selection, -1 at empty places, int32 [T, K], and how many each row has, int32 [T]."""
    kernels = _triton()
    assert kernels is not None
    with torch.cuda.device_of(selection):
        found: tuple[Tensor, Tensor] = kernels.locate(selection, requests, table, page_size)
    return found


@_locate.register_fake
def _(selection: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(selection, dtype=torch.int32), selection.new_empty(len(selection), dtype=torch.int32)


def _located(selection: Tensor, batch: Batch, *floats: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What a GPU's kernel reads in place of the Selection, once for all layers that share it; None where there is no
    kernel, and for compilers, which would take what the batch remembers for a constant."""
    kernels = _beside(floats[0])
    return batch.located(selection, _locate) if kernels and kernels.alike(*floats) else (None, None)


def sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, batch: Batch, scale: float
) -> Tensor:
    """Absorbed MLA over the selected rows only (architecture spec 2.5).

    Args:
        q_latent: [T, H, C]. q_rope: [T, H, R]. latent: [N, C] and rope: [N, R] in storage rows.
        selection: int32 [T, K]; rows outside it are not read.
        scale: ``qk_head_dim ** -0.5``, also in this absorbed form.

    Returns:
        [T, H, C], the attended latent. Differentiable in the four float inputs.
    """
    floats = q_latent, q_rope, latent, rope
    arguments = *floats, selection, batch.requests, batch.table, batch.page_size, scale
    if cpu.direct(*floats):
        return cpu.sparse_attention(*arguments)
    return _sparse_attention(*arguments, *_located(selection, batch, *floats))


# ------------------------------------------------------------------------------ the indexers' loss
@torch.library.custom_op("nanoglm::indexer_kl", mutates_args=())
def _indexer_kl(
    q: Tensor, weights: Tensor, keys: Tensor, queries: Sequence[Tensor], teacher_keys: Sequence[Tensor], length: int,
    before: int, scale: float, selection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return kl.indexer_kl(q, weights, keys, queries, teacher_keys, length, before, scale, selection)


_indexer_kl.register_kernel("cpu")(cpu.indexer_kl)
_indexer_kl.register_kernel("cuda")(_gpu("indexer_kl", kl.indexer_kl))


@_indexer_kl.register_fake
def _(q: Tensor, weights: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (q, weights, keys)]
    return grads[0].new_empty(()), *grads


def indexer_kl(
    q: Tensor, weights: Tensor, keys: Tensor, queries: Sequence[Tensor], teacher_keys: Sequence[Tensor], length: int,
    before: int, scale: float, selection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """KL(p || softmax(I)) of index scores I against teachers' attention p, with its gradients by q, weights and keys;
    see :func:`nanoglm.ops.kl.indexer_kl`, which is also its plain form. Nothing of it is differentiable."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _indexer_kl(
        q.detach(), weights.detach(), keys.detach(), list(queries), list(teacher_keys), length, before, scale, selection
    )
    return found


# ------------------------------------------------------------------------------ experts
@torch.library.custom_op("nanoglm::experts", mutates_args=())
def _experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch_tiled.experts(x, ids, weights, gate_up, down)


_experts.register_kernel("cpu")(cpu.experts)
_experts.register_kernel("cuda")(_gpu("experts", torch_tiled.experts))


@_experts.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("nanoglm::experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch_tiled.experts_backward(grad, x, ids, weights, gate_up, down)


_experts_backward.register_kernel("cuda")(_gpu("experts_backward", torch_tiled.experts_backward))


@_experts_backward.register_fake
def _(grad: Tensor, x: Tensor, ids: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, *inputs))


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _experts_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    d_x, d_weights, d_gate_up, d_down = _experts_backward(grad, *ctx.saved_tensors)
    return d_x, None, d_weights, d_gate_up, d_down


_experts.register_autograd(_experts_grad, setup_context=_experts_setup)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Routed SwiGLU experts, grouped by expert inside (architecture spec 2.9).

    x [T, D], ids int64 [T, k], weights fp32 [T, k], gate_up [E, 2W, D] (gate rows first),
    down [E, D, W] -> [T, D]. Differentiable in all but ids.
    """
    run = cpu.experts if cpu.direct(x, gate_up, down) and not weights.requires_grad else _experts
    return run(x, ids, weights, gate_up, down)


@torch.library.custom_op("nanoglm::experts_int8", mutates_args=())
def experts_int8(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """The same with int8 weights, made for decoding; inference only.

    gate_up int8 [E, 2W, D] with fp32 scales [E, 2W], down int8 [E, D, W] with scales [E, D]: a scale per output
    (:func:`quantise` makes them). Activations are quantised the same way, row by row, before each product.
    """
    return torch_tiled.experts_int8(x, ids, weights, gate_up, gate_up_scale, down, down_scale)


experts_int8.register_kernel("cpu")(cpu.experts_int8)


@experts_int8.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


# ------------------------------------------------------------------------------ cache
@torch.library.custom_op("nanoglm::cache_append", mutates_args=("pool",))
def _cache_append(pool: Tensor, values: Tensor, slots: Tensor) -> None:
    torch_tiled.cache_append(pool, values, slots)


@_cache_append.register_fake
def _(pool: Tensor, values: Tensor, slots: Tensor) -> None:
    return None


def cache_append(pool: Tensor, values: Tensor, slots: Tensor) -> None:
    """Writes values [T, dim] into pool [pages, page_size, dim] at storage rows slots int64 [T]."""
    run = torch_tiled.cache_append if cpu.direct(pool, values) else _cache_append
    run(pool, values, slots)


def index_pool(
    pages: int, page_size: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Room for index keys [pages, ...] in the layout that scoring reads fastest there; only ops know it.

    With dtype int8 (CPU) or float8_e4m3fn (GPUs that have it), keys are quantised one by one as they are written, and
    queries when they score: a little less exact, half the size of bf16 and faster. Raises InputError elsewhere.
    """
    kind, whole = torch.device(device).type, page_size == cpu.BLOCK
    if dtype == torch.int8 and not (kind == "cpu" and whole):
        raise InputError(
            f"int8 index keys with pages of {page_size} on {device}; expected pages of {cpu.BLOCK} on the CPU"
        )
    if dtype == torch.float8_e4m3fn:
        kernels = _triton() if kind == "cuda" else None
        if not (kernels and whole and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)):
            raise InputError(
                f"FP8 index keys with pages of {page_size} on {device}; expected pages of {cpu.BLOCK} on an NVIDIA GPU "
                "of compute capability 8.9 or later, with Triton"
            )
        pool: Tensor = kernels.index_pool(pages, page_size, dim, device)
        return pool
    if torch.device(device).type == "cpu" and cpu.packs(page_size, dtype):
        return cpu.packed_pool(pages, dim, dtype)
    return torch.zeros(pages, page_size, dim, dtype=dtype, device=device)


@torch.library.custom_op("nanoglm::index_append", mutates_args=("pool",))
def _index_append(pool: Tensor, keys: Tensor, slots: Tensor) -> None:
    if pool.is_cuda and pool.dtype == torch.uint8 and (kernels := _triton()):
        kernels.index_append(pool, keys, slots)
        return
    (torch_tiled.cache_append if pool.ndim == 3 else cpu.append_packed)(pool, keys, slots)


@_index_append.register_fake
def _(pool: Tensor, keys: Tensor, slots: Tensor) -> None:
    return None


def index_append(pool: Tensor, keys: Tensor, slots: Tensor) -> None:
    """Writes index keys [T, I] into a pool of :func:`index_pool` at storage rows slots int64 [T]."""
    run = cpu.append_packed if cpu.direct(keys) and pool.ndim > 3 else _index_append
    run(pool, keys, slots)


# What attention and indexers keep of a token, from their projections to the pool. Registered for those who trace; run,
# they take a kernel where one serves, else the ops they consist of.
@torch.library.custom_op("nanoglm::write_latent", mutates_args=("pool",))
def _write_latent(
    pool: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:  # fmt: skip
    if kernels := cpu.direct(pool, kv, weight) or _gpu_rows(pool, kv, weight):
        kernels.write_latent(pool, kv, weight, eps, cos, sin, slots)
        return
    latent, rope = kv.split([len(weight), kv.shape[1] - len(weight)], 1)
    cache_append(pool, torch.cat([rms_norm(latent, weight, eps), rotate(rope, cos, sin)], 1), slots)


@_write_latent.register_fake
def _(pool: Tensor, *_: Any) -> None:
    return None


def write_latent(
    pool: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:  # fmt: skip
    """:func:`rms_norm` of the first C of kv [T, C + R] by weight [C], :func:`rotate` of the last R by cos and sin
    fp32 [T, R / 2], and :func:`cache_append` to pool [pages, page_size, C + R] at storage rows slots int64 [T], in one.
    No gradient; on a CPU the same bits (architecture spec 2.4, steps 3 and 4)."""
    kernels = cpu.direct(pool, kv, weight) or _gpu_rows(pool, kv, weight)
    (kernels.write_latent if kernels else _write_latent)(pool, kv, weight, eps, cos, sin, slots)


@torch.library.custom_op("nanoglm::write_index_keys", mutates_args=("pool",))
def _write_index_keys(
    pool: Tensor, keys: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:
    if kernels := _index_kernels(pool, keys, weight, bias):
        kernels.write_index_keys(pool, keys, weight, bias, eps, cos, sin, slots)
        return
    index_append(pool, rotate(layer_norm(keys, weight, bias, eps), cos, sin, reuse=True), slots)


@_write_index_keys.register_fake
def _(pool: Tensor, *_: Any) -> None:
    return None


def write_index_keys(
    pool: Tensor, keys: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:
    """:func:`layer_norm` of keys [T, I] by weight and bias [I], :func:`rotate` of their *first* R dims by cos and sin
    fp32 [T, R / 2], and :func:`index_append` to a pool of :func:`index_pool` at storage rows slots int64 [T], in one.
    No gradient; on a CPU the same bits (architecture spec 2.6, steps 2 and 3)."""
    kernels = _index_kernels(pool, keys, weight, bias)
    (kernels.write_index_keys if kernels else _write_index_keys)(pool, keys, weight, bias, eps, cos, sin, slots)


def _index_kernels(pool: Tensor, keys: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """Those that write such keys into such a pool: of their dtype or quantised; on a CPU a packed one."""
    if pool.dtype not in (keys.dtype, torch.uint8):
        return None
    return (cpu.direct(keys, weight, bias) if pool.ndim > 3 else None) or _gpu_rows(keys, weight, bias)
