"""What a JSON schema says, as far as reading and writing values of it needs.

Source: serving spec 3.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
DEEPEST = 100  # nesting of a value or a schema that is followed: whoever reads the JSON again has a limit, too


def kinds(value: Any) -> set[str]:
    """The JSON types of a value: 2 and 2.0 are an integer and a number."""
    if isinstance(value, float) and not value.is_integer():
        return {"number"}
    names = {str: "string", bool: "boolean", dict: "object", list: "array", tuple: "array", type(None): "null"}
    return {names[type(value)]} if type(value) in names else {"number", "integer"}


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

    def resolve(self, schema: Any) -> Mapping[str, Any]:
        """The schema that a chain of ``$ref`` leads to; an empty one for what is none."""
        for _ in range(8):  # a chain that turns in a circle says nothing
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                break
            schema = self.target(schema["$ref"])
        return schema if isinstance(schema, Mapping) and not isinstance(schema.get("$ref"), str) else {}

    def _property(self, schema: Any, left: int = DEEPEST) -> frozenset[str] | None:
        """As :meth:`types_of`; None if this schema says nothing about the key. Each reference is followed once."""
        if not isinstance(schema, Mapping) or left == 0:
            return None
        said, key = list[frozenset[str] | None](), self._key
        properties, others = schema.get("properties"), schema.get("additionalProperties")
        if isinstance(properties, Mapping) and key in properties:
            said.append(self.types(properties[key]))
        elif isinstance(others, Mapping):
            said.append(self.types(others))
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._seen:
            self._seen.add(reference)
            said.append(self._property(self.target(reference), left - 1))
        said += [self._property(part, left - 1) for part in _list(schema.get("allOf"))]
        for name in ("anyOf", "oneOf"):
            parts = [part for part in _list(schema.get(name)) if self._allows(part)]
            found = [types for part in parts if (types := self._property(part, left - 1))]
            said.append(frozenset[str]().union(*found) or None)
        known = [types for types in said if types]
        return TYPES.intersection(*known) or TYPES if known else None

    def _allows(self, schema: Any) -> bool:
        """Whether properties that tell alternatives apart, by const or enum, have the values that were read."""
        properties = self.resolve(schema).get("properties")
        if not isinstance(properties, Mapping):
            return True
        return all(value in _choices(properties.get(key), [value]) for key, value in self._read.items())

    def types(self, schema: Any, left: int = DEEPEST) -> frozenset[str]:
        """The JSON types that a value of a schema within this one may have."""
        if not isinstance(schema, Mapping) or left == 0:
            return TYPES
        found, declared = TYPES, schema.get("type")
        names = TYPES.intersection(name for name in _list([declared], declared) if isinstance(name, str))
        if names:
            found &= names | ({"integer"} if "number" in names else set())
        if "const" in schema or isinstance(schema.get("enum"), list):
            found &= frozenset[str]().union(*(kinds(choice) for choice in _choices(schema, [])))
        for name in ("anyOf", "oneOf"):
            if parts := _list(schema.get(name)):
                found &= frozenset[str]().union(*(self.types(part, left - 1) for part in parts))
        for part in _list(schema.get("allOf")):
            found &= self.types(part, left - 1)
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference not in self._by_reference:
                self._by_reference[reference] = TYPES  # what one says that is asked by itself
                self._by_reference[reference] = self.types(self.target(reference), left - 1)
            found &= self._by_reference[reference]
        return found or TYPES

    def target(self, reference: str) -> Any:
        """What a JSON pointer into this schema points at; None if it leads nowhere."""
        found, (start, *path) = self._root, reference.split("/")
        for part in path if start == "#" else ["?"]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def _list(*values: Any) -> list[Any]:
    """The last of the values that is a list."""
    return next((value for value in reversed(values) if isinstance(value, list)), [])


def _choices(schema: Any, otherwise: list[Any]) -> list[Any]:
    """The only values that a schema allows, if it names them."""
    if not isinstance(schema, Mapping):
        return otherwise
    if "const" in schema:
        return [schema["const"]]
    return _list(otherwise, schema.get("enum"))


# ------------------------------------------------------------------------------- how long a value is at least
_MOST = 1 << 20  # a schema that asks for more of itself has no least value
_REPEATS = re.compile(r"\{(\d{1,6})")


def longest_minimum(schema: Any, whole: bool = False) -> int:
    """A bound on the bytes of JSON that one token can make necessary which need not have been: what the largest thing
    in the schema that may be left out takes at least, its name included, or its longest choice.

    Args:
        whole: the schema itself may be left out, too.
    """
    least, found = _Least(schema), [0]
    found += [least.of(schema)] * whole
    for part in _parts(schema):
        found += [len(json.dumps(value)) for value in _choices(part, [])] + [_pattern(part)]
        found += [len(json.dumps(name)) + least.of(inner) for name, inner in _optional(part)]
    return min(max(found), _MOST) + 32


class _Least:
    """Bytes that values take at least; nearly, and rather more than less."""

    def __init__(self, schema: Any) -> None:
        root, references = Schema(schema), {part["$ref"] for part in _parts(schema) if _refers(part)}
        self._known = dict.fromkeys(references, _MOST)
        for _ in references:  # each round at least one of them gets its final value, as long as any does
            found = {reference: self.of(root.target(reference)) for reference in references}
            if found == self._known:
                break
            self._known = found

    def of(self, schema: Any, left: int = DEEPEST) -> int:
        """Of a schema."""
        if not isinstance(schema, Mapping) or left == 0:
            return _MOST if left == 0 else 24
        if _refers(schema):
            return self._known[schema["$ref"]]
        if choices := _choices(schema, []):
            return min(len(json.dumps(value)) for value in choices)
        found = 24 + _number(schema, "minLength") + _pattern(schema)
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        for name in _list(schema.get("required")):
            found += len(json.dumps(name)) + 4 + self.of(properties.get(name), left - 1)
        if items := _number(schema, "minItems"):
            found += items * (2 + self.of(schema.get("items"), left - 1))
        found += sum(self.of(part, left - 1) for part in _list(schema.get("allOf")))
        for name in ("anyOf", "oneOf"):
            found += min((self.of(part, left - 1) for part in _list(schema.get(name))), default=0)
        return min(found, _MOST)


def _refers(schema: Any) -> bool:
    return isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str)


def _pattern(schema: Any) -> int:
    """Bytes that a pattern asks for; a guess, since repetitions may be nested."""
    pattern = schema.get("pattern") if isinstance(schema, Mapping) else None
    return len(pattern) + sum(map(int, _REPEATS.findall(pattern))) if isinstance(pattern, str) else 0


def _number(schema: Mapping[str, Any], name: str) -> int:
    value = schema.get(name, 0)
    return value if isinstance(value, int) else 0


def _optional(schema: Any) -> Iterator[tuple[Any, Any]]:
    """What may be left out right in a schema: name and schema of properties, items, alternatives."""
    if not isinstance(schema, Mapping):
        return
    properties, required = schema.get("properties"), _list(schema.get("required"))
    if isinstance(properties, Mapping):
        yield from ((name, inner) for name, inner in properties.items() if name not in required)
    for name in ("prefixItems", "anyOf", "oneOf"):
        yield from (("", inner) for inner in _list(schema.get(name)))
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield "", schema[name]
    if isinstance(patterns := schema.get("patternProperties"), Mapping):
        yield from patterns.items()


def _parts(schema: Any) -> Iterator[Any]:
    """Every schema within a schema, and itself."""
    left = [schema]
    while left:
        found = left.pop()
        yield found
        inner = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
        left += [value for value in inner if isinstance(value, Mapping | list)]
