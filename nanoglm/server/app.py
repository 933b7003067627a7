"""The application: every interface over one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from nanoglm.errors import NanoglmError
from nanoglm.server import anthropic, openai, responses, xray
from nanoglm.server.http import (
    JSON,
    REFUSALS,
    ClientGone,
    Door,
    Ids,
    Objects,
    Route,
    on_error,
    on_gone,
    on_http,
    on_invalid,
)
from nanoglm.server.service import NotFound, Overloaded, Service, ShuttingDown

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 32 * 2**20  # of a request's body
PATIENCE = 120.0  # with a client that does not read
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"


class TokenizeRequest(BaseModel):
    """``POST /tokenize``: a text, or a conversation under the template."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    tools: Objects | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """``POST /detokenize``."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    tokens: Ids


def create_app(
    service: Service, *, key: str | None = None, most_bytes: int = MOST_BYTES, patience: float = PATIENCE
) -> FastAPI:  # fmt: skip
    """An ASGI application.

    Args:
        key: that clients must have, but for the page and /health. most_bytes: of a request's body.
        patience: seconds for a client to read something of its answer.
    """
    xrays = xray.XRays()
    pages = [f"/{file.name}" for file in PAGE.iterdir()] if PAGE.is_dir() else []
    free = ["/", "/health", *pages]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.engine.close()

    app = FastAPI(
        title="nanoglm", version=version("nanoglm"), lifespan=lifespan, docs_url=None, redoc_url=None,
        responses=REFUSALS,
        middleware=[Middleware(Door, key=key, most=most_bytes, free=free, patience=patience)],
    )  # fmt: skip
    for error in (NanoglmError, NotFound, Overloaded, ShuttingDown, TimeoutError, RecursionError, Exception):
        app.add_exception_handler(error, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(ClientGone, on_gone)
    app.include_router(openai.router(service, xrays))
    app.include_router(responses.router(service))
    app.include_router(anthropic.router(service))
    app.include_router(xray.router(xrays))
    app.include_router(_plain(service))
    _add_page(app, pages)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]  # FastAPI's own way to change it
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, but that what it would answer with 422 is a 400 here."""
    document = FastAPI.openapi(app)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def _add_page(app: FastAPI, paths: Sequence[str]) -> None:
    """The page's files, each at its own path: one mount for all would answer for methods of the interfaces, too."""
    files = _Page(directory=PAGE, check_dir=False)

    async def file(request: Request) -> Response:
        return await files.get_response(request.url.path.strip("/") or "index.html", request.scope)

    for path in ("/", *paths) if paths else ():
        app.add_route(path, file, include_in_schema=False)


class _Page(StaticFiles):
    """The page's files. Nothing of it comes from elsewhere, and a browser is told so."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-cache"
        return response


def _plain(service: Service) -> APIRouter:
    """Health, version, metrics, tokens: what vLLM has beside OpenAI's."""
    routes = APIRouter(tags=["server"], route_class=Route)

    @routes.get("/health")
    async def health() -> Response:
        """Whether the server answers."""
        return JSON({"status": "ok"})

    @routes.get("/version")
    async def running() -> Response:
        """Of nanoglm."""
        return JSON({"version": version("nanoglm")})

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Ids of a text or a conversation."""
        service.check_name(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise NanoglmError("request has both or neither of prompt and messages; expected one of them")
        if asked.prompt is not None:
            ids = await asyncio.to_thread(service.tokenizer.encode, asked.prompt)
        else:
            ids = await asyncio.to_thread(
                service.prompt, asked.messages or [], asked.tools, switches=asked.chat_template_kwargs,
                add_generation_prompt=asked.add_generation_prompt,
            )  # fmt: skip
        texts = [service.tokenizer.token_bytes(i, skip_special=False).decode(errors="replace") for i in ids]
        more = {"token_strs": texts} if asked.return_token_strs else {}
        return JSON({"tokens": ids, "count": len(ids), "max_model_len": service.context, **more})

    @routes.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """The text of ids."""
        service.check_name(asked.model)
        most = service.model.config.vocab_size - 1
        if (bad := next((i for i in asked.tokens if not 0 <= i <= most), None)) is not None:
            raise NanoglmError(f"tokens holds {bad}; expected ids from 0 to {most}")
        return JSON({"prompt": service.tokenizer.decode(asked.tokens, skip_special=False)})

    return routes
