"""The indexers' loss with its gradient in one pass over the rows, plain PyTorch in chunks, on any device.

Shape legend: B sequences, L rows of each, T = B * L, S = before + L keys of each, J indexer heads, I index dim,
H heads, A head dim, K selected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglm.ops.torch_tiled import wide

CHUNK_ELEMENTS = 1 << 24  # of scores held at once
Teachers = Sequence[tuple[Tensor, Tensor]]


def indexer_kl(
    q: Tensor, weights: Tensor, keys: Tensor, queries: Sequence[Tensor], teacher_keys: Sequence[Tensor], length: int,
    before: int, scale: float, selection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """KL(p || softmax(I)) summed over rows, p being the mean of the teachers' attention, I the index scores.

    Args:
        q: [T, J, I]. weights: [T, J]. keys: [B * S, I].
        queries, teacher_keys: of each teacher [T, H, A] and [B * S, H, A], or [B * S, A] if all heads share them.
        length: L. before: tokens of each sequence before its L rows. scale: of the teachers' softmax.
        selection: int32 [T, K], the keys over which both are distributions; None: all that a row sees.

    Returns:
        The sum and its gradients by q, weights and keys, from d/dI = softmax(I) - p; fp32 or wider.
    """
    q, w = (wide(x.detach()).unflatten(0, (-1, length)) for x in (q, weights))
    k = wide(keys.detach()).unflatten(0, (-1, before + length))
    teachers = [
        (wide(x.detach()).unflatten(0, (-1, length)), wide(y.detach()).unflatten(0, k.shape[:2]))
        for x, y in zip(queries, teacher_keys, strict=True)
    ]
    chosen = None if selection is None else selection.unflatten(0, (-1, length)).long()
    step = max(1, CHUNK_ELEMENTS // (q.shape[0] * _row(q, teachers, before + length, chosen)))
    total, (dq, dw, dk) = q.new_zeros(()), (torch.zeros_like(x) for x in (q, w, k))
    sequence = torch.arange(q.shape[0], device=q.device)[:, None, None]
    positions = torch.arange(before + length, device=q.device)
    for begin in range(0, length, step):
        end = min(begin + step, length)
        if chosen is None:
            mask, at = (positions[: before + end] <= positions[before + begin : before + end, None])[None], None
            seen = k[:, : before + end]  # [B, S, I]
        else:
            at = chosen[:, begin:end]
            mask, at = at >= 0, at.clamp(min=0)
            seen = k[sequence, at]  # [B, t, K, I]
        dots = _products(q[:, begin:end], seen.mT).relu()  # [B, t, J, S]
        scores = (w[:, begin:end, None] @ dots).squeeze(2)
        log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
        p = attention(teachers, begin, end, scale, mask, at)
        total += torch.where(p > 0, p * (p.clamp(min=1e-30).log() - log_q), 0.0).sum()
        d = log_q.exp() - p  # both 0 where nothing is seen
        dw[:, begin:end] = (dots @ d[..., None]).squeeze(-1)
        d_dots = d[:, :, None] * w[:, begin:end, :, None] * (dots > 0)
        dq[:, begin:end] = _products(d_dots, seen)
        if at is None:
            dk[:, : before + end] += d_dots.flatten(1, 2).mT @ q[:, begin:end].flatten(1, 2)
        else:
            rows = (at + sequence * k.shape[1]).flatten()
            dk.flatten(0, 1).index_add_(0, rows, (d_dots.mT @ q[:, begin:end]).flatten(0, 2))
    return total, dq.flatten(0, 1), dw.flatten(0, 1), dk.flatten(0, 1)


def _products(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [B, t, J, a] with a matrix of each row, [B, t, a, b], or of each sequence, [B, a, b]: [B, t, J, b]."""
    if matrix.ndim == 4:
        return rows @ matrix
    return (rows.flatten(1, 2) @ matrix).unflatten(1, rows.shape[1:3])  # broadcast, it would be copied for each row


def attention(teachers: Teachers, begin: int, end: int, scale: float, mask: Tensor, at: Tensor | None) -> Tensor:
    """Mean over layers and heads of the attention of rows [begin, end) to what they see: [B, t, S or K].

    Args:
        teachers: per layer queries [B, L, H, A] and keys [B, L, H, A], or [B, L, A] if all heads share them.
        mask: which of the first S keys, or of the K places of ``at``, a row sees.
        at: positions of K selected keys, [B, t, K]; the first S if None.
    """
    mean: Tensor | None = None
    for queries, keys in teachers:
        if keys.ndim == 3 and at is not None:  # one key for all heads: gather those that are selected
            sequence = torch.arange(len(keys), device=keys.device)[:, None, None]
            logits = (queries[:, begin:end] @ keys[sequence, at].mT).transpose(1, 2)  # [B, H, t, K]
        else:
            q = queries[:, begin:end].transpose(1, 2)  # [B, H, t, A]
            k = keys[:, None] if keys.ndim == 3 else keys.transpose(1, 2)
            logits = q @ k[:, :, : mask.shape[-1] if at is None else None].mT
            if at is not None:
                logits = logits.gather(-1, at[:, None].expand(*logits.shape[:3], -1))
        p = (logits * scale).masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1) / len(teachers)
        mean = p if mean is None else mean + p
    assert mean is not None
    return mean


def _row(q: Tensor, teachers: Teachers, length: int, chosen: Tensor | None) -> int:
    """The most elements that one row of a chunk takes: scores of every head, or the keys that it gathered."""
    heads = max(q.shape[2], *(x.shape[2] for x, _ in teachers))
    if chosen is None or any(keys.ndim == 4 for _, keys in teachers):
        return length * heads
    return chosen.shape[2] * max(heads, q.shape[3], *(x.shape[3] for x, _ in teachers))
