"""Offline generation as vLLM users know it.

>>> llm = LLM("path/to/checkpoint", memory="8GB")
>>> for output in llm.generate(["It was", "She said"], SamplingParams(max_tokens=50)):
...     print(output.prompt, output.outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from nanoglm.api import Model, TextUntil, load
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
        memory: for weights, workspace and cache, such as 8GB. What it holds is in ``self.memory``.
        budget, most, drafts, prefix, index_dtype: as :class:`Engine` takes them; drafts None: as many as pay, if the
            model has an MTP layer.

    Raises:
        InputError: the model is none, or nothing fits.
    """

    def __init__(
        self, model: Model | str | Path | None = None, *, memory: str = "4GB", budget: int = 1024, most: int = 64,
        drafts: int | Literal["auto"] | None = None, prefix: bool = True, index_dtype: torch.dtype | None = None,
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
        texts: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        running: dict[Request, TextUntil | None] = {}
        added: list[list[Request]] = []
        try:
            for prompt in texts:
                ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                seeds = [replace(params, seed=(params.seed + i) % 2**64) for i in range(n)]
                added.append([self.engine.add(ids, each) for each in seeds])
        except InputError:
            for request in (r for requests in added for r in requests):
                self.engine.abort(request)
            raise
        speaks = self.model.has_tokenizer
        for request in (r for requests in added for r in requests):
            running[request] = TextUntil(self.model.tokenizer, stop) if speaks else None
        pieces = dict.fromkeys(running, "")
        while self.engine.busy:
            for request, tokens in self.engine.step():
                text = running.get(request)
                if text is None:
                    continue
                pieces[request] += "".join(map(text.push, tokens))
                if request.finish is not None:
                    pieces[request] += text.flush()
                if text.ended:
                    self.engine.abort(request)
        return [self._output(text, requests, running, pieces) for text, requests in zip(texts, added, strict=True)]

    def _output(
        self, prompt: str | Sequence[int], requests: list[Request], running: dict[Request, TextUntil | None],
        pieces: dict[Request, str],
    ) -> RequestOutput:  # fmt: skip
        outputs = []
        for index, request in enumerate(requests):
            if request.error is not None:
                raise InputError(request.error)
            text, finish = running[request], request.finish
            assert finish is not None
            finish = "stop" if text is not None and text.ended else finish
            outputs.append(
                CompletionOutput(index, pieces[request], tuple(request.outputs), finish, tuple(request.logprobs))
            )
        return RequestOutput(
            prompt if isinstance(prompt, str) else None, requests[0].prompt, tuple(requests[0].prompt_logprobs),
            tuple(outputs),
        )  # fmt: skip
