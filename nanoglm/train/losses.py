"""Training losses, in fp32, each a (sum, count) pair so that parts add exactly.

Shape legend: B sequences, L length, T = B * L rows, H heads, J indexer heads, A head dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm import ops
from nanoglm.model import GLM, Output
from nanoglm.model.indexer import IndexerInputs
from nanoglm.train.data import IGNORE, Sample
from nanoglm.train.recipe import Drafts


def cross_entropy(model: GLM, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, int]:
    """Next-token loss in nats; targets of -100 count nothing."""
    learnt_T = targets_T >= 0
    count = int(learnt_T.sum())
    if count < len(targets_T):  # the head is half of a small model's work
        hidden_TD, targets_T = hidden_TD[learnt_T], targets_T[learnt_T]
    return F.cross_entropy(ops.wide(model.logits(hidden_TD)), targets_T, reduction="sum"), count


def drafts(model: GLM, output: Output, sample: Sample, depths: int) -> Iterator[Tensor]:
    """Hidden states [T, D] of each use of the MTP layer, with the keys and Selection of step 0 as in decoding.

    Row t of depth j stands at position t + j, reads token t + 1 + j and predicts token t + 2 + j; rows whose tokens
    lie beyond the sequence read token 0 and hold nothing of use.
    """
    hidden, selection = output.hidden, None
    for depth in range(depths):
        following = ahead(sample, sample.ids, 1 + depth, 0)
        hidden, selection = model.draft(following, hidden, output.step, depth=depth, selection=selection)
        yield hidden


def draft_targets(sample: Sample, depths: int) -> Tensor:
    """What row t of each depth j is to predict, int64 [depths, T]: token t + 2 + j, which is -100 if that is not learnt
    or lies, as may token t + 1 + j, which is read, in another sequence."""
    rows = [ahead(sample, sample.targets, 1 + depth, IGNORE) for depth in range(depths)]
    return torch.stack(rows) if rows else sample.targets.new_empty(0, len(sample.targets))


def ahead(sample: Sample, values_T: Tensor, by: int, beyond: int) -> Tensor:
    """Of each row what stands ``by`` rows on in its sequence, [T]."""
    later, inside = sample.later(values_T, by)
    return later.where(inside, beyond)


def mtp(model: GLM, output: Output, sample: Sample, depths: int) -> tuple[Tensor, int]:
    """Next-token loss of several uses of the one MTP layer."""
    total, count = output.hidden.new_zeros(()), 0
    hidden = drafts(model, output, sample, depths)
    for hidden_TD, targets_T in zip(hidden, draft_targets(sample, depths), strict=True):
        loss, n = cross_entropy(model, hidden_TD, targets_T)
        total, count = total + loss, count + n
    return total, count


def total_variation(model: GLM, output: Output, sample: Sample, depths: int) -> tuple[Tensor, int]:
    """What speculation loses: 1 less the share of ``depths`` drafts that verification is expected to accept.

    A draft from q is accepted with probability 1 - TV(p, q), p being the main model's distribution at that place
    (detached), and only behind accepted ones: 1 - (1 / depths) sum_j prod_(i <= j) (1 - TV_i), over the rows whose
    drafts are all learnt (architecture spec 3.2, after Bebop).
    """
    rows = (draft_targets(sample, depths) >= 0).all(0).nonzero().squeeze(-1)
    reached = total = ops.wide(output.hidden.new_zeros(()))
    for depth, hidden in enumerate(drafts(model, output, sample, depths)):  # without rows too: other ranks take part
        p_NV = ops.wide(model.logits(sample.later(output.hidden, 1 + depth)[0][rows]).detach()).softmax(-1)
        q_NV = ops.wide(model.logits(hidden[rows])).softmax(-1)
        accepted = torch.minimum(p_NV, q_NV).sum(-1)
        reached = accepted if depth == 0 else reached * accepted
        total = total + reached
    return (1 - total / depths).sum(), len(rows)


def rejection(model: GLM, output: Output, sample: Sample, depths: int) -> tuple[Tensor, int]:
    """Next-token loss of drafts as they are rolled out: each weighs as often as decoding comes to it.

    A draft y from q is accepted with probability min(1, p(y) / q(y)); if not, verification samples from the positive
    part of p - q, and nothing is drafted behind (architecture spec 3.2). What stands is from p either way, and was the
    draft with probability min(1, q(x) / p(x)). So a text that the main model could have said is such a roll-out seen
    from its end: depth j reads drafts that were all accepted with the product of these ratios over the depths before
    it, which is its weight (detached). Over all texts from p that is the expected loss along drafts that are sampled,
    verified and read on, without a draw or a pass of the main model over them. Of rows those count, each as one, whose
    earlier drafts are learnt too.
    """
    targets = draft_targets(sample, depths)
    with torch.no_grad():
        p_T = -_nats(model, output.hidden, sample.targets.clamp(min=0))
    reached = torch.ones_like(p_T)
    learnt = targets.new_ones(len(p_T), dtype=torch.bool)
    total, count = p_T.new_zeros(()), 0
    for depth, (hidden, target) in enumerate(zip(drafts(model, output, sample, depths), targets, strict=True)):
        learnt &= target >= 0
        rows = learnt.nonzero().squeeze(-1)
        loss = _nats(model, hidden[rows], target[rows])
        total, count = total + (reached[rows] * loss).sum(), count + len(rows)
        reached[rows] *= (-loss.detach() - sample.later(p_T, 1 + depth)[0][rows]).exp().clamp(max=1)
    return total, count


def _nats(model: GLM, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    """-log of the probability of each target, [T]."""
    return F.cross_entropy(ops.wide(model.logits(hidden_TD)), targets_T, reduction="none")


DRAFTS: dict[Drafts, Callable[[GLM, Output, Sample, int], tuple[Tensor, int]]] = {
    "likelihood": mtp, "rejection": rejection, "total_variation": total_variation,
}  # fmt: skip


def balance(scores_TE: Tensor, ids_Tk: Tensor, sample: Sample) -> tuple[Tensor, int]:
    """How unevenly each sequence visits its experts, 1 where evenly (DeepSeek-V3 2.1.2: sum_i f_i P_i, f_i expert i's
    share of the choices times E, P_i its mean share of the scores). A sequence counts as often as it has tokens."""
    experts = scores_TE.shape[1]
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    batch = sample.batch
    load_BE = shares_TE.new_zeros(len(batch.lengths), experts)
    load_BE.index_put_((batch.requests[:, None], ids_Tk), load_BE.new_ones(()), accumulate=True)
    mean_BE = torch.zeros_like(load_BE).index_add(0, batch.requests, shares_TE)
    load_BE = sample.total(load_BE)
    frequent_BE = load_BE * experts / load_BE.sum(-1, keepdim=True)  # a sequence makes k choices a token
    return (frequent_BE * mean_BE).sum(), len(ids_Tk)  # mean_BE still has the length in it, which is the weight


def counts(sample: Sample, depths: int, drafts: Drafts = "likelihood") -> dict[str, int]:
    """How much each loss will count, known before it is computed, so that parts of a step add exactly.

    Args:
        drafts: what MTP learns, a key of ``DRAFTS``.
    """
    learnt = draft_targets(sample, depths) >= 0
    if drafts == "rejection":
        learnt = learnt.cumprod(0)
    elif drafts == "total_variation":
        learnt = learnt.all(0)
    return {
        "loss": int((sample.targets >= 0).sum()), "mtp": int(learnt.sum()),
        "kl": len(sample.ids), "balance": len(sample.ids),
    }  # fmt: skip


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
    before: int = 0,
) -> tuple[Tensor, int]:
    """Multi-layer KL(p || q) of one indexer q against the attention p of all layers it serves.

    The gradient of the mean over layers equals that against the averaged p (IndexCache 3.2), so the
    teachers are averaged. With a Selection both sides are restricted to it (sparse stage), each teacher before the
    average. Rows go in chunks, and what a chunk needs is gone when the next begins: no T x S tensor, of the teachers
    neither, is kept for the backward pass.

    Args:
        inputs: the indexer's queries and weights for T = B * L rows, and keys.
        served: per layer queries [T, H, A] and keys, detached: expanded [T, H, A], or what all heads share, [T, A]
            (absorbed queries with latents and rotated keys).
        length: L. scale: softmax scale of the main attention.
        before: tokens of each sequence that come before its L rows: there are B * (before + L) keys.
    """
    total: Tensor = _IndexerKL.apply(*inputs, served, length, scale, selection, before)
    return total, inputs.q_TJI.shape[0]


class _IndexerKL(torch.autograd.Function):
    """The loss with its gradient, which comes with it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, weights: Tensor, keys: Tensor, served: Sequence[tuple[Tensor, Tensor]], length: int,
        scale: float, selection: Tensor | None, before: int,
    ) -> Tensor:  # fmt: skip
        queries, teacher_keys = ([pair[i] for pair in served] for i in (0, 1))
        total, *grads = ops.indexer_kl(q, weights, keys, queries, teacher_keys, length, before, scale, selection)
        ctx.save_for_backward(*(grad.to(x.dtype) for grad, x in zip(grads, (q, weights, keys), strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * x for x in ctx.saved_tensors), None, None, None, None, None
