"""Generation over token ids; no text here."""

from nanoglm.engine.asynchronous import AsyncEngine
from nanoglm.engine.engine import Engine
from nanoglm.engine.generate import generate
from nanoglm.engine.params import SamplingParams
from nanoglm.engine.request import Request
from nanoglm.engine.sampler import sample

__all__ = ["AsyncEngine", "Engine", "Request", "SamplingParams", "generate", "sample"]
