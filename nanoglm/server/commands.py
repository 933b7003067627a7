"""``nanoglm serve``. The server's packages are loaded when it is called: the other commands do without."""

from __future__ import annotations

import ipaddress
import os
from typing import Annotated, Literal

import torch
import tyro

from nanoglm.api import ASSISTANT
from nanoglm.errors import InputError
from nanoglm.memory import parse_bytes

KEY = "NANOGLM_API_KEY"


def serve(
    model: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    open_to_all: bool = False,
    served_model_name: tuple[str, ...] = (),
    memory: str = "4GB",
    context: int | None = None,
    drafts: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    max_requests: int = 256,
    max_body: str = "32MB",
    timeout: float | None = None,
    grace: float = 20.0,
) -> None:
    """Serve a model: OpenAI's and Anthropic's interfaces, metrics, and a page at / with an X-ray of what was selected.

    Args:
        model: A checkpoint directory or a preset; the bundled assistant if left out.
        host: Address to listen on. Other than this machine's own it needs an API key.
        port: Port; 0 takes a free one.
        api_key: That clients must have; or in the environment, NANOGLM_API_KEY.
        open_to_all: Listen on any address without a key.
        served_model_name: Names under which clients ask for the model; its directory's if left out.
        memory: For weights, workspace and cache, such as 8GB.
        context: Most tokens of prompt and reply.
        drafts: Of a chain of the MTP layer; as many as pay if left out.
        dtype: Of the weights in memory.
        max_requests: That are taken at once, running and waiting.
        max_body: Of a request, such as 32MB.
        timeout: Seconds that a request may take; any if left out.
        grace: Seconds for what runs to finish when the server is told to end.
    """
    key = api_key or os.environ.get(KEY) or None  # an empty one would let everybody in
    if not _is_local(host) and key is None and not open_to_all:
        raise InputError(
            f"host is {host!r} and there is no API key; expected --api-key, or --open-to-all to do without"
        )
    if not 0 <= port < 65536:
        raise InputError(f"port is {port}; expected 0 to 65535")
    if grace < 0 or (timeout is not None and timeout <= 0):
        raise InputError(f"grace is {grace} and timeout {timeout}; expected seconds, the timeout above 0")
    if max_requests < 1 or (context is not None and context < 1):
        raise InputError(f"max_requests is {max_requests} and context {context}; expected at least 1")
    body = parse_bytes("max_body", max_body)
    assert body is not None
    try:
        from nanoglm.server.run import bind, make_service, run
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; expected the server's packages: pip install nanoglm[serve]"
        ) from None
    with bind(host, port) as at:  # before the model is loaded, which may take minutes
        service = make_service(
            model or ASSISTANT, names=served_model_name, memory=memory, drafts=drafts, dtype=getattr(torch, dtype),
            most=max_requests, timeout=timeout, context=context,
        )  # fmt: skip
        run(service, at, key=key, most_bytes=int(body), grace=grace)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
