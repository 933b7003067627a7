"""The ops on a GPU: which tensors have a Triton kernel; the plain PyTorch versions answer for all others."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from nanoglm.ops import torch_tiled
from nanoglm.ops.triton import attention, rows
from nanoglm.ops.triton import select as scoring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def alike(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that kernels serve."""
    return tensors[0].dtype in DTYPES and all(x.dtype is tensors[0].dtype for x in tensors)


def direct(*tensors: Tensor) -> ModuleType | None:
    """The kernels of :mod:`rows`, if no gradient is asked for and nobody traces."""
    if torch.compiler.is_compiling() or not alike(*tensors):
        return None
    return None if torch.is_grad_enabled() and any(x.requires_grad for x in tensors) else rows


def select(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, page_size: int, borders: Sequence[int],
    lengths: Sequence[int], k: int, requests: Tensor, positions: Tensor,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.select`."""
    if not alike(q, keys):
        return torch_tiled.select(q, weights, keys.flatten(0, -2), table, page_size, borders, lengths, k)
    return scoring.select(q, weights, keys, table, page_size, borders, lengths, k, requests, positions)


def sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, requests: Tensor,
    table: Tensor, page_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """As :func:`nanoglm.ops.sparse_attention`."""
    served = alike(q_latent, q_rope, latent, rope)
    run = attention.sparse_attention if served else torch_tiled.sparse_attention
    return run(q_latent, q_rope, latent, rope, selection, requests, table, page_size, scale)
