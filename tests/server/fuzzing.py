"""Requests that no client should send, made of good ones, and what must hold of whatever is answered to them.

Everything is drawn from a seeded generator; a finding says the seed and the request.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from server.hostile import GETS, METHODS, NUMBERS, POSTS, RAW, SCHEMAS, TEXTS, TYPES, USER, VALUES, Body

from nanoglm.api import Model
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.config import GLMConfig
from nanoglm.engine import Engine
from nanoglm.model import GLM
from nanoglm.server.service import Service

PATIENCE = 30.0  # seconds for an answer, on a machine that has other things to do
SECONDS = 60.0  # until the engine is idle


def small_service(*, context: int = 1024, pages: int = 64, drafts: int = 0, **options: Any) -> Service:
    """The smallest model, with random weights and real sampling."""
    config = GLMConfig.preset("tiny").replace(max_position_embeddings=4096, eos_token_id=(256, 263, 265))
    model = Model(GLM(config).initialise(0), byte_tokenizer())
    return Service(model, Engine(model.module, pages=pages, drafts=drafts), ["tiny"], context=context, **options)


# ------------------------------------------------------------------------------- drawing
def hostile(draw: random.Random) -> Any:
    """A value that fits nowhere."""
    return copied(draw.choice(draw.choice((TEXTS, NUMBERS, VALUES, SCHEMAS))))


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def items(holder: Any) -> Iterable[tuple[Any, Any]]:
    return holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()


def places(value: Any, depth: int = 12) -> Iterator[tuple[Any, Any]]:
    """Every container within a value with each of its keys."""
    for key, item in items(value) if depth else ():
        yield value, key
        yield from places(item, depth - 1)


def spoil(draw: random.Random, body: Body) -> None:
    """One change at one place."""
    if not body:
        body["messages"] = hostile(draw)
    holder, key = draw.choice(list(places(body)))
    what = draw.randrange(8)
    if what == 0:
        holder.pop(key, None) if isinstance(holder, dict) else holder.pop(key)
    elif what == 1 and isinstance(holder, dict) and isinstance(key, str):
        holder[draw.choice(TEXTS)] = holder.pop(key, 0)
    elif what == 2 and isinstance(holder, dict):
        holder[draw.choice([*TEXTS, "tools", "stream", "n", "content", "$ref", "type", "messages"])] = hostile(draw)
    elif what == 3 and isinstance(holder, list):
        holder[:] = holder * draw.choice((2, 50))
    elif what == 4 and isinstance(text := holder[key], str):
        at = draw.randrange(len(text) + 1)
        holder[key] = text[:at] + draw.choice(TEXTS) + text[at:]
    elif what == 5:
        other, name = draw.choice(list(places(body)))
        holder[key], other[name] = copied(other[name]), copied(holder[key])
    else:
        holder[key] = hostile(draw)


def spoil_bytes(draw: random.Random, text: str) -> bytes:
    """One change of what is sent."""
    numbers = [match.span() for match in re.finditer(r"(?<=[:\[, ])-?\d+(?=[,}\]])", text)] or [(0, 0)]
    begin, end = draw.choice(numbers)
    key = draw.choice(re.findall(r'"(\w+)":', text) or ["model"])
    at = draw.randrange(len(text) + 1)
    return draw.choice((
        lambda: (text[:begin] + draw.choice(RAW) + text[end:]).encode(),
        lambda: text[:at].encode(),
        lambda: text.replace("{", f'{{"{key}": {json.dumps(hostile(draw))}, ', 1).encode(),
        lambda: text.encode()[:at] + draw.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00")) + text.encode()[at:],
        lambda: text.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-be"))),
        lambda: text.encode() + draw.choice((b"x", b"{}", b"\n\n", b",")),
        lambda: draw.choice((b"", b"null", b"[]", b"5", b'"x"', b"[" * 100_000, b'{"a":' * 20_000, b" " * 10_000)),
    ))()  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """A request. ``cut``: the client goes away in the middle of its body."""

    method: str
    path: str
    content: bytes = b""
    kind: str | None = "application/json"
    cut: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.path} [{self.kind}] {self.content[:1500]!r}{' cut' if self.cut else ''}"


def request(draw: random.Random) -> Sent:
    """A request: about one in ten is left as it should be."""
    if draw.random() < 0.1:
        path = draw.choice(GETS)
        odd = [quote(str(draw.choice((*TEXTS, *NUMBERS)))[:300].encode(errors="replace"), safe="") for _ in range(3)]
        return Sent(draw.choice(("GET", "GET", *METHODS)), path.format(*odd))
    path, body = draw.choice(POSTS)
    body = copied(body)
    for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 3, 5))):
        spoil(draw, body)
    text, kind = json.dumps(body), "application/json"
    content = spoil_bytes(draw, text) if draw.random() < 0.15 else text.encode()
    method = draw.choice(METHODS) if draw.random() < 0.03 else "POST"
    if draw.random() < 0.03:
        kind = draw.choice(TYPES)  # type: ignore[assignment]
    return Sent(method, path, content, kind, cut=draw.random() < 0.01)


# ------------------------------------------------------------------------------- asking
@dataclass
class Answer:
    """What came back; a status of 0 if nothing did."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


