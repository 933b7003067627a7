"""The ops on a GPU: which tensors have a Triton kernel; the plain PyTorch versions answer for all others."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from nanoglm.ops import kl, torch_tiled
from nanoglm.ops.triton import attention, attention_backward, rows
from nanoglm.ops.triton import experts as moe
from nanoglm.ops.triton import kl as loss
from nanoglm.ops.triton import select as scoring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def alike(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that kernels serve."""
    return tensors[0].dtype in DTYPES and all(x.dtype is tensors[0].dtype for x in tensors)


def scratch() -> int:
    """Bytes that scoring holds at most: scores, as many places, and of at least 8 neighbours the best."""
    return 8 * scoring.SCRATCH + 4 * scoring.SCRATCH // 8


def direct(*tensors: Tensor) -> ModuleType | None:
    """The kernels of :mod:`rows`, if no gradient is asked for."""
    if not alike(*tensors):
        return None
    return None if torch.is_grad_enabled() and any(x.requires_grad for x in tensors) else rows


def select(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int, borders: Sequence[int],
    lengths: Sequence[int], k: int, requests: Tensor, positions: Tensor,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.select`."""
    if keys.dtype != torch.uint8 and not alike(q, keys):
        return torch_tiled.select(q, weights, keys.flatten(0, -2), table, page_size, borders, lengths, k)
    return scoring.select(q, weights, keys, table, page_size, borders, lengths, k, requests, positions)


def sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
    table: Tensor, page_size: int, scale: float, rows: Tensor | None = None, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.sparse_attention`; rows and counts from :func:`locate`, if they are known."""
    arguments = q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale
    if not alike(*arguments[:4]):
        return torch_tiled.sparse_attention(*arguments)
    return attention.sparse_attention(*arguments, rows, counts)


def locate(selection: Tensor, requests: Tensor, table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """As :func:`nanoglm.ops.triton.attention.rows_of`."""
    return attention.rows_of(selection, requests, table, page_size)


def sparse_attention_backward(
    grad: Tensor, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor,
    requests: Tensor, table: Tensor, page_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`nanoglm.ops.torch_tiled.sparse_attention_backward`."""
    served = alike(grad, q_latent, q_rope, latent, rope)
    run = attention_backward.sparse_attention_backward if served else torch_tiled.sparse_attention_backward
    return run(grad, q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale)


def indexer_kl(
    q: Tensor, weights: Tensor, keys: Tensor, queries: Sequence[Tensor], teacher_keys: Sequence[Tensor], length: int,
    before: int, scale: float, selection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`nanoglm.ops.kl.indexer_kl`."""
    served = all(x.dtype in DTYPES for x in (q, weights, keys, *queries, *teacher_keys))
    run = loss.indexer_kl if served else kl.indexer_kl
    return run(q, weights, keys, queries, teacher_keys, length, before, scale, selection)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As :func:`nanoglm.ops.experts`."""
    run = moe.experts if alike(x, gate_up, down) else torch_tiled.experts
    return run(x, ids, weights, gate_up, down)


def experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`nanoglm.ops.torch_tiled.experts_backward`."""
    run = moe.experts_backward if alike(grad, x, gate_up, down) else torch_tiled.experts_backward
    return run(grad, x, ids, weights, gate_up, down)


def index_pool(pages: int, page_size: int, dim: int, device: torch.device | str) -> Tensor:
    """Room for FP8 index keys."""
    return scoring.fp8_pool(pages, page_size, dim, device)


def index_append(pool: Tensor, keys: Tensor, slots: Tensor) -> None:
    """Writes into a pool of :func:`index_pool`."""
    scoring.append_fp8(pool, keys, slots)
