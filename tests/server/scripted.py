"""A server whose model says what a test wants: real engine, cache, sampler, constraints; only its logits are replaced.

A test puts replies under what the last user message or tool result says; each place in a reply gets a certain token.
With drafts the MTP layer proposes the reply's own next tokens, so verified chains span any border of it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import uvicorn
from torch import Tensor

from nanoglm.api import Model
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.config import GLMConfig
from nanoglm.engine import Engine, Request
from nanoglm.engine.scheduler import Work
from nanoglm.model import GLM
from nanoglm.server.app import create_app
from nanoglm.server.run import Server
from nanoglm.server.service import Service

TOKENIZER = byte_tokenizer()
END, USER, OBSERVATION = (TOKENIZER.encode(t)[0] for t in ("<|endoftext|>", "<|user|>", "<|observation|>"))


class Script:
    """What is said, by the text that the prompt names last.

    Args:
        replies: each a text, or several of which the second, fourth and so on are plain: markup in them is spelled.

    Attributes:
        pause: seconds that a step takes longer. prompts: those that came.
    """

    def __init__(self, replies: Mapping[str, str | Sequence[str]], pause: float = 0.0) -> None:
        self.replies, self.pause, self.prompts = dict(replies), pause, list[str]()
        self._known = WeakKeyDictionary[Request, list[int]]()

    def tokens(self, request: Request) -> list[int]:
        """The reply to this request's prompt, with its end."""
        if request not in self._known:
            prompt = TOKENIZER.decode(request.prompt, skip_special=False)
            self.prompts.append(prompt)
            asked = max((k for k in self.replies if k in prompt), key=prompt.rindex, default=None)
            reply = "" if asked is None else self.replies[asked]
            parts = [reply] if isinstance(reply, str) else list(reply)
            ids = [(TOKENIZER.encode_plain if i % 2 else TOKENIZER.encode)(part) for i, part in enumerate(parts)]
            end = OBSERVATION if parts[-1].endswith("</tool_call>") else USER
            self._known[request] = [*chain(*ids), end]
        return self._known[request]


def call(name: str, /, **arguments: Any) -> str:
    """A call as the model writes it."""
    pairs = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    inner = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in pairs.items())
    return f"<tool_call>{name}{inner}</tool_call>"


def scripted_model(layers: int = 4) -> Model:
    preset = GLMConfig.preset("tiny")
    config = preset.replace(
        max_position_embeddings=8192, eos_token_id=(END, USER, OBSERVATION), num_hidden_layers=layers,
        indexer_types=preset.indexer_types[:layers], mlp_layer_types=preset.mlp_layer_types[:layers],
    )  # fmt: skip
    return Model(GLM(config).initialise(0), TOKENIZER)


def scripted_engine(model: Model, script: Script, drafts: int = 0, pages: int = 256) -> Engine:
    engine = Engine(model.module, pages=pages, drafts=drafts)
    run, draft = engine.runner.run, engine.runner.draft
    vocabulary = model.config.vocab_size

    def certain(request: Request, place: int) -> Tensor:
        tokens, logits_V = script.tokens(request), torch.zeros(vocabulary)
        logits_V[tokens[place] if place < len(tokens) else END] = 60.0
        return logits_V

    def scripted_run(works: Sequence[Work]) -> tuple[Tensor, list[Tensor | None]]:
        time.sleep(script.pause)
        hidden, logits = run(works)
        found: list[Tensor | None] = []
        for work, rows in zip(works, logits, strict=True):
            if rows is not None:
                n, at = work.drafts + 1, len(work.request.outputs)
                rows = torch.cat([rows[: len(rows) - n], *(certain(work.request, at + i)[None] for i in range(n))])
            found.append(rows)
        return hidden, found

    def scripted_draft(requests: Sequence[Request], depths: Mapping[Request, int]) -> None:
        draft(requests, depths)
        for request in requests:
            at, tokens = len(request.outputs), script.tokens(request)
            for i in range(len(request.drafts)):
                request.drafts[i] = tokens[at + i] if at + i < len(tokens) else END
                if request.draft_probs:
                    request.draft_probs[i] = torch.zeros(vocabulary).index_fill_(
                        0, torch.tensor(request.drafts[i]), 1.0
                    )

    engine.runner.run = scripted_run  # type: ignore[method-assign]
    engine.runner.draft = scripted_draft  # type: ignore[method-assign]
    return engine


@contextmanager
def serving(service: Service, key: str | None = None, most_bytes: int = 2**22, grace: float = 5.0) -> Iterator[str]:
    """The service behind a port of this machine; yields its URL."""
    app = create_app(service, key=key, most_bytes=most_bytes)
    config = uvicorn.Config(app, port=0, log_level="warning")
    server = Server(config, service, grace)
    socket = config.bind_socket()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()
