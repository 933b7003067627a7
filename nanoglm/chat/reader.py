"""Tokens of one reply in, what they say out; and how many of them were thought."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nanoglm.chat.parser import Delta, Parser
from nanoglm.chat.tokenizer import Tokenizer


class Reader:
    """Decodes and parses one reply.

    Args:
        thinking, tools: as :class:`Parser` takes them. raw: all is content, nothing is parsed.
        markup: the only tokens that can be markup, where a grammar knows its borders by them; whatever others spell is
            text then.

    Attributes:
        thought: tokens of reasoning so far. What ends it is none of them, nor is a call, once it is one.
        calls: completed so far.
    """

    def __init__(
        self, tokenizer: Tokenizer, thinking: bool, tools: Sequence[Mapping[str, Any]] | None = None, *,
        raw: bool = False, markup: Collection[int] | None = None,
    ) -> None:  # fmt: skip
        self._parser = None if raw else Parser(thinking, tools or None)
        self._text, self._markup = tokenizer.stream(), markup
        self._ends = [tokenizer.encode(tag)[0] for tag in ("</think>", "<tool_call>") if tag in tokenizer.added]
        self._tokens = self._counted = self.thought = 0

    @property
    def calls(self) -> int:
        return 0 if self._parser is None else self._parser.calls

    def push(self, token: int) -> list[Delta]:
        """The next token."""
        piece = self._text.push(token)
        self._tokens += 1
        if self._parser is None:
            return [Delta("content", piece)] if piece else []
        deltas = self._parser.push(piece, self._markup is not None and token not in self._markup)
        self._count(deltas, self._tokens - (token in self._ends))
        return deltas

    def finish(self, stopped: bool) -> list[Delta]:
        """The end. stopped: by an end token, not for want of room."""
        rest = self._text.flush()
        if self._parser is None:
            return [Delta("content", rest)] if rest else []
        deltas = self._parser.push(rest) + self._parser.finish(stopped)
        self._count(deltas, self._tokens)
        return deltas

    def _count(self, deltas: Sequence[Delta], tokens: int) -> None:
        """What was held back until it was known to be thought counts with what made it known."""
        for delta in deltas:
            if delta.kind == "reasoning":
                self.thought += tokens - self._counted
            self._counted = tokens
