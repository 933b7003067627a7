"""Training losses, in fp32, each a (sum, count) pair so that parts add exactly.

Shape legend: B sequences, L length, T = B * L rows, H heads, J indexer heads, A head dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.model import GLM, Output
from nanoglm.model.indexer import IndexerInputs

IGNORE = -100


def cross_entropy(model: GLM, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, int]:
    """Next-token loss in nats; targets of -100 count nothing."""
    logits = model.logits(hidden_TD).float()
    return F.cross_entropy(logits, targets_T, ignore_index=IGNORE, reduction="sum"), int((targets_T >= 0).sum())


def mtp(model: GLM, output: Output, ids_BL: Tensor, depths: int) -> tuple[Tensor, int]:
    """MTP loss over several uses of the one layer, with the keys and Selection of step 0 as in decoding.

    Row t of depth j stands at position t + j, reads token t + 1 + j and predicts token t + 2 + j.
    """
    total, count = output.hidden.new_zeros(()), 0
    hidden, selection = output.hidden, None
    for depth in range(depths):
        following = F.pad(ids_BL[:, 1 + depth :], (0, 1 + depth)).flatten()
        targets = F.pad(ids_BL[:, 2 + depth :], (0, 2 + depth), value=IGNORE).flatten()
        hidden, selection = model.draft(following, hidden, output.step, depth=depth, selection=selection)
        loss, n = cross_entropy(model, hidden, targets)
        total, count = total + loss, count + n
    return total, count


def groups(full_layers: Sequence[int], layers: int) -> dict[int, range]:
    """Each Full layer with the layers it serves: itself and the Shared layers up to the next one."""
    ends = [*full_layers[1:], layers]
    return {first: range(first, end) for first, end in zip(full_layers, ends, strict=True)}


def indexer_kl(
    inputs: IndexerInputs,
    served: Sequence[tuple[Tensor, Tensor]],
    length: int,
    scale: float,
    selection: Tensor | None,
) -> tuple[Tensor, int]:
    """Multi-layer KL(p || q) of one indexer q against the attention p of all layers it serves.

    The gradient of the mean over layers equals that against the averaged p (IndexCache 3.2), so the
    teachers are averaged. With a Selection both sides are restricted to it (sparse stage).

    Args:
        inputs: the indexer's queries, weights and keys for T = B * L rows.
        served: per layer the expanded queries and keys, [T, H, A] each, detached.
        length: L. scale: softmax scale of the main attention.
    """
    rows = torch.arange(length, device=inputs.keys_TI.device)
    mask = (rows <= rows[:, None])[None]  # [1, L, L]
    if selection is not None:
        chosen = selection.unflatten(0, (-1, length)).long()
        allowed = torch.zeros(*chosen.shape[:2], length + 1, dtype=torch.bool, device=chosen.device)
        mask = allowed.scatter_(2, torch.where(chosen < 0, length, chosen), True)[..., :length]
    q, w, k = (x.float().unflatten(0, (-1, length)) for x in inputs)
    scores = torch.einsum("btjs,btj->bts", torch.einsum("btji,bsi->btjs", q, k).relu(), w)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    with torch.no_grad():
        p = torch.zeros_like(scores)
        for queries, keys in served:
            qa, ka = (x.float().unflatten(0, (-1, length)).transpose(1, 2) for x in (queries, keys))
            attention = (qa @ ka.mT * scale).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
            p += attention.mean(1) / len(served)
        log_p = p.clamp(min=1e-20).log()
    terms = torch.where(mask & (p > 0), p * (log_p - log_q), 0.0)
    return terms.sum(), scores.shape[0] * length