async def ask(app: Any, sent: Sent, left: asyncio.Event | None = None) -> Answer:
    """Over ASGI itself, so that nothing mends the request on its way.

    Args:
        left: the client goes away when this is set.
    """
    answer, done = Answer(), asyncio.Event()
    path, _, query = sent.path.partition("?")
    half = len(sent.content) // 2
    parts = [sent.content[:half], sent.content[half:]]
    headers = [(b"host", b"localhost")] + (
        [] if sent.kind is None else [(b"content-type", sent.kind.encode("latin-1"))]
    )

    async def receive() -> dict[str, Any]:
        if sent.cut and len(parts) == 1:
            return {"type": "http.disconnect"}
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await (done if left is None else left).wait()
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        assert not done.is_set(), "something was sent behind the end"
        if message["type"] == "http.response.start":
            assert not answer.status, "a second answer began"
            answer.status = message["status"]
            answer.headers = {name.decode().lower(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            assert answer.status, "a body without a beginning"
            answer.body += message.get("body", b"")
            if not message.get("more_body"):
                done.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": sent.method,
        "scheme": "http", "path": re.sub("%(..)", lambda m: chr(int(m[1], 16)), path), "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), PATIENCE)
    assert sent.cut or left or done.is_set(), "the answer has no end"
    return answer


# ------------------------------------------------------------------------------- what must hold
STREAMS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
INSIDE = re.compile(r"Traceback|object at 0x|'\w+' object |NoneType|<class|unexpected keyword|\bpanic\b|unhashable")
STATUSES = {200, 307, 400, 404, 405, 413, 429}


def strictly(text: str | bytes) -> Any:
    """JSON as the standard has it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def is_sentence(message: Any) -> bool:
    return isinstance(message, str) and 5 < len(message) <= 620 and "\n" not in message and not INSIDE.search(message)


def check_error(path: str, found: Any) -> None:
    """An error in the shape of the interface, with one sentence."""
    if path.startswith("/v1/messages"):
        assert found["type"] == "error" and set(found["error"]) == {"type", "message"}, found
    else:
        assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
    assert is_sentence(found["error"]["message"]), found["error"]["message"]
    assert found["error"]["type"].endswith("_error") or found["error"]["type"] == "request_too_large", found


def events_of(body: bytes) -> list[tuple[str | None, Any]]:
    """A stream's events: names, and data that is JSON or [DONE]."""
    text = body.decode()
    assert text.endswith("\n\n"), f"stream ends in mid-event: {text[-200:]!r}"
    found = []
    for block in text[:-2].split("\n\n"):
        lines = block.split("\n")
        name = lines.pop(0).removeprefix("event: ") if lines[0].startswith("event: ") else None
        assert len(lines) == 1 and lines[0].startswith("data: "), block[:200]
        data = lines[0].removeprefix("data: ")
        found.append((name, data if data == "[DONE]" else strictly(data)))
    return found


def failure_of(path: str, events: Sequence[tuple[str | None, Any]]) -> str | None:
    """The sentence of the error that a stream ends with; None where it ends as it should."""
    (name, data) = events[-1]
    if path.endswith("completions"):
        return None if data == "[DONE]" else str(data["error"]["message"])
    assert all(name == data["type"] for name, data in events), events
    if name == "error":
        return str(data["message"] if path == "/v1/responses" else data["error"]["message"])
    assert name in ("message_stop", "response.completed", "response.incomplete"), name
    return None


def check(sent: Sent, answer: Answer) -> None:
    """What holds of every answer."""
    path, kind = sent.path.partition("?")[0], answer.headers.get("content-type", "")
    assert answer.status in STATUSES or (sent.cut and answer.status in (0, 400, 499)), (
        f"{answer.status} {answer.body!r}"
    )
    if answer.status in (0, 307, 499):
        return
    if answer.status >= 400:
        assert kind == "application/json", kind
        check_error(path, strictly(answer.body))
    elif kind.startswith("text/event-stream"):
        assert path in STREAMS
        message = failure_of(path, events_of(answer.body))
        assert message is None or (is_sentence(message) and "the server failed" not in message), message
    elif kind == "application/json":
        usage = strictly(answer.body).get("usage") or {}
        if "total_tokens" in usage:
            parts = [
                usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
            ]
            assert sum(parts) == usage["total_tokens"], usage
    else:
        assert sent.method in ("GET", "HEAD") and kind.split(";")[0] in (
            "text/plain", "text/html", "text/javascript", "text/css", "image/svg+xml",
        ), kind  # fmt: skip


PLAIN = Sent(
    "POST", "/v1/chat/completions", json.dumps({"messages": [USER], "temperature": 0, "max_tokens": 24}).encode()
)


async def plain_text(app: Any) -> Any:
    """What a good request is answered, greedily."""
    return strictly((await ask(app, PLAIN)).body)["choices"]


async def check_idle(service: Service) -> None:
    """Nothing runs, nobody holds anything, and every page is free or a prefix's."""
    engine = service.engine.engine
    async with asyncio.timeout(SECONDS):
        while engine.busy or service.engine._running is not None or service._busy:
            await asyncio.sleep(0.01)
    engine.check()
    assert engine.prefix is not None
    assert engine.cache.free_pages + len(engine.prefix) == engine.cache.pages
    assert (service._busy, service._live, service.engine._news) == (0, set(), {})


async def fuzz(app: Any, service: Service, seed: int, count: int, at_once: int = 8) -> tuple[dict[int, int], list[str]]:
    """Sends so many requests; how many had which status, and what did not hold."""
    draw, limit = random.Random(seed), asyncio.Semaphore(at_once)
    statuses, findings, before = dict[int, int](), list[str](), await plain_text(app)

    async def one(number: int, sent: Sent) -> None:
        async with limit:
            try:
                answer = await ask(app, sent)
                check(sent, answer)
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            except Exception as error:
                findings.append(f"seed {seed} number {number}: {type(error).__name__}: {str(error)[:800]}\n  {sent}")

    for begin in range(0, count, 200):
        requests = [(number, request(draw)) for number in range(begin, min(count, begin + 200))]
        await asyncio.gather(*(one(number, sent) for number, sent in requests))
        await check_idle(service)
    assert await plain_text(app) == before
    return statuses, findings
