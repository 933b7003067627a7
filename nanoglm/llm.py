"""Offline generation as vLLM users know it.

>>> llm = LLM("path/to/checkpoint", memory="8GB")
>>> for output in llm.generate(["It was", "She said"], SamplingParams(max_tokens=50)):
...     print(output.prompt, output.outputs[0].text)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from nanoglm.api import Model, TextUntil, load, pieces
from nanoglm.engine import Engine, SamplingParams
from nanoglm.engine.engine import MOST_DRAFTS
from nanoglm.engine.memory import share
from nanoglm.engine.request import Finish, Logprobs, Request
from nanoglm.errors import InputError
from nanoglm.memory import parse_bytes


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation. ``finish_reason``: stop (an end token or a stop text), length, or abort."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its continuations."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[Logprobs, ...]
    outputs: tuple[CompletionOutput, ...]


class LLM:
    """A model with an engine that stays: prefixes are known from one call to the next.

    Args:
        model: a loaded model, a checkpoint directory, a preset, or None for the bundled one.
        memory: for weights, workspace and cache, such as 8GB. What it holds is in ``self.memory`` and said on standard
            error, unless ``quiet``.
        budget, most, drafts, prefix, index_dtype: as :class:`Engine` takes them; drafts None: as many as pay, if the
            model has an MTP layer.

    Raises:
        InputError: the model is none, or nothing fits.
    """

    def __init__(
        self, model: Model | str | Path | None = None, *, memory: str = "4GB", budget: int = 1024, most: int = 64,
        drafts: int | Literal["auto"] | None = None, prefix: bool = True, index_dtype: torch.dtype | None = None,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.model = model if isinstance(model, Model) else load(model)
        if drafts is None:
            drafts = "auto" if self.model.config.num_nextn_predict_layers else 0
        total = parse_bytes("memory", memory)
        assert total is not None
        self.memory = share(
            self.model.module, total, budget=budget, most=most, index_dtype=index_dtype,
            drafts=MOST_DRAFTS if drafts == "auto" else drafts,
        )  # fmt: skip
        if not quiet:
            print(self.memory, file=sys.stderr)
        self.engine = Engine(
            self.model.module, pages=self.memory.pages, budget=budget, most=most, drafts=drafts, prefix=prefix,
            index_dtype=index_dtype,
        )  # fmt: skip

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        n: int = 1,
    ) -> list[RequestOutput]:
        """Continues all prompts together.

        Args:
            prompts: texts, or token ids. stop: texts that end a continuation and are not in it.
            n: continuations of each; the i-th has the params' seed + i.

        Raises:
            InputError: a prompt that cannot be one, or that never fits; nothing has run then.
        """
        params = params or SamplingParams()
        params = replace(params, stop_ids=params.stop_ids or self.model.config.eos_token_id)
        if n < 1:
            raise InputError(f"n is {n}; expected at least 1")
        given: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        tokenizer = self.model.tokenizer if self.model.has_tokenizer else None
        ids = [self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
        texts: dict[Request, TextUntil] = {}
        try:
            for prompt in ids:
                for i in range(n):
                    text = TextUntil(tokenizer, stop)
                    texts[self.engine.add(prompt, replace(params, seed=(params.seed + i) % 2**64))] = text
            said = dict.fromkeys(texts, "")
            for request, piece in pieces(self.engine, texts):
                said[request] += piece
        finally:
            for request in texts:
                self.engine.abort(request)
        requests = list(texts)
        for request in requests:
            if request.error is not None:
                raise InputError(request.error)
        return [
            RequestOutput(
                prompt if isinstance(prompt, str) else None, own[0].prompt, tuple(own[0].prompt_logprobs),
                tuple(_completion(i, r, said[r], texts[r].ended) for i, r in enumerate(own)),
            )
            for prompt, own in zip(given, (requests[at : at + n] for at in range(0, len(requests), n)), strict=True)
        ]  # fmt: skip


def _completion(index: int, request: Request, text: str, stopped: bool) -> CompletionOutput:
    assert request.finish is not None
    finish: Finish = "stop" if stopped else request.finish
    return CompletionOutput(index, text, tuple(request.outputs), finish, tuple(request.logprobs))
