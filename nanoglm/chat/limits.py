"""How much of a JSON schema is taken.

A schema comes from a client: it may be wrong, or without end, and is compiled while others wait for their tokens.
:func:`check_schema` comes before all else that reads one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nanoglm.chat.schema import Schema
from nanoglm.errors import InputError

DEEPEST = 64  # schemas within each other
MOST_SCHEMAS = 10_000  # in one
MOST_PROPERTIES = 1000  # of one object: as each may be left out, a grammar grows with their square
MOST_CHOICES = 10_000  # of an enum
MOST_PATTERNS = 16  # that may have to hold together: the time to compile them doubles with each
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_NOTES = {"title", "description", "default", "examples", "$comment", "$schema", "$id", "$defs", "definitions"}
_NUMBERS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def check_schema(schema: Any, where: str) -> None:
    """Raises InputError if what is read of a schema is of a wrong kind, or there is too much of it.

    Args:
        where: its name in the error.
    """
    patterns = 0
    for count, (part, place, depth, meets) in enumerate(_schemas(schema, where)):
        if count >= MOST_SCHEMAS or depth > DEEPEST:
            most = f"{MOST_SCHEMAS} schemas in all, {DEEPEST} within each other"
            raise InputError(f"{where} is too large a schema; expected at most {most}")
        if not isinstance(part, bool):
            _check(part, place)
            patterns += meets and ("pattern" in part or "format" in part)
        if patterns > MOST_PATTERNS:
            raise InputError(f"{where} has more than {MOST_PATTERNS} patterns under allOf; expected fewer")


def _check(schema: Any, where: str) -> None:
    def check(name: str, good: bool, expected: str) -> None:
        if not good:
            raise InputError(f"{where}.{name} is {schema[name]!r}; expected {expected}")

    if not isinstance(schema, Mapping):
        raise InputError(f"{where} is {schema!r}; expected a JSON schema")
    for name in _NAMED:
        check(name, isinstance(schema.get(name, {}), Mapping), "an object")
    for name in (*_LISTED, "enum"):
        check(name, isinstance(schema.get(name, []), list), "a list")
    for name in _NUMBERS:
        check(name, isinstance(schema.get(name, 0), int) and schema.get(name, 0) >= 0, "a whole number, 0 or more")
    for name in ("pattern", "$ref"):
        check(name, isinstance(schema.get(name, ""), str), "text")
    required = schema.get("required", [])
    check("required", isinstance(required, list) and all(isinstance(r, str) for r in required), "a list of names")
    if len(schema.get("enum", ())) > MOST_CHOICES:
        raise InputError(f"{where}.enum has {len(schema['enum'])} values; expected at most {MOST_CHOICES}")
    if max(len(schema.get("properties", {})), len(required)) > MOST_PROPERTIES:
        raise InputError(f"{where} has more than {MOST_PROPERTIES} properties; expected fewer")


def _schemas(root: Any, where: str = "") -> Iterator[tuple[Any, str, int, bool]]:
    """Every schema that one holds or refers to, itself first: each once, with its place, its depth, and whether it must
    hold together with another one.

    Whoever stops at a wrong one is not led further into it.
    """
    left, seen, whole = [(root, where, 0, False)], set[tuple[int, bool]](), Schema(root)
    while left:
        schema, where, depth, meets = left.pop()
        if (id(schema), meets) in seen:
            continue
        yield schema, where, depth, meets
        if isinstance(schema, Mapping):
            seen.add((id(schema), meets))
            meets = meets or (("allOf" in schema or "$ref" in schema) and len(schema.keys() - _NOTES) > 1)
            meets = meets or len(schema.get("allOf", ())) > 1
            below = [(schema[name], f"{where}.{name}") for name in _SINGLE if name in schema]
            for name in _NAMED:
                below += [(part, f"{where}.{name}.{key}") for key, part in schema.get(name, {}).items()]
            for name in _LISTED:
                below += [(part, f"{where}.{name}[{i}]") for i, part in enumerate(schema.get(name, ()))]
            if "$ref" in schema:
                below.append((whole.resolve(schema), f"{where}.$ref"))
            left += [(part, place, depth + 1, meets) for part, place in below]
