"""A model, an engine and a web server in one process."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from nanoglm.api import checkpoint_directory, load
from nanoglm.errors import InputError
from nanoglm.llm import LLM
from nanoglm.server.app import create_app
from nanoglm.server.service import Service

LATER = 5  # seconds behind the last answers until whoever still hangs on is cut off


class Server(uvicorn.Server):
    """uvicorn, but that streams end cleanly: on a signal nothing new is taken, after the grace all that runs ends.

    SIGINT leaves no grace, and a second signal ends the process as if nobody handled it.

    Args:
        ready: called once it listens.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, grace: float, ready: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._service, self._grace, self._ready = service, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        loop, grace = asyncio.get_running_loop(), self._grace if sig == signal.SIGTERM else 0.0
        loop.call_soon_threadsafe(self._service.drain)
        loop.call_soon_threadsafe(loop.call_later, grace, self._service.end)
        self.config.timeout_graceful_shutdown = int(grace) + LATER
        self.should_exit = True  # not uvicorn's own way, which raises the signal again at the end


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


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet.

    Raises:
        InputError: there is no such address here, or somebody listens there.
    """
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        if found is not None:
            found.close()
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise InputError(f"host is {host!r} and port {port}; expected an address that is free: {reason}") from None
    return found


def run(service: Service, at: socket.socket, *, key: str | None = None, most_bytes: int, grace: float) -> None:
    """Serves until a signal comes. Says where on standard error, once it listens."""
    host, port = at.getsockname()[:2]

    def ready() -> None:
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{service.names[0]}: {where} (page at /, APIs under /v1, /metrics)", file=sys.stderr, flush=True)

    config = uvicorn.Config(create_app(service, key=key, most_bytes=most_bytes), log_level="warning")
    asyncio.run(Server(config, service, grace, ready).serve([at]))
