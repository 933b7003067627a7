"""From logits to a token.

One row at a time and from the request's own tokens and generator, so that what is drawn depends on nothing beside it.

Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglm import ops
from nanoglm.engine.params import SamplingParams
from nanoglm.errors import InputError

LEAST = 1e-30  # of a temperature or top-p: what fp32 holds as 0 would make a distribution of nothing


def adjust(logits_V: Tensor, params: SamplingParams, prompt: Sequence[int], outputs: Sequence[int]) -> Tensor:
    """fp32 logits [V] with bias, minimum length, mask and penalties; what must not come is -inf.

    Raises:
        InputError: the mask lets nothing follow.
    """
    logits_V = logits_V.float()
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
        bias = torch.tensor(list(params.logit_bias.values()), device=logits_V.device)
        logits_V = logits_V.index_add(0, ids, bias)
    if len(outputs) < params.min_tokens and params.stop_ids:
        logits_V = logits_V.index_fill(0, torch.tensor(params.stop_ids, device=logits_V.device), -torch.inf)
    if params.mask is not None and (allowed_V := params.mask(outputs)) is not None:
        if not allowed_V.any():
            raise InputError(f"mask allows no token behind {len(outputs)} generated ones; expected at least one")
        logits_V = logits_V.masked_fill(~allowed_V.to(logits_V.device), -torch.inf)
    if params.repetition_penalty != 1 and (seen := sorted({*prompt, *outputs})):
        ids = torch.tensor(seen, device=logits_V.device)
        values = logits_V[ids]
        values = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits_V = logits_V.index_copy(0, ids, values)
    if (params.frequency_penalty or params.presence_penalty) and outputs:
        counts_V = torch.bincount(torch.tensor(outputs), minlength=len(logits_V)).to(logits_V.device)
        logits_V = logits_V - params.frequency_penalty * counts_V - params.presence_penalty * (counts_V > 0)
    return logits_V


def best(logits_V: Tensor) -> int:
    """The likeliest token; of equal logits the lower id."""
    return int(ops.top(logits_V[None], 1))


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """What is drawn from, fp32 [V] on the CPU: temperature above 0, then min-p, top-k and top-p of adjusted logits."""
    # The best logit becomes 0, so that a temperature near 0 divides nothing into infinity.
    p_V = ((logits_V - logits_V.max()) / max(params.temperature, LEAST)).softmax(-1).cpu()
    if params.min_p:
        p_V = p_V.where(p_V >= params.min_p * p_V.max(), 0.0)
    if params.top_k is not None and params.top_k < p_V.numel():
        kept = ops.top(logits_V[None], params.top_k)[0].cpu()
        p_V = torch.zeros_like(p_V).index_copy_(0, kept, p_V[kept])
    if params.top_p < 1:
        order = ops.top(p_V[None], p_V.numel())[0]
        before = p_V[order].cumsum(0) - p_V[order]
        kept = order[before < max(params.top_p, LEAST) * p_V.sum()]  # those that are likelier do not make up as much
        p_V = torch.zeros_like(p_V).index_copy_(0, kept, p_V[kept])
    return p_V / p_V.sum()


def draw(p_V: Tensor, generator: torch.Generator) -> int:
    """A token id from a distribution."""
    return int(torch.multinomial(p_V, 1, generator=generator))


def sample(
    logits_V: Tensor, params: SamplingParams, generator: torch.Generator,
    prompt: Sequence[int] = (), outputs: Sequence[int] = (),
) -> int:  # fmt: skip
    """The token that follows ``prompt`` and ``outputs``; temperature 0 draws no random number."""
    logits_V = adjust(logits_V, params, prompt, outputs)
    return best(logits_V) if params.temperature == 0 else draw(distribution(logits_V, params), generator)
