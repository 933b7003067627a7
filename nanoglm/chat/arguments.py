"""A call's arguments: the model's text in, a JSON object out, each part as soon as it is certain.

The model writes strings raw and everything else as JSON, so only the function's declaration tells ``123`` from
``"123"``. The JSON types that a schema allows decide how a value is read:

- Strings only: as written, and written on as it comes. Quotes go if the value is one quoted string that is no valid
  JSON, so one that begins with a quote waits until that is decided. Where null is allowed too, the bare word null is.
- Everything else waits for its end and is then read as JSON, as JSON inside a JSON string, as JSON escaped once more,
  or as a Python literal: the first that gives an allowed type. Else it is what it is as JSON, or, where that fails or
  strings are allowed, a string. Valid JSON is handed out as written, so numbers keep their digits.

Of a key that comes twice the first value counts: it may be on its way already.

Source: serving spec 3.3.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nanoglm.chat.schema import DEEPEST, Schema, kinds

_INSIDE_QUOTES = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
# What may be a Python literal. All others, a date or 1or 2, would only make Python's parser complain.
_LITERAL = re.compile(r"[\[{'\"]|(?:True|False|None|-?[0-9_.]+(?:[eE][-+]?[0-9]+)?)\Z")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class Arguments:
    """The arguments of one call: for each, :meth:`open`, :meth:`push` and :meth:`close`; at last :meth:`end`.

    What they return are fragments of one JSON object. Text is never pushed empty.

    Args:
        parameters: the function's JSON schema; anything else means that nothing is known about it.
    """

    def __init__(self, parameters: Any) -> None:
        self._schema = Schema(parameters)
        self._read: dict[str, Any] = {}
        self._written = False

    def open(self, key: str) -> None:
        """A value begins."""
        types = self._schema.types_of(key, self._read)
        self._key, self._types, self._pieces = key, types, list[str]()
        self._is_text, self._nullable = "string" in types and types <= {"string", "null"}, "null" in types
        self._streams = False  # whether its beginning was handed out
        self._tail = ""  # of a value that begins with a quote: what is behind the string's inside, see _certain

    def push(self, text: str) -> str:
        """More of the value."""
        self._pieces.append(text)
        if self._streams:
            return _dumps(text)[1:-1]
        if not self._is_text or self._key in self._read or not self._certain(text):
            return ""
        self._streams = True
        return self._label() + _dumps("".join(self._pieces))[:-1]

    def close(self) -> str:
        """The value is complete."""
        text = "".join(self._pieces)
        if self._streams:
            self._read[self._key] = text
            return '"'
        if self._key in self._read:
            return ""
        if self._is_text:
            value = None if self._nullable and text == "null" else self._without_quotes(text)
            written = _dumps(value)
        else:
            value, written = _typed(text, self._types)
        self._read[self._key] = value
        return self._label() + written

    def cut(self, stopped: bool) -> str:
        """The output ends inside the value. Part of a number or an object would be another one: it is left out.

        Args:
            stopped: the model ended it, so the value is complete and only its closing tag is missing.
        """
        text = "".join(self._pieces)
        if not self._is_text:
            before, tag, _ = text.partition("</tool_call>")
            if tag and not isinstance(_typed(before, self._types)[0], str):
                self._pieces = [before]
            elif not stopped:
                return ""
        return self.close()

    def end(self) -> str:
        """There are no more arguments."""
        return "}" if self._written else "{}"

    def _label(self) -> str:
        start, self._written = ", " if self._written else "{", True
        return f"{start}{_dumps(self._key)}: "

    def _certain(self, text: str) -> bool:
        """Whether the string stands as it is, whatever follows: it is not null, its quotes not around all of it."""
        if self._nullable and len(self._pieces) <= 4 and "null".startswith("".join(self._pieces)):
            return False
        if not self._pieces[0].startswith('"') or self._tail == '"':
            return True
        text = self._tail + (text[1:] if len(self._pieces) == 1 else text)
        inside = _INSIDE_QUOTES.match(text)
        self._tail = text[inside.end() if inside else 0 :]  # nothing, half an escape, or all from the closing quote on
        return len(self._tail) > 1

    def _without_quotes(self, text: str) -> str:
        if self._tail == '"':
            try:
                _json(text)
            except (ValueError, RecursionError):
                return text[1:-1]
        return text


# ------------------------------------------------------------------------------- reading a value
def _typed(text: str, types: frozenset[str]) -> tuple[Any, str]:
    """A value that may be of these types, and its JSON."""
    first = None
    for value, written in _readings(text):
        if kinds(value) & types:
            return value, written
        first = first or (value, written)
    return first if first and "string" not in types else (text, _dumps(text))


def _readings(text: str) -> Iterator[tuple[Any, str]]:
    """What the text can mean, the likeliest first, with its JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        value = _json(text)
        yield value, _escaped(text.strip())
        if isinstance(value, str):
            yield _json(value), _escaped(value.strip())
    if "\\" in text:
        with contextlib.suppress(ValueError, RecursionError):
            inner = json.loads(f'"{text}"', strict=False)
            yield _json(inner), _escaped(inner.strip())
    text = text.strip()
    if _LITERAL.match(text):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            # An unknown escape stays what it is: Python does that, too, but warns. A number is a regex's, not octal.
            known = r"\\'" + '"abfnrtvxuUN\n'
            text = _ESCAPE.sub(lambda match: match[0] if match[1] in known else "\\" + match[0], text)
            value = ast.literal_eval(text)
            if not _is_plain(value):
                return
            yield value, _dumps(value)


def _json(text: str) -> Any:
    """Of JSON text, without what Python's reader adds (NaN) and what others could not read back.

    Raises:
        ValueError, RecursionError: it is none.
    """
    value = json.loads(text)
    if not _is_plain(value):
        raise ValueError("not finite, or too deep")
    return value


def _is_plain(value: Any, left: int = DEEPEST) -> bool:
    """Whether JSON can hold it, numbers are finite and nothing is nested too deep."""
    if isinstance(value, Mapping):
        keys = all(isinstance(key, str | int | float | None) for key in value)
        return left > 0 and keys and all(_is_plain(item, left - 1) for item in value.values())
    if isinstance(value, list | tuple):
        return left > 0 and all(_is_plain(item, left - 1) for item in value)
    return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))


def _dumps(value: Any) -> str:
    return _escaped(json.dumps(value, ensure_ascii=False))


def _escaped(text: str) -> str:
    """JSON whose strings hold no half of a surrogate pair, which no UTF-8 could hold."""
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
