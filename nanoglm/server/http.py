"""HTTP's side of every interface: errors in their shape, event streams, what a request may weigh, who may ask."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, NoReturn, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import Field, StrictInt
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoglm.errors import NanoglmError
from nanoglm.server.service import NotFound, Overloaded, Piece, Reply, Service, ShuttingDown

log = logging.getLogger("nanoglm.server")
Found = TypeVar("Found")


class JSON(Response):
    """JSON as UTF-8; what no UTF-8 can hold (half a surrogate pair out of a client's own text) is escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        try:
            return dumps(content).encode()
        except UnicodeEncodeError:
            return json.dumps(content).encode()


def dumps(content: Any) -> str:
    """One line of JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


# ------------------------------------------------------------------------------- requests
# Lists that are refused with their first bad item: a million of them would take seconds and gigabytes to report.
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]


class _Strict(Request):
    """A request whose JSON is JSON: Python's reader takes NaN and Infinity, which no answer could repeat."""

    async def json(self) -> Any:
        return json.loads(await self.body(), parse_constant=_refuse, parse_float=_finite)


def _refuse(text: str) -> NoReturn:
    raise json.JSONDecodeError(f"{text[:40]} is no number of JSON, or too large", "", 0)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


class Route(APIRoute):
    """An endpoint that reads JSON strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_Strict(request.scope, request.receive))

        return strict


# ------------------------------------------------------------------------------- errors
MOST_TEXT = 600  # characters of an error: what a client sent is in it, and may be long
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


_OPENAI = {"error": {"type": "object", "required": ["message", "type", "param", "code"]}}
_ANTHROPIC = {"type": {"const": "error"}, "error": {"type": "object", "required": ["type", "message"]}}
_BODY = {"anyOf": [{"type": "object", "properties": p, "required": [*p]} for p in (_OPENAI, _ANTHROPIC)]}
WORDS = {
    400: "What is wrong with the request, in a sentence", 401: "The API key is missing or wrong",
    404: "What the request names is not here", 408: "The request took too long", 413: "The body is too large",
    429: "Too many requests at once", 503: "The server is shutting down",
}  # fmt: skip
# For the OpenAPI document: what every endpoint may answer, and what those that stream answer beside JSON.
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _BODY}}} for status, text in WORDS.items()
}
_EVENT = {"type": "object", "required": ["data"], "properties": {k: {"type": "string"} for k in ("event", "data")}}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def failure(path: str, status: int, message: str, param: str | None = None) -> JSON:
    """An error in the shape of the interface that was asked."""
    message = sentence(message)
    kind = KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if path.startswith("/v1/messages"):
        return JSON({"type": "error", "error": {"type": kind, "message": message}}, status, headers)
    error = {"message": message, "type": kind, "param": param, "code": None if status != 404 else "not_found"}
    return JSON({"error": error}, status, headers)


def sentence(message: str) -> str:
    """A message on one line, and not longer than somebody reads."""
    message = " ".join(message.split())
    return message if len(message) <= MOST_TEXT else f"{message[: MOST_TEXT // 2]} ... {message[-MOST_TEXT // 2 :]}"


def status_of(error: Exception) -> tuple[int, str]:
    """The status and the sentence for what went wrong."""
    if isinstance(error, NanoglmError):
        return 400, sentence(str(error))
    if isinstance(error, RecursionError):
        return 400, "request is nested too deep; expected fewer objects and lists within each other"
    if isinstance(error, NotFound):
        return 404, sentence(str(error))
    if isinstance(error, Overloaded):
        return 429, str(error)
    if isinstance(error, ShuttingDown):
        return 503, "server is shutting down; expected another one to be asked"
    if isinstance(error, TimeoutError):
        return 408, "request took longer than the server allows; expected fewer tokens"
    log.error("request failed", exc_info=error)
    return 500, "the server failed; its log says how"


async def on_error(request: Request, error: Exception) -> Response:
    """For whatever an endpoint raises."""
    status, message = status_of(error)
    return failure(request.url.path, status, message)


async def on_http(request: Request, error: Exception) -> Response:
    """For paths and methods that are none, and bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    response = failure(request.url.path, error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    response.headers.update(error.headers or {})
    return response


async def on_invalid(request: Request, error: Exception) -> Response:
    """For fields of a wrong kind: the first of them, in a sentence."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))[:200]
    if isinstance(first.get("input"), bytes):
        kind = request.headers.get("content-type")
        return failure(request.url.path, 400, f"content-type is {kind}; expected application/json")
    if first["type"] == "json_invalid":
        return failure(request.url.path, 400, f"body is no JSON: {first.get('ctx', {}).get('error', 'cannot be read')}")
    found = "" if first["type"] == "missing" else f" is {_short(first.get('input'))}"
    return failure(request.url.path, 400, f"{where or 'body'}{found}: {first['msg'].lower()}", where or None)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "nested too deep to be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


# ------------------------------------------------------------------------------- answers
async def answer(request: Request, work: Awaitable[Found]) -> Found:
    """Does the work unless the client goes away first.

    Raises:
        asyncio.CancelledError: it went.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, going = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((doing, going), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        doing.cancel()
        going.cancel()


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def on_gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; the log shows what happened."""
    return Response(status_code=499)


async def collect(service: Service, replies: Sequence[Reply]) -> list[list[Piece]]:
    """All pieces of each reply."""
    found: list[list[Piece]] = [[] for _ in replies]
    async with aclosing(service.pieces(replies)) as pieces:
        async for piece in pieces:
            found[piece.index].append(piece)
    return found


class _Stream(StreamingResponse):
    """A stream that ends what feeds it however it ends itself: left to be collected, that would go on for a while."""

    def __init__(self, body: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._body):
            await super().__call__(scope, receive, send)


Event = tuple[str | None, Mapping[str, Any] | str]  # its name, if the interface has names, and its data


async def stream(
    request: Request,
    pieces: AsyncGenerator[Piece, None],
    events: Callable[[AsyncGenerator[Piece, None]], AsyncGenerator[Event, None]],
    failed: Callable[[int, str], Event],
) -> StreamingResponse:
    """A server-sent event stream. What is wrong before the first piece is an answer with its status; later an event.

    Args:
        events: what the interface makes of pieces. failed: its event for an error.
    """
    first = await answer(request, anext(pieces))

    async def again() -> AsyncGenerator[Piece, None]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    async def body() -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(again()) as them, aclosing(events(them)) as found:
                async for event in found:
                    yield _frame(event)
        except Exception as error:
            yield _frame(failed(*status_of(error)))

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _Stream(body(), headers)


def _frame(event: Event) -> bytes:
    name, data = event
    text = data if isinstance(data, str) else dumps(data)
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode(errors="replace")


# ------------------------------------------------------------------------------- the door
class Door:
    """What every request passes: the key, and a limit to its body. Plain ASGI, so that streams stay streams.

    Args:
        key: that all but ``free`` paths ask for, as bearer token or x-api-key; None for none. most: bytes of a body.
        patience: seconds for a client to read something of what is on its way to it. One that reads nothing keeps its
            place among the requests that are taken at once, and is let go of.
    """

    def __init__(self, app: ASGIApp, key: str | None, most: int, free: Sequence[str], patience: float) -> None:
        self._app, self._key, self._most, self._free, self._patience = app, key, most, free, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._key is not None and scope["path"] not in self._free and not self._knows(headers):
            refusal = failure(
                scope["path"], 401, "API key is missing or wrong; expected it as bearer token or x-api-key"
            )
            refusal.headers["WWW-Authenticate"] = "Bearer"
            return await refusal(scope, receive, send)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._most:
            return await self._refuse(scope, receive, send)
        taken, began = 0, False

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise _TooLarge
            return message

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            try:
                async with asyncio.timeout(self._patience):
                    await send(message)
            except TimeoutError:
                raise _Stuck from None

        try:
            await self._app(scope, limited, sending)
        except _TooLarge:
            if not began:
                await self._refuse(scope, receive, send)
        except _Stuck:
            log.warning("client read nothing for %g seconds", self._patience)  # the server closes the connection

    def _knows(self, headers: Mapping[str, str]) -> bool:
        assert self._key is not None
        given = headers.get("authorization", "")
        given = (given[7:] if given[:7].lower() == "bearer " else given) or headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode("latin-1"), self._key.encode())

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await failure(scope["path"], 413, f"body is too large; expected at most {self._most} bytes")(
            scope, receive, send
        )


class _TooLarge(BaseException):  # no Exception: nothing on the way is to make something else of it
    """A body went beyond the limit."""


class _Stuck(BaseException):
    """A client does not read."""
