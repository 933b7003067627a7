"""Speculative decoding with the one MTP layer: a chain of drafts, verified in one pass of the main model.

Verification loses nothing. Greedy drafts are kept while they are what the main model says. A draft drawn from q is
kept with probability min(1, p(d) / q(d)), and the first that is not is replaced by a draw from max(0, p - q): what
comes is distributed as p, for any q (serving spec 4.3). p and q are both what bias, mask, penalties, temperature, top-k
and the rest make of logits behind the tokens *and drafts* before them; so no state of a request has to be taken back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoglm.engine.request import Request
from nanoglm.engine.sampler import adjust, best, distribution, draw
from nanoglm.errors import InputError


def verify(request: Request, logits_NV: Tensor) -> list[int]:
    """What follows the request's tokens: its drafts as far as they are accepted, then one of the main model's own.

    Args:
        logits_NV: behind the last token and behind each draft.
    """
    params, found, drafts = request.params, list[int](), request.drafts[: len(logits_NV) - 1]
    for place, logits_V in enumerate(logits_NV):
        logits_V = adjust(logits_V, params, request.prompt, [*request.outputs, *found])
        draft = drafts[place] if place < len(drafts) else None
        if params.temperature == 0:
            token = best(logits_V)
        else:
            q_V = None if draft is None else request.draft_probs[place]
            token = _accept(distribution(logits_V, params), q_V, draft, request.generator)
        found.append(token)
        if token != draft:
            break
    _count(request, len(drafts), len(found) - 1)
    return found


def _accept(p_V: Tensor, q_V: Tensor | None, draft: int | None, generator: torch.Generator) -> int:
    """The draft or what takes its place; a draw from p where there is none."""
    if draft is None or q_V is None:
        return draw(p_V, generator)
    if torch.rand((), generator=generator, dtype=torch.float64) * q_V[draft].double() < p_V[draft].double():
        return draft
    # The draft itself has p < q, so it is never drawn again; rounding may leave nothing where p and q are equal.
    residual_V = (p_V - q_V).clamp(min=0)
    return draw(residual_V if residual_V.any() else p_V, generator)


def _count(request: Request, drafted: int, accepted: int) -> None:
    for counts, n in ((request.drafted, drafted), (request.accepted, accepted)):
        counts += [0] * (n - len(counts))
        for place in range(n):
            counts[place] += 1


def propose(request: Request, logits_V: Tensor) -> None:
    """The request's next draft, from the MTP layer's logits behind its tokens and drafts, kept with what it was drawn
    from; none where the mask lets nothing follow."""
    params = request.params
    try:
        logits_V = adjust(logits_V, params, request.prompt, [*request.outputs, *request.drafts])
    except InputError:
        return
    if params.temperature == 0:
        request.drafts.append(best(logits_V))
    else:
        request.draft_probs.append(distribution(logits_V, params))
        request.drafts.append(draw(request.draft_probs[-1], request.generator))
