"""Generation over token ids; no text here."""

from nanoglm.engine.generate import SamplingParams, generate
from nanoglm.engine.sampler import sample

__all__ = ["SamplingParams", "generate", "sample"]
