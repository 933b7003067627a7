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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_INSIDE_QUOTES = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
# What may be a Python literal. All others, a date or 1or 2, would only make Python's parser complain.
_LITERAL = re.compile(r"[\[{'\"]|(?:True|False|None|-?[0-9_.]+(?:[eE][-+]?[0-9]+)?)\Z")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
DEEPEST = 100  # nesting of a value or a schema that is followed: whoever reads the JSON again has a limit, too


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
        if _kinds(value) & types:
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


def _kinds(value: Any) -> set[str]:
    """The JSON types of a value: 2 and 2.0 are an integer and a number."""
    if isinstance(value, float) and not value.is_integer():
        return {"number"}
    names = {str: "string", bool: "boolean", dict: "object", list: "array", tuple: "array", type(None): "null"}
    return {names[type(value)]} if type(value) in names else {"number", "integer"}


def _dumps(value: Any) -> str:
    return _escaped(json.dumps(value, ensure_ascii=False))


def _escaped(text: str) -> str:
    """JSON whose strings hold no half of a surrogate pair, which no UTF-8 could hold."""
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


# ------------------------------------------------------------------------------- the schema
class Schema:
    """A JSON schema of an object, asked for the types of its properties. What it does not understand allows all."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._by_reference: dict[str, frozenset[str]] = {}

    def types_of(self, key: str, read: Mapping[str, Any]) -> frozenset[str]:
        """The JSON types that a property may have; a number may be an integer.

        Args:
            read: the properties that are known already: alternatives that contradict them do not count.
        """
        self._key, self._read, self._seen = key, read, set[str]()
        return self._property(self._root) or TYPES

    def _property(self, schema: Any, left: int = DEEPEST) -> frozenset[str] | None:
        """As :meth:`types_of`; None if this schema says nothing about the key. Each reference is followed once."""
        if not isinstance(schema, Mapping) or left == 0:
            return None
        said, key = list[frozenset[str] | None](), self._key
        properties, others = schema.get("properties"), schema.get("additionalProperties")
        if isinstance(properties, Mapping) and key in properties:
            said.append(self._types(properties[key]))
        elif isinstance(others, Mapping):
            said.append(self._types(others))
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._seen:
            self._seen.add(reference)
            said.append(self._property(self._target(reference), left - 1))
        said += [self._property(part, left - 1) for part in _list(schema.get("allOf"))]
        for name in ("anyOf", "oneOf"):
            parts = [part for part in _list(schema.get(name)) if self._allows(part)]
            found = [types for part in parts if (types := self._property(part, left - 1))]
            said.append(frozenset[str]().union(*found) or None)
        known = [types for types in said if types]
        return TYPES.intersection(*known) or TYPES if known else None

    def _allows(self, schema: Any) -> bool:
        """Whether properties that tell alternatives apart, by const or enum, have the values that were read."""
        for _ in range(8):  # references to references
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                break
            schema = self._target(schema["$ref"])
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if not isinstance(properties, Mapping):
            return True
        return all(value in _choices(properties.get(key), [value]) for key, value in self._read.items())

    def _types(self, schema: Any, left: int = DEEPEST) -> frozenset[str]:
        if not isinstance(schema, Mapping) or left == 0:
            return TYPES
        found, declared = TYPES, schema.get("type")
        names = TYPES.intersection(name for name in _list(declared, [declared]) if isinstance(name, str))
        if names:
            found &= names | ({"integer"} if "number" in names else set())
        if "const" in schema or isinstance(schema.get("enum"), list):
            found &= frozenset[str]().union(*(_kinds(choice) for choice in _choices(schema, [])))
        for name in ("anyOf", "oneOf"):
            if parts := _list(schema.get(name)):
                found &= frozenset[str]().union(*(self._types(part, left - 1) for part in parts))
        for part in _list(schema.get("allOf")):
            found &= self._types(part, left - 1)
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference not in self._by_reference:
                self._by_reference[reference] = TYPES  # what one says that is asked by itself
                self._by_reference[reference] = self._types(self._target(reference), left - 1)
            found &= self._by_reference[reference]
        return found or TYPES

    def _target(self, reference: str) -> Any:
        """What a JSON pointer into this schema points at; None if it leads nowhere."""
        found, (start, *path) = self._root, reference.split("/")
        for part in path if start == "#" else ["?"]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def _list(value: Any, otherwise: Sequence[Any] = ()) -> Sequence[Any]:
    return value if isinstance(value, list) else otherwise


def _choices(schema: Any, otherwise: Sequence[Any]) -> Sequence[Any]:
    """The only values that a schema allows, if it names them."""
    if not isinstance(schema, Mapping):
        return otherwise
    if "const" in schema:
        return [schema["const"]]
    return _list(schema.get("enum"), otherwise)
