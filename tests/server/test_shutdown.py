"""The server as a process: what it says, whom it lets in, and how it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx
import pytest

from nanoglm.cli import main

LONG = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4000, "temperature": 1.0,
        "logit_bias": {"256": -100, "263": -100, "265": -100}}  # fmt: skip


@contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves a tiny model, and its URL."""
    command = [sys.executable, "-m", "nanoglm.cli", "serve", "tiny", "--port", "0", "--memory", "200MB", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        while "http://" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, "http://" + said.partition("http://")[2].split()[0]
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()


class Listener(threading.Thread):
    """A client of one stream."""

    def __init__(self, url: str, path: str, **changes: object) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.text, self.began = url + path, LONG | changes, "", threading.Event()
        self.start()

    def run(self) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", self.url, json=self.body, timeout=60) as answer,
        ):  # a stream that breaks off is seen by what it lacks
            for piece in answer.iter_text():
                self.text += piece
                self.began.set()

    def events(self) -> list[str]:
        self.join(60)
        assert not self.is_alive() and self.text.endswith("\n\n")  # no stream ends in the middle of an event
        return [line.removeprefix("data: ") for line in self.text.split("\n") if line.startswith("data: ")]


def test_sigterm_lets_finish_what_can_and_ends_the_rest_cleanly() -> None:
    with server("--grace", "3") as (process, url):
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        long = [
            Listener(url, "/v1/chat/completions"),
            Listener(url, "/v1/messages", model=name, logit_bias=None),
            Listener(url, "/v1/responses", input="Hi", max_output_tokens=4000),
        ]
        short = Listener(url, "/v1/chat/completions", max_tokens=40)
        for each in (*long, short):
            assert each.began.wait(60)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and time.monotonic() - began < 3 + 8
        assert short.events()[-1] == "[DONE]"
        chat, messages, responses = (each.events() for each in long)
        for events in (chat, messages, responses):
            last = json.loads(events[-1]) if events[-1] != "[DONE]" else {}
            # Replies of random weights may have ended by themselves; those that had not say why they end.
            finished = last == {} or last.get("type") in ("message_stop", "response.completed", "response.incomplete")
            assert finished or "shutting down" in json.dumps(last), last
        assert "shutting down" in chat[-1]  # its end tokens never come
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_sigint_ends_at_once() -> None:
    with server("--grace", "60") as (process, url):
        listener = Listener(url, "/v1/chat/completions")
        assert listener.began.wait(60)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and time.monotonic() - began < 10
        assert "shutting down" in listener.events()[-1]


def test_a_second_signal_ends_the_process() -> None:
    with server("--grace", "60") as (process, url):
        listener = Listener(url, "/v1/chat/completions")
        assert listener.began.wait(60)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None  # it waits for the stream
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


def test_key_body_limit_and_the_rest_of_the_door() -> None:
    limits = "--max-body", "10KB", "--max-requests", "1", "--timeout", "2"
    with server("--api-key", "s3cret", *limits) as (_, url), httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/health").status_code == 200 and client.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "s3cre"}):
            for path in ("/v1/models", "/metrics", "/xray/x", "/openapi.json"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
        assert client.get("/v1/models", headers={"x-api-key": "s3cret"}).status_code == 200
        client.headers["Authorization"] = "Bearer s3cret"
        whole = {**LONG, "stream": False}
        large = json.dumps(whole | {"user": "x" * 20_000}).encode()
        kind = {"Content-Type": "application/json"}
        for content in (large, iter([large[:9000], large[9000:]])):  # with its length, and in chunks
            answer = client.post("/v1/chat/completions", content=content, headers=kind)
            assert answer.status_code == 413 and "10000 bytes" in answer.json()["error"]["message"]
        assert "asks for 2 replies" in client.post("/v1/chat/completions", json=whole | {"n": 2}).text
        with client.stream("POST", "/v1/chat/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            refused = client.post("/v1/messages", json=whole | {"model": "tiny"})
            assert refused.status_code == 429 and refused.headers["Retry-After"]
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert "longer than the server allows" in list(lines)[-2]
        assert client.post("/v1/chat/completions", json=whole).status_code == 408


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--host", "0.0.0.0", "--api-key", ""], "no API key"),  # an empty one would let everybody in
        (["--max-requests", "0"], "max_requests is 0"),
        (["--port", "70000"], "port is 70000"),
        (["--grace", "-1"], "grace is -1"),
        (["--host", "no.such.host.invalid", "--api-key", "x"], "expected an address that is free"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOGLM_API_KEY", raising=False)
    with pytest.raises(SystemExit) as end:
        main(["serve", "tiny", *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_a_body_says_what_it_is() -> None:
    """Without its type a page elsewhere could send one from a browser, and a local server would work for it."""
    with server() as (_, url):
        for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
            headers = {} if kind is None else {"Content-Type": kind}
            answer = httpx.post(f"{url}/v1/chat/completions", content=b'{"messages": []}', headers=headers)
            assert answer.status_code == 400 and f"content-type is {kind}; expected" in answer.text
