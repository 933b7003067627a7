"""Pieces of one reply as blocks: thought, text and calls in the order of their coming, each opened and closed once.

Anthropic's content blocks and the Responses API's output items are both this.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nanoglm.server.service import Piece


@dataclass
class Block:
    """``text`` is a call's arguments, JSON. ``last``: nothing came behind it; known when it closes."""

    number: int
    kind: Literal["reasoning", "content", "call"]
    name: str = ""
    text: str = ""
    last: bool = False


class Change(NamedTuple):
    """What happened to a block; ``text`` is new in it."""

    what: Literal["open", "more", "close"]
    block: Block
    text: str = ""


async def changes(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Change, None]:
    """Pieces of one reply as changes of its blocks."""
    block, count = None, 0
    async for piece in pieces:
        for delta in piece.deltas:
            kind = "call" if delta.kind == "arguments" else delta.kind
            if block is None or delta.kind == "call" or kind != block.kind:
                if block is not None:
                    yield Change("close", block)
                block = Block(count, kind, delta.text if delta.kind == "call" else "")
                count += 1
                yield Change("open", block)
            if delta.kind != "call":
                block.text += delta.text
                yield Change("more", block, delta.text)
    if block is not None:
        block.last = True
        yield Change("close", block)
