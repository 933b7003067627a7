"""From logits to a token: greedy, temperature, top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoglm import ops


def sample(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token id from fp32 logits [V]. Temperature 0 is greedy; equal logits go to the lower id."""
    logits_V = logits_V.float()
    if temperature == 0:
        return int(ops.top(logits_V[None], 1))
    if top_k is not None and top_k < logits_V.numel():
        kept = ops.top(logits_V[None], top_k)[0]
        logits_V = torch.full_like(logits_V, -torch.inf).index_copy_(0, kept, logits_V[kept])
    # The best logit becomes 0, so that a temperature near 0 divides nothing into infinity.
    probabilities = ((logits_V - logits_V.max()) / temperature).softmax(-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
