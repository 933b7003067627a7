"""How a prompt is to be continued."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nanoglm.errors import InputError

MOST_BIAS = 1e6  # logits stay finite in fp32: one request's infinity would end the step of all
Mask = Callable[[Sequence[int]], Tensor | None]  # of the tokens so far: bool [V], what may follow; None: anything


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. What changes logits is applied in the order of the attributes from ``logit_bias`` on.

    Attributes:
        max_tokens: most tokens to generate. temperature: 0 is greedy. top_k: None keeps all.
        seed: of this request's own generator. stop_ids: end generation and are not yielded.
        logit_bias: added to logits, by token id. min_tokens: so many come before a stop id may.
        mask: which tokens may come next, for grammars: a function of the tokens generated so far alone, so that drafts
            are taken back by asking again.
        repetition_penalty: logits of what prompt and continuation hold are divided by it if positive, else multiplied.
        frequency_penalty, presence_penalty: taken off per occurrence, and once, in the continuation.
        min_p: tokens less likely than so much of the likeliest are out. top_p: the likeliest that make up so much stay.
        logprobs: with each token its log-probability and those of so many likeliest, before any of the above.
        prompt_logprobs: the same of the prompt's tokens but the first.

    Raises:
        InputError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0
    mask: Mask | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    top_p: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}")

        check("max_tokens", self.max_tokens >= 1, "at least 1")
        check("temperature", 0 <= self.temperature < math.inf, "a number, 0 or more")
        check("top_k", self.top_k is None or self.top_k >= 1, "at least 1")
        check("seed", 0 <= self.seed < 2**64, "0 to 2**64 - 1")
        check("logit_bias", all(abs(b) <= MOST_BIAS for b in self.logit_bias.values()), f"at most {MOST_BIAS:g} each")
        check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens ({self.max_tokens})")
        check("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "0.001 to 1000")
        for name in ("frequency_penalty", "presence_penalty"):
            check(name, -2 <= getattr(self, name) <= 2, "-2 to 2")
        check("min_p", 0 <= self.min_p <= 1, "0 to 1")
        check("top_p", 0 < self.top_p <= 1, "above 0, at most 1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(name, value is None or value >= 0, "0 or more")
