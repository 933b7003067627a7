"""Each op's specification in the obvious form: loops and T x S tensors, tests only.

The signatures are those of the public ops, so a test calls both with the same arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.ops.batch import Batch


def select(q: Tensor, weights: Tensor, keys: Tensor, batch: Batch, k: int) -> Tensor:
    """Scores every visible key, sorts by (score descending, position ascending), keeps k."""
    out = torch.full((q.shape[0], k), -1, dtype=torch.int32)
    for row in range(q.shape[0]):
        visible = _visible_rows(row, batch)
        scores = (weights[row] @ (q[row].float() @ keys[visible].float().T).relu()) + 0.0
        best = sorted(range(len(visible)), key=lambda s: (-float(scores[s]), s))[:k]
        out[row, : len(best)] = torch.tensor(sorted(best), dtype=torch.int32)
    return out


def sparse_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, selection: Tensor, batch: Batch, scale: float
) -> Tensor:
    """Softmax over all visible keys with the unselected masked out; differentiable."""
    rows = []
    for row in range(q_latent.shape[0]):
        visible = _visible_rows(row, batch)
        chosen = [int(s) for s in selection[row] if s >= 0]
        c, r = latent[visible].float(), rope[visible].float()
        scores = (q_latent[row].float() @ c.T + q_rope[row].float() @ r.T) * scale
        mask = torch.full((len(visible),), -torch.inf)
        mask[chosen] = 0.0
        rows.append((scores + mask).softmax(-1) @ c)
    return torch.stack(rows).to(q_latent.dtype)


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, choice by choice; differentiable."""
    rows = []
    for row in range(x.shape[0]):
        total = torch.zeros(x.shape[1])
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            gate, up = (gate_up[expert].float() @ x[row].float()).chunk(2)
            total = total + weight * (down[expert].float() @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows).to(x.dtype)


def experts_int8(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """The experts that the int8 weights stand for, on x as it is: what quantising activations is measured against."""
    return experts(x, ids, weights, gate_up * gate_up_scale[..., None], down * down_scale[..., None])


def write_latent(
    pool: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:  # fmt: skip
    """Token by token."""
    for row, slot in enumerate(slots.tolist()):
        latent, rope = kv[row, : len(weight)].float(), kv[row, len(weight) :].float()
        normed = weight.float() * latent / (latent.square().mean() + eps).sqrt()
        pool.view(-1, kv.shape[1])[slot] = torch.cat([normed, _turned(rope, cos[row], sin[row])])


def write_index_keys(
    pool: Tensor, keys: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor
) -> None:
    """Token by token, into a pool [pages, page_size, I]."""
    for row, slot in enumerate(slots.tolist()):
        key = keys[row].float() - keys[row].float().mean()
        key = weight.float() * key / (key.square().mean() + eps).sqrt() + bias.float()
        rope = 2 * cos.shape[1]
        pool.view(-1, keys.shape[1])[slot] = torch.cat([_turned(key[:rope], cos[row], sin[row]), key[rope:]])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs as complex numbers, turned by their angles."""
    return torch.view_as_real(torch.complex(x[0::2], x[1::2]) * torch.complex(cos, sin)).flatten()


def _visible_rows(row: int, batch: Batch) -> list[int]:
    """Storage rows of the positions a batch row may see: its own and all before it."""
    request = int(batch.requests[row])
    size = batch.page_size
    return [int(batch.table[request, p // size]) * size + p % size for p in range(int(batch.positions[row]) + 1)]
