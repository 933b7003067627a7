"""What the model says, taken apart as it comes: thought, content and tool calls.

::

    thought </think> content <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call> content

Text comes in pieces of any size. A lexer parts it into tags and what is between, and holds back what may become a tag;
a state machine takes one such piece after the other. What it hands out is never taken back and does not depend on how
the text was cut. Where sources of the serving spec disagree, that decides:

- **Thought** ends at ``</think>`` or at a call, and is kept as written. A text without either is all thought, however
  it ended: it has been handed out as such.
- **Content** is as written, between and behind calls too, but begins with its first character that is not blank: what
  is blank only is none. ``</think>`` in it is left out, and ``<think>`` leads back into thought.
- **A call** is one when its name, that of a declared function, is followed by its arguments or its end. Everything else
  behind ``<tool_call>`` is text of where it stands, tags included: prose, unknown names, output that ends there.
  Two openers in a row are one, and a second ``</tool_call>`` is left out.
- **A call once begun stays one.** Cut off in the middle its JSON is closed, with what was certain. It is complete (it
  counts in ``calls``) if ``</tool_call>`` came or the model stopped by itself.
- **A missing tag** is made up for: the opener of a value, the opener of the first key (if what is before is a declared
  name), the closer of a key. A closer of a value directly behind the name is left out.
- **A value** ends at the first ``</arg_value>`` that another tag of the call follows (``<arg_key>``, ``</tool_call>``,
  or the next ``<tool_call>``): other tags in a value are data. Where none does, it ends at the last ``</arg_value>``,
  the rest being lost, or at the end of all.
- **Without tools** their markup is text, wherever it stands.

How values become JSON: :mod:`nanoglm.chat.arguments`. Source: serving spec 3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

from nanoglm.chat.arguments import Arguments
from nanoglm.errors import InputError

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
THINK_TAGS = (THINK, THINK_END)
CALL_TAGS = (CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END)
LONGEST = max(map(len, THINK_TAGS + CALL_TAGS))
SLACK = 256  # characters behind a name (a key, blanks) until it is held to be prose

Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True)
class Delta:
    """A piece of what the model said.

    Attributes:
        kind: what it belongs to.
        text: of a call, the function's name, complete; of arguments, a fragment of the JSON object.
        index: of the call, for both.
    """

    kind: Kind
    text: str
    index: int = 0


@dataclass(frozen=True)
class Call:
    """A function that the model calls."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """All that the model said; None for what it said nothing of.

    Attributes:
        calls: those that were begun, so the last one may be cut off (:class:`Parser`).
        ended: whether reasoning ended.
    """

    reasoning: str | None
    content: str | None
    calls: tuple[Call, ...]
    ended: bool


class State(Enum):
    """Where the next piece of text stands."""

    TEXT = auto()  # thought or content
    NAME = auto()  # behind <tool_call>
    BETWEEN = auto()  # behind a name without a key yet; only tags count
    KEY = auto()
    BEFORE_VALUE = auto()  # behind </arg_key>
    VALUE = auto()
    AFTER_VALUE = auto()  # behind an </arg_value> that may be part of the value
    DONE = auto()


class Parser:
    """Takes one output apart, piece by piece.

    Args:
        thinking: whether the prompt ends inside a thought, that is with ``<think>``.
        tools: declarations of functions, OpenAI's with or without wrapper, or the flat ones of Responses. Without any,
            markup of calls is plain text.

    Raises:
        InputError: a tool is no function with a name.
    """

    def __init__(self, thinking: bool, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._parameters = _parameters_by_name(tools or ())
        self._tags = frozenset(THINK_TAGS + CALL_TAGS if self._parameters else THINK_TAGS)
        self._tag = re.compile("|".join(map(re.escape, self._tags)))
        self._partial = ""  # the end of the text so far, if it may be the beginning of a tag
        self._state, self._thinking = State.TEXT, thinking
        self._blank = True  # no content yet
        self._called = False  # nothing but blanks since a call
        self._held = list[str]()  # NAME: raw text of what may be a call. KEY: the key. AFTER_VALUE: all since its end
        self._stray = False  # AFTER_VALUE: something that cannot follow a value
        self._begun = self._completed = 0
        self._said = list[tuple[Kind, int, list[str]]]()  # since the last push

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is still thought."""
        return self._thinking

    @property
    def calls(self) -> int:
        """How many calls are complete."""
        return self._completed

    def push(self, text: str, literal: bool = False) -> list[Delta]:
        """The next piece of the output; nothing counts after :meth:`finish`.

        Args:
            literal: it is no markup, whatever it spells. Tags are never pushed in parts then.
        """
        for piece in [text] if literal and text else self._pieces(text, last=False):
            self._take(piece)
        return self._deltas()

    def finish(self, stopped: bool = False) -> list[Delta]:
        """The end of the output.

        Args:
            stopped: by an end token of the model; otherwise it was cut off.
        """
        for piece in self._pieces("", last=True):
            self._take(piece)
        if self._state is State.NAME:
            self._release()
        elif self._state not in (State.TEXT, State.DONE):
            if self._state is State.VALUE:
                self._say("arguments", self._arguments.cut(stopped))
            elif self._state is State.AFTER_VALUE:
                self._say("arguments", self._arguments.close())
            self._end_call(complete=stopped)
        self._state = State.DONE
        return self._deltas()

    # ------------------------------------------------------------------------------- lexer
    def _pieces(self, text: str, last: bool) -> Iterator[str]:
        """Tags and the texts between them."""
        text, begin = self._partial + text, 0
        for match in self._tag.finditer(text):
            if begin < match.start():
                yield text[begin : match.start()]
            yield match.group()
            begin = match.end()
        end = len(text)
        start = text.rfind("<", max(begin, end - LONGEST + 1))
        if not last and start >= 0 and any(tag.startswith(text[start:]) for tag in self._tags):
            end = start
        self._partial = text[end:]
        if begin < end:
            yield text[begin:end]

    # ------------------------------------------------------------------------------- states
    def _take(self, piece: str) -> None:
        match self._state:
            case State.TEXT:
                self._take_text(piece)
            case State.NAME:
                self._take_name(piece)
            case State.BETWEEN:
                self._take_between(piece)
            case State.KEY:
                self._take_key(piece)
            case State.BEFORE_VALUE:
                self._take_before_value(piece)
            case State.VALUE:
                self._take_value(piece)
            case State.AFTER_VALUE:
                self._take_after_value(piece)

    def _take_text(self, piece: str) -> None:
        if piece not in self._tags:  # without tools a piece can spell a call's tag and be none
            self._say_text(piece)
        elif piece in THINK_TAGS:
            self._thinking = piece == THINK
        elif piece == CALL:
            self._state, self._held = State.NAME, [piece]
        elif not (piece == CALL_END and self._called):
            self._say_text(piece)

    def _take_name(self, piece: str) -> None:
        text = "".join(self._held[1:])
        name = text.strip()
        if piece not in self._tags:
            self._held.append(piece)
            if not self._may_be_call(text + piece):
                self._release()
        elif piece == CALL and not name:
            self._held = [piece]  # the first opener was a slip
        elif piece in (KEY, CALL_END) and name in self._parameters:
            self._begin_call(name)
            self._take_between(piece)
        elif piece == VALUE_END and name in self._parameters:
            self._begin_call(name)
        elif piece == KEY_END and (split := self._split(name)):
            self._begin_call(split[0])
            self._arguments.open(split[1])
            self._state = State.BEFORE_VALUE
        else:
            self._release()
            self._take_text(piece)

    def _take_between(self, piece: str) -> None:
        """Also what goes on from KEY, BEFORE_VALUE and AFTER_VALUE."""
        if piece == KEY:
            self._state, self._held = State.KEY, []
        elif piece in (CALL, CALL_END):
            self._end_call(complete=True)
            if piece == CALL:
                self._take_text(piece)

    def _take_key(self, piece: str) -> None:
        if piece in (KEY_END, VALUE_END, VALUE):
            self._arguments.open("".join(self._held).strip())
            self._state = State.VALUE if piece == VALUE else State.BEFORE_VALUE
        elif piece in CALL_TAGS:
            self._take_between(piece)
        else:
            self._held.append(piece)

    def _take_before_value(self, piece: str) -> None:
        if piece == VALUE:
            self._state = State.VALUE
        elif piece == VALUE_END:
            self._take_value(piece)
        elif piece in CALL_TAGS:  # the key has no value
            self._take_between(piece)
        elif text := piece.lstrip():
            self._state = State.VALUE
            self._take_value(text)

    def _take_value(self, piece: str) -> None:
        if piece == VALUE_END:
            self._state, self._held, self._stray = State.AFTER_VALUE, [piece], False
        else:
            self._say("arguments", self._arguments.push(piece))

    def _take_after_value(self, piece: str) -> None:
        if piece == VALUE_END:  # so the one before was data
            self._say("arguments", self._arguments.push("".join(self._held)))
            self._take_value(piece)
        elif piece in (KEY, CALL, CALL_END) and not self._stray:
            self._say("arguments", self._arguments.close())
            self._take_between(piece)
        else:
            self._held.append(piece)
            self._stray = self._stray or not piece.isspace()

    # ------------------------------------------------------------------------------- calls
    def _may_be_call(self, text: str) -> bool:
        """Whether text behind <tool_call> is the beginning of a name, or a name and more."""
        text = text.lstrip() if len(text) <= SLACK else text
        return any(
            name.startswith(text) or (text.startswith(name) and len(text) <= len(name) + SLACK)
            for name in self._parameters
        )

    def _split(self, text: str) -> tuple[str, str] | None:
        """A declared name and the key that stands behind it without its tag: one that is declared, or the shortest."""
        pairs = [(name, text[len(name) :].strip()) for name in self._parameters if text.startswith(name)]

        def order(pair: tuple[str, str]) -> tuple[bool, int]:
            parameters = self._parameters[pair[0]]
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return isinstance(properties, Mapping) and pair[1] in properties, len(pair[0])

        return max((pair for pair in pairs if pair[1]), key=order, default=None)

    def _begin_call(self, name: str) -> None:
        self._say("call", name, self._begun)
        self._arguments = Arguments(self._parameters[name])
        self._state, self._thinking = State.BETWEEN, False
        self._begun += 1

    def _end_call(self, complete: bool) -> None:
        self._say("arguments", self._arguments.end())
        self._completed += complete
        self._state, self._called = State.TEXT, True

    def _release(self) -> None:
        """What looked like a call is text."""
        self._state = State.TEXT
        self._say_text("".join(self._held))

    # ------------------------------------------------------------------------------- deltas
    def _say_text(self, text: str) -> None:
        self._called = self._called and text.isspace()
        if self._thinking:
            self._say("reasoning", text)
        elif text := text.lstrip() if self._blank else text:
            self._blank = False
            self._say("content", text)

    def _say(self, kind: Kind, text: str, index: int | None = None) -> None:
        if index is None:
            index = self._begun - 1 if kind == "arguments" else 0
        if text and self._said and self._said[-1][:2] == (kind, index):
            self._said[-1][2].append(text)
        elif text:
            self._said.append((kind, index, [text]))

    def _deltas(self) -> list[Delta]:
        said, self._said = self._said, []
        return [Delta(kind, "".join(texts), index) for kind, index, texts in said]


def parse(text: str, thinking: bool, tools: Sequence[Mapping[str, Any]] | None = None, stopped: bool = True) -> Message:
    """A complete output, taken apart: the deltas of :class:`Parser`, joined.

    Raises:
        InputError: as :class:`Parser` raises it.
    """
    parser = Parser(thinking, tools)
    texts: dict[tuple[str, int], str] = {}
    for delta in parser.push(text) + parser.finish(stopped):
        texts[delta.kind, delta.index] = texts.get((delta.kind, delta.index), "") + delta.text
    calls = [
        Call(name, json.loads(texts["arguments", index])) for (kind, index), name in texts.items() if kind == "call"
    ]
    return Message(texts.get(("reasoning", 0)), texts.get(("content", 0)), tuple(calls), not parser.reasoning)


def _parameters_by_name(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    result = dict[str, Any]()
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InputError(f"tools[{i}] is {tool!r}; expected a function with a name")
        result[name] = function.get("parameters")
    return result
