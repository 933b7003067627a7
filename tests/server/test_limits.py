"""What one client may ask of the server, how much and for how long, and that others go on meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from server.fuzzing import (
    Sent,
    ask,
    check,
    check_error,
    check_idle,
    events_of,
    failure_of,
    plain_text,
    small_service,
    strictly,
)  # fmt: skip
from server.scripted import serving

from nanoglm.server.app import create_app
from nanoglm.server.service import Service

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
LONG = {
    "messages": HI,
    "max_tokens": 400,
    "logit_bias": {"256": -1e6, "263": -1e6, "265": -1e6},
}  # no end comes of itself


def post(path: str, **body: Any) -> Sent:
    return Sent("POST", path, json.dumps(body).encode())


def refusal(sent: Sent) -> str:
    """The sentence that a request is refused with."""

    async def refused() -> str:
        service = small_service()
        answer = await ask(create_app(service), sent)
        check(sent, answer)
        assert answer.status == 400
        await check_idle(service)
        return str(strictly(answer.body)["error"]["message"])

    return asyncio.run(refused())


# ------------------------------------------------------------------------------- how much
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b'{"messages": [' + b"1," * 1_000_000 + b"1]}"),
        (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}], "stop": [' + b"1," * 1_000_000 + b"1]}"),
        (CHAT, b'{"messages": [], "logit_bias": {' + b",".join(b'"%d":"x"' % i for i in range(200_000)) + b"}}"),
        ("/v1/completions", b'{"prompt": [' + b'"a",1,' * 500_000 + b"1]}"),
        ("/v1/responses", b'{"input": [' + b"1," * 1_000_000 + b"1]}"),
        ("/v1/messages", b'{"model": "tiny", "max_tokens": 1, "messages": [' + b"1," * 1_000_000 + b"1]}"),
        ("/detokenize", b'{"tokens": [' + b'"x",' * 1_000_000 + b"1]}"),
    ],
)
def test_a_million_bad_items_are_one_error(path: str, body: bytes) -> None:
    """All of them took 18 seconds and 1.5 GB to report."""
    begin = time.process_time()
    refusal(Sent("POST", path, body))
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("n", [0, -1, 17, 10**9, 10**30])
def test_n_is_refused_before_so_many_are_made(n: int) -> None:
    assert refusal(post(CHAT, messages=HI, n=n)) == f"n is {n}; expected 1 to 16"


def test_more_replies_than_the_server_takes_are_no_matter_of_trying_again() -> None:
    message = refusal(post("/v1/completions", prompt=["a"] * 20, n=16))
    assert message == "request asks for 320 replies; expected at most 256"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_of_json_is_refused(number: str) -> None:
    """/v1/responses gave it back, and no client could read that."""
    sent = Sent("POST", "/v1/responses", b'{"input": "Hi", "metadata": {"x": [%s]}}' % number.encode())
    assert "is no number of JSON" in refusal(sent)


@pytest.mark.parametrize("key", [None, "a"])
def test_nesting_that_python_cannot_follow_is_refused(key: str | None) -> None:
    begin, end = ("[", "]") if key is None else ('{"a":', "}")
    for depth in (450, 900, 100_000):
        text = f'{{"messages": [{{"role": "user", "content": {begin * depth}1{end * depth}}}]}}'
        refusal(Sent("POST", CHAT, text.encode()))


def test_an_error_is_as_long_as_somebody_reads() -> None:
    message = refusal(post(CHAT, messages=[{"role": "user", "content": {"x": "y" * 100_000}}]))
    assert message.startswith("messages[0] has content {'x': 'yyy") and message.endswith(
        "expected text or a list of parts"
    )
    assert len(message) < 620


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 5e-324}, {"top_p": 5e-324}, {"top_k": 2**70},
        {"temperature": 1e-30, "top_p": 1e-30, "min_p": 1},
        {"repetition_penalty": 0.001, "logit_bias": {str(i): 1e6 for i in range(320)}}, {"temperature": 1e308},
        {"repetition_penalty": 1000, "logit_bias": {str(i): -1e6 for i in range(320)}}, {"seed": -(10**400)},
    ],
)  # fmt: skip
def test_numbers_at_the_edge_fail_no_step(sampling: dict[str, Any]) -> None:
    """A distribution of nothing was an error for every request of the step."""

    async def two() -> None:
        service = small_service()
        app = create_app(service)
        expected = await plain_text(app)
        sent = post(CHAT, messages=HI, max_tokens=8, **sampling)
        answer, beside = await asyncio.gather(ask(app, sent), plain_text(app))
        assert (answer.status, beside) == (200, expected)

    asyncio.run(two())


def test_a_body_beyond_the_limit_is_413_told_or_not() -> None:
    service = small_service()
    with serving(service, most_bytes=1000) as url:
        body = json.dumps({"messages": HI, "max_tokens": 1, "user": "x" * 2000}).encode()

        def pieces() -> Iterator[bytes]:
            for begin in range(0, len(body), 500):
                yield body[begin : begin + 500]

        for path in (CHAT, "/v1/messages"):
            for content in (body, pieces()):
                answer = httpx.post(url + path, content=content)
                assert answer.status_code == 413
                check_error(path, answer.json())
        assert httpx.post(url + CHAT, json={"messages": HI, "max_tokens": 1}).status_code == 200


# ------------------------------------------------------------------------------- who, how many, how long
def test_a_key_opens_everything_but_the_page_and_health() -> None:
    service = small_service()
    with serving(service, key="sésame") as url:
        for path in ("/", "/page.js", "/health"):
            assert httpx.get(url + path).status_code == 200
        key = "sésame".encode()
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nope", "/v1/messages", "/xray/x"):
            for headers in ({}, {"Authorization": b"Bearer wrong"}, {"Authorization": key[:-1]}, {"X-API-Key": b""}):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                check_error(path, answer.json())
            for headers in (
                {"Authorization": b"Bearer " + key},
                {"Authorization": b"bearer " + key},
                {"X-API-Key": key},
            ):
                assert httpx.get(url + path, headers=headers).status_code != 401


def test_more_at_once_than_the_limit_is_429() -> None:
    async def many() -> None:
        service = small_service(most=4)
        app = create_app(service)
        answers = await asyncio.gather(*(ask(app, post(CHAT, **LONG, stream=i % 2 == 0)) for i in range(7)))
        refused = [answer for answer in answers if answer.status == 429]
        assert [len(refused), sum(answer.status == 200 for answer in answers)] == [3, 4]
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        check_error(CHAT, strictly(refused[0].body))
        assert strictly(refused[0].body)["error"]["message"].startswith("server has 4 requests; expected at most 4")
        assert (await ask(app, post("/v1/messages", model="tiny", messages=HI, max_tokens=3))).status == 200
        await check_idle(service)

    asyncio.run(many())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
def test_a_request_that_takes_too_long_is_408_or_an_event(path: str, stream: bool) -> None:
    async def late() -> None:
        service = small_service(timeout=0.3)
        step = service.engine.engine.step
        service.engine.engine.step = lambda: (time.sleep(0.04), step())[1]  # type: ignore[method-assign]
        app = create_app(service)
        begin = time.monotonic()
        sent = post(
            path,
            model="tiny",
            max_tokens=500,
            max_output_tokens=500,
            messages=HI,
            prompt="Hi",
            input="Hi",
            stream=stream,
        )
        answer = await ask(app, sent)
        while answer.status == 200 and (not stream or b"took longer" not in answer.body):  # it ended of itself
            answer = await ask(app, sent)
        assert time.monotonic() - begin < 20
        if stream:
            name, data = events_of(answer.body)[-1]
            error = data if path == "/v1/responses" else data["error"]
            assert name == (None if path.endswith("completions") else "error")
        else:
            assert answer.status == 408
            check_error(path, error := strictly(answer.body))
            error = error["error"]
        assert error["message"] == "request took longer than the server allows; expected fewer tokens"
        await check_idle(service)

    asyncio.run(late())


# ------------------------------------------------------------------------------- beside others
def run_beside(service: Service, sent: Sent, work: Any) -> None:
    """Sends one request, does ``work(app, task)`` meanwhile, then cancels what is left of it."""

    async def both() -> None:
        app = create_app(service)
        task = asyncio.create_task(ask(app, sent))
        try:
            await work(app, task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await check_idle(service)

    asyncio.run(both())


@pytest.mark.parametrize("what", ["json", "prompt"])
def test_a_schema_or_prompt_that_takes_long_stops_nobody(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service, go, begun = small_service(), threading.Event(), threading.Event()
    holder = service.grammars if what == "json" else service
    real = getattr(holder, what)

    def slow(given: Any, *args: Any, **options: Any) -> Any:
        if "slow" in json.dumps(given):
            begun.set()
            assert go.wait(60)
        return real(given, *args, **options)

    monkeypatch.setattr(holder, what, slow)
    messages = [{"role": "user", "content": "slow"}]
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "description": "slow"}}}

    async def others(app: Any, task: asyncio.Task[Any]) -> None:
        while not begun.is_set():
            await asyncio.sleep(0.01)
        await plain_text(app)
        assert not task.done()
        go.set()
        assert (await task).status == 200

    run_beside(service, post(CHAT, messages=messages, response_format=schema, max_tokens=40), others)


def test_who_leaves_before_the_first_piece_ends_the_request() -> None:
    """Its prompt would be read for nobody, and before those of others."""
    service = small_service()
    service.engine.engine.scheduler.most = 1
    left = asyncio.Event()

    async def leave(app: Any, task: asyncio.Task[Any]) -> None:
        while not service.engine.engine.busy:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(ask(app, post(CHAT, **LONG, stream=True), left))
        while not service.engine.engine.scheduler.waiting:
            await asyncio.sleep(0.01)
        left.set()
        await waiting
        while service.engine.engine.scheduler.waiting:
            await asyncio.sleep(0.01)
        assert not task.done()

    run_beside(service, post(CHAT, **LONG), leave)


def unread(app: Any, begun: asyncio.Event, goes_on: asyncio.Event) -> Any:
    """The application for a client that stops at the first event of a stream until ``goes_on``."""

    async def stopped(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if b"data" in message.get("body", b"") and not begun.is_set():
                begun.set()
                await goes_on.wait()
            await send(message)

        await app(scope, receive, sending)

    return stopped


def test_what_a_reader_does_not_read_is_its_reply_and_stops_nobody() -> None:
    """At most a piece a token waits for it, and it gets them all when it goes on."""

    async def wait() -> None:
        service, begun, goes_on = small_service(), asyncio.Event(), asyncio.Event()
        app = create_app(service)
        task = asyncio.create_task(ask(unread(app, begun, goes_on), post(CHAT, **LONG, stream=True)))
        await begun.wait()
        (news,) = service._live
        await plain_text(app)
        while service.engine.engine.busy:  # it goes on to the reply's end
            await asyncio.sleep(0.01)
        assert 300 < news.qsize() <= LONG["max_tokens"] + 1
        goes_on.set()
        events = events_of((await task).body)
        assert len(events) > 200 and failure_of(CHAT, events) is None
        await check_idle(service)

    asyncio.run(wait())


def test_a_reader_that_stays_away_gives_its_place_back(caplog: pytest.LogCaptureFixture) -> None:
    async def leave() -> None:
        service, begun = small_service(), asyncio.Event()
        app = create_app(service, patience=0.2)
        gc.disable()  # it is ended, and not left to be collected at some time
        with pytest.raises(AssertionError, match="the answer has no end"):
            await ask(unread(app, begun, asyncio.Event()), post(CHAT, **LONG, stream=True))
        assert begun.is_set()
        await check_idle(service)

    try:
        with caplog.at_level(logging.WARNING, "nanoglm.server"):
            asyncio.run(leave())
    finally:
        gc.enable()
    assert "client read nothing for 0.2 seconds" in caplog.text


def test_a_step_that_fails_is_told_to_all_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        service = small_service()
        app, run = create_app(service), service.engine.engine.runner.run
        expected = await plain_text(app)

        def broken(works: Any) -> Any:
            if len(works[0].request.outputs) == 5:
                raise RuntimeError("no more memory on the device")
            return run(works)

        service.engine.engine.runner.run = broken  # type: ignore[method-assign]
        for sent in (
            post(CHAT, **LONG, stream=True),
            post("/v1/messages", model="tiny", messages=HI, max_tokens=99, stream=True),
        ):
            name, data = events_of((await ask(app, sent)).body)[-1]
            assert data["error"] == data["error"] | {
                "type": "api_error",
                "message": "the server failed; its log says how",
            }
        service.engine.engine.runner.run = run  # type: ignore[method-assign]
        assert await plain_text(app) == expected
        await check_idle(service)

    asyncio.run(fail())
    assert "no more memory on the device" in caplog.text
