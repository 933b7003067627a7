"""A request: a prompt on its way to a continuation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nanoglm.engine.depth import Depth
from nanoglm.engine.params import SamplingParams
from nanoglm.engine.record import Trace
from nanoglm.errors import InputError
from nanoglm.model import GLM

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprobs:
    """Of one token: its log-probability and those of the likeliest, from the logits as the model gave them."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclass(eq=False)
class Request:
    """State of one request. Its tokens are ``prompt`` and ``outputs``; the cache holds the first ``computed`` of them.

    Attributes:
        handle: in the cache; None while it waits (it holds no page then).
        drafts: tokens that may follow, to be verified. draft_probs: of each the distribution that it was drawn from,
            fp32 [V]; empty if drafts are greedy.
        entries: positions that have their entry in the MTP layer's cache. unread: hidden states of those behind them,
            from which the others will be made.
        finish: why it ended. drafted, accepted: of its drafts so far, by their place in a chain.
        depth: what chooses the length of its chains, if it has one of its own.
        kept: of each output whether it was a draft.
        hit: tokens of its prompt that the prefix cache had when it began. began: when that was, on the monotonic clock.
        trace: what is recorded of it, for the first ``computed`` tokens; None if nothing is.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    outputs: list[int] = field(default_factory=list)
    computed: int = 0
    entries: int = 0
    unread: list[Tensor] = field(default_factory=list)
    handle: int | None = None
    drafts: list[int] = field(default_factory=list)
    draft_probs: list[Tensor] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    depth: Depth | None = None
    hit: int = 0
    began: float | None = None
    trace: Trace | None = None
    preempted: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.params.seed)

    @property
    def ids(self) -> list[int]:
        """All its tokens."""
        return [*self.prompt, *self.outputs]

    def span(self, begin: int, end: int) -> list[int]:
        """Its tokens and drafts from position ``begin`` to before ``end``; a long prompt is not copied for a few."""
        n = len(self.prompt)
        if begin < n:
            return [*self.prompt[begin:end], *(self.span(n, end) if end > n else [])]
        return [*self.outputs, *self.drafts][begin - n : end - n]

    @property
    def length(self) -> int:
        """How many."""
        return len(self.prompt) + len(self.outputs)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.params.max_tokens - len(self.outputs)

    def append(self, token: int) -> bool:
        """Takes the next token, or the end that it means; whether more may follow."""
        if token in self.params.stop_ids:
            self.finish = "stop"
            return False
        self.outputs.append(token)
        if not self.left:
            self.finish = "length"
        return self.finish is None


def accepted_length(requests: Iterable[Request]) -> float:
    """Tokens that a verification gave in the mean: 1 and its accepted drafts (serving spec 4.4); 1 without drafts."""
    counts = [(r.drafted[0], sum(r.accepted)) for r in requests if r.drafted]
    return 1 + sum(accepted for _, accepted in counts) / max(1, sum(verified for verified, _ in counts))


def check_prompt(model: GLM, ids: Sequence[int], new_tokens: int = 0) -> None:
    """Raises InputError when ids cannot be a prompt of this model."""
    config = model.config
    if not ids:
        raise InputError("prompt is empty; expected at least one token")
    if len(ids) + new_tokens > config.max_position_embeddings:
        raise InputError(
            f"prompt has {len(ids)} tokens and {new_tokens} new ones are wanted; expected at most "
            f"max_position_embeddings ({config.max_position_embeddings}) together"
        )
    for i in ids:
        if not 0 <= i < config.vocab_size:
            raise InputError(f"prompt holds token id {i}; expected 0 to {config.vocab_size - 1}")
