"""How many drafts verification accepts, measured as decoding goes: the MTP layer drafts from a paged cache, the main
model runs over what it drafted, and each place is judged by the two distributions there (architecture spec 3.2, 3.3).

Shape legend: B requests, L tokens of a prompt, D hidden, V vocabulary, G drafts, W ways to
draft and verify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanoglm import ops
from nanoglm.cache import PAGE, PagedCache
from nanoglm.model import GLM

# From p and q, both [B, V]: the probability that the draft is accepted, [B], and the token that is read on, int64 [B].
Verify = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def greedy(p_BV: Tensor, q_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Temperature 0: the likeliest draft, accepted where it is the main model's likeliest token."""
    token = p_BV.argmax(-1)
    return (q_BV.argmax(-1) == token).to(p_BV.dtype), token


def target_only(p_BV: Tensor, q_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Temperature 1, the likeliest draft d: accepted with probability p(d)."""
    token = q_BV.argmax(-1)
    return p_BV.gather(1, token[:, None]).squeeze(1), token


def rejection_sampling(generator: torch.Generator) -> Verify:
    """Temperature 1, a draft from q: accepted with sum min(p, q), and then distributed as min(p, q) is."""

    def verify(p_BV: Tensor, q_BV: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.minimum(p_BV, q_BV)
        return both.sum(-1), torch.multinomial(both, 1, generator=generator).squeeze(1)

    return verify


@torch.no_grad()
def reached(model: GLM, ids_BL: Tensor, drafts: int, ways: Sequence[Verify], share: bool = True) -> Tensor:
    """The probability that the first j drafts behind each prompt are all accepted, for j of 1 to ``drafts``: [W, B, G].

    Where a way samples, it is that along the accepted drafts it drew, whose mean is the probability. A verification
    yields 1 + the sum over j tokens; with fewer drafts, the sum of the first.

    Args:
        ids_BL: int64, L + 1 tokens a prompt: the last is verified and not yet run.
        ways: W of them, one after another behind the same prompts.
        share: Later steps read the keys and Selection of step 0 (GLM-5.2). If not, each writes its own keys behind
            those and selects anew, as GLM-5.1 did.
    """
    requests, length = ids_BL.shape[0], ids_BL.shape[1] - 1
    weight = model.lm_head.weight
    pages = requests * -(-(length + drafts) // PAGE)
    cache = PagedCache(model.config, pages, dtype=weight.dtype, device=weight.device)
    opened, one = [cache.open() for _ in range(requests)], [1] * requests
    output = model(ids_BL[:, :-1].flatten(), cache.extend(opened, [length] * requests), cache)
    hidden_TD, chosen = model.draft(ids_BL[:, 1:].flatten(), output.hidden, output.step)
    last, rows = output.step.tail(one)
    assert chosen is not None
    found = []
    for verify in ways:
        token, hidden_BD, chain_B = ids_BL[:, -1], hidden_TD[rows], ops.wide(hidden_TD).new_ones(requests)
        for depth in range(1, drafts + 1):
            output = model(token, cache.extend(opened, one), cache)  # over what was read so far: judges the next
            p_BV, q_BV = (ops.wide(model.logits(x)).softmax(-1) for x in (output.hidden, hidden_BD))
            accepted_B, token = verify(p_BV, q_BV)
            chain_B = chain_B * accepted_B
            found.append(chain_B)
            if depth < drafts and share:
                hidden_BD, _ = model.draft(token, hidden_BD, last, depth=depth, selection=chosen[rows])
            elif depth < drafts:
                hidden_BD, _ = model.draft(token, hidden_BD, output.step)  # at the place of the token before
        for request in opened:
            cache.rollback(request, drafts)
    return torch.stack(found, 1).unflatten(1, (len(ways), drafts)).transpose(0, 1)
