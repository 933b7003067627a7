"""Live servers: one whose model says what a test wants, one with a random model, each with and without drafts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from server.scripted import Script, scripted_engine, scripted_model, serving

from nanoglm.engine import Engine
from nanoglm.server.service import Service


@dataclass
class Live:
    """A server that runs. The clients are the official ones, which here try only once."""

    url: str
    service: Service
    key: str = "none"
    script: Script = field(default_factory=lambda: Script({}))

    def __post_init__(self) -> None:
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)
        self.anthropic = anthropic.Anthropic(base_url=self.url, auth_token=self.key, max_retries=0, timeout=60)
        self.http = httpx2.Client(base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {self.key}"})

    @property
    def drafts(self) -> int:
        """Of a chain."""
        return self.service.engine.engine.most_drafts

    def says(self, replies: Mapping[str, str | Sequence[str]], pause: float = 0.0) -> None:
        """What a scripted server says from now on, see :class:`Script`."""
        self.script.replies, self.script.pause = dict(replies), pause

    def ids(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **switches: Any) -> list[int]:
        """A conversation's prompt."""
        model = self.service.model
        return model.template.encode(model.tokenizer, messages, tools, add_generation_prompt=True, **switches)

    def prompt(self) -> str:
        """The last one that came."""
        return self.script.prompts[-1]

    def quiet(self) -> None:
        """Waits until the engine has nothing to do: its books are in order, and only the prefix tree holds pages."""
        engine, end = self.service.engine.engine, time.monotonic() + 10
        while (engine.busy or self.service._busy) and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine.busy and not self.service._busy
        engine.check()
        assert engine.prefix is not None and engine.cache.free_pages + len(engine.prefix) == engine.cache.pages


@contextmanager
def live(
    drafts: int, script: Script | None, layers: int = 2, key: str | None = None, most_bytes: int = 2**22, **options: Any
) -> Iterator[Live]:
    """A server with ``drafts``; ``options`` are of the service."""
    model = scripted_model(layers)
    engine = (
        Engine(model.module, pages=256, drafts=drafts) if script is None else scripted_engine(model, script, drafts)
    )
    service = Service(model, engine, ["tiny", "other"], **options)
    with serving(service, key, most_bytes) as url:
        yield Live(url, service, key or "none", script or Script({}))


@pytest.fixture(scope="session", params=[0, 3], ids=["plain", "drafts"])
def scripted(request: pytest.FixtureRequest) -> Iterator[Live]:
    """Says what a test scripts."""
    with live(request.param, Script({})) as found:
        yield found


@pytest.fixture(scope="session", params=[0, 3], ids=["plain", "drafts"])
def random(request: pytest.FixtureRequest) -> Iterator[Live]:
    """Says anything."""
    with live(request.param, None) as found:
        yield found


@pytest.fixture(scope="session")
def strict() -> Iterator[Live]:
    """Scripted, wants a key, takes one request at a time and small bodies."""
    with live(0, Script({}), key="secret", most_bytes=4000, most=1) as found:
        yield found


@pytest.fixture(scope="session")
def live_server() -> Iterator[str]:
    """The address of one that says something to everything, a little slowly."""
    reply = "Let me think of it, for a while.</think>" + "It goes on and on, as the sea does. " * 80
    with live(3, Script({"[gMASK]": reply}, 0.005), layers=4) as found:
        yield f"{found.url}/"
