"""A model, an engine and a web server in one process."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from nanoglm.api import checkpoint_directory, load
from nanoglm.llm import LLM
from nanoglm.server.app import create_app
from nanoglm.server.service import Service


class Server(uvicorn.Server):
    """uvicorn, but that streams end cleanly: on a signal nothing new is taken, after the grace all that runs ends."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            host, port = each.getsockname()[:2]
            line = f"{self._service.names[0]}: http://{host}:{port} (page at /, APIs under /v1, /metrics)"
            print(line, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(self._service.drain)
        loop.call_later(self._grace if sig == signal.SIGTERM else 0.0, self._service.end)
        super().handle_exit(sig, frame)


def make_service(
    model: str | Path, *, names: Sequence[str] = (), memory: str = "4GB", drafts: int | None = None,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> Service:  # fmt: skip
    """A service over a checkpoint or a preset.

    Raises:
        InputError: the model is none, or nothing fits.
    """
    directory = checkpoint_directory(model)
    llm = LLM(load(model, dtype=dtype), memory=memory, drafts=drafts)
    name = str(model) if directory is None else directory.resolve().name
    return Service(llm.model, llm.engine, names or (name,), **options)


def run(service: Service, host: str, port: int, *, key: str | None = None, most_bytes: int, grace: float) -> None:
    """Serves until a signal comes. Says where on standard error, once it listens."""
    app = create_app(service, key=key, most_bytes=most_bytes)
    config = uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=int(grace) + 5)
    asyncio.run(Server(config, service, grace).serve([config.bind_socket()]))
