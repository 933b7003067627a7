"""Conversations for a model that exists: loss on what the assistant says, thinking and tool calls included.

nanoglm train recipes/sft.py --init runs/nano --conversations train.jsonl --out runs/chat
"""

from nanoglm.train.recipe import Recipe, sft


def recipe() -> Recipe:
    """A tenth of the rate that the model was trained with."""
    return Recipe(steps=500, warmup=20, rate=8e-4, stages=(sft(1.0, 512),))
