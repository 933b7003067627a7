"""Streams by the dozen, some left by their clients: all others are whole, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os

import pytest
from server.load import check, growth, load, metrics
from server.scripted import scripted_model, serving

from nanoglm.engine import Engine
from nanoglm.server.service import Service


@pytest.mark.parametrize("seconds", [6, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_streams_under_load(seconds: int) -> None:
    model = scripted_model()  # random weights: every reply is drawn
    engine = Engine(model.module, pages=160, drafts=3, most=48)  # less room than is asked for: requests are sent back
    with serving(Service(model, engine, ["tiny"])) as url:
        before = metrics(url)
        seen = asyncio.run(load(url, seconds=seconds, streams=64, pid=os.getpid()))
        assert check(url, seen, before) == []
        assert seen.ended["finished"] > 64 and seen.ended["left"] > 5 and len(seen.tokens) == 4
        assert seconds < 60 or growth(seen) < 0.05
    engine.check()
    assert engine.prefix is not None and engine.cache.free_pages + len(engine.prefix) == engine.cache.pages
