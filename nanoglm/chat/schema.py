"""What a JSON schema says, as far as writing values of it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

TYPES = frozenset(("string", "number", "integer", "boolean", "null", "object", "array"))


def resolve(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a chain of ``$ref`` within ``root`` leads to; an empty one for what is none."""
    for _ in range(32):  # a chain that turns in a circle says nothing
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = root
        for part in reference.lstrip("#/").split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(part) if isinstance(schema, Mapping) else None
    return {}


def possible_types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The types that a value may have, by the names of JSON schema; of an empty schema all."""
    schema = resolve(schema, root)
    if isinstance(found := schema.get("type"), str | list):
        return TYPES & {found} if isinstance(found, str) else TYPES & {t for t in found if isinstance(t, str)}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return frozenset(_type_of(value) for value in values)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            return frozenset().union(*(possible_types(choice, root) for choice in schema[name]))
    return TYPES


def _type_of(value: Any) -> str:
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def longest_minimum(schema: Any) -> int:
    """A bound on the bytes of JSON that one token can make necessary which need not have been: what the largest thing
    in the schema that may be left out takes at least, counting choices by their longest."""
    root = schema if isinstance(schema, Mapping) else {}
    optional = max((_minimum(part, root, 0) for part in _parts(schema)), default=0)
    return min(optional, _MOST) + 32


_MOST = 1 << 20  # a schema that asks for more of itself has no least value


def _minimum(schema: Any, root: Mapping[str, Any], depth: int) -> int:
    """Bytes that a value takes at least, of choices the longest."""
    schema = resolve(schema, root)
    if depth > 16:
        return _MOST
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return max((len(json.dumps(value)) for value in values), default=0)
    below = [
        _minimum(choice, root, depth + 1) for name in ("anyOf", "oneOf", "allOf") for choice in schema.get(name) or ()
    ]
    required = schema.get("required") or ()
    properties = schema.get("properties") or {}
    inner = sum(len(json.dumps(name)) + 4 + _minimum(properties.get(name), root, depth + 1) for name in required)
    inner += _number(schema, "minItems") * (2 + _minimum(schema.get("items"), root, depth + 1))
    return 24 + inner + _number(schema, "minLength") + max(below, default=0)


def _number(schema: Mapping[str, Any], name: str) -> int:
    value = schema.get(name, 0)
    return value if isinstance(value, int) else 0


def _parts(schema: Any) -> Iterator[Any]:
    """Every schema within a schema, and itself."""
    yield schema
    for value in schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ():
        if isinstance(value, Mapping | list):
            yield from _parts(value)
