"""JSON schemas as tools and clients have them, drawn for tests that hold of any."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
from hypothesis import strategies as st

NAMES = ["a", "city", "größe", "a b", 'q"q', "d/e", "名前", "true", "</arg_key>x", "a_rather_long_name_of_a_property"]
VALUES = ["a", "bb", "red", "ü", '"q"', "null", "1", "a rather long value of an enumeration", 1, 2.5, None, True, [1]]
NODE = {
    "type": "object", "additionalProperties": False, "required": ["value", "next"],
    "properties": {
        "value": {"type": "integer"}, "kind": {"enum": ["leaf", "node"]},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        "inner": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    },
}  # fmt: skip
PATTERNS = [r"^[a-z]+@[a-z]+$", r"^\d{3}-\d{4}$", "[A-Z]", "^(foo|barbaz)$", "^a/b?"]


def is_valid(schema: Any, value: Any) -> bool:
    """Whether a value is of a schema. One with a number beyond any float counts, whatever it is: a random model likes
    those, a grammar allows them, and arguments that hold one are read as text."""
    text = json.dumps(value)
    return "Infinity" in text or re.search(r"\d[eE]\+?\d{3}", text) is not None or jsonschema_rs.is_valid(schema, value)


def strings() -> st.SearchStrategy[dict[str, Any]]:
    """Those that GLM writes raw."""
    return st.one_of(
        st.just({"type": "string"}),
        st.just({"type": ["string", "null"]}),
        st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, *[st.integers(0, 9)] * 2),
        st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
        st.lists(st.sampled_from(VALUES[:8]), min_size=1, max_size=3, unique=True).map(lambda found: {"enum": found}),
        st.just({"anyOf": [{"type": "string", "enum": ["red", "green"]}, {"type": "null"}]}),
    )  # fmt: skip


def scalars() -> st.SearchStrategy[Any]:
    return st.one_of(
        strings(),
        st.sampled_from(["integer", "boolean", "null"]).map(lambda kind: {"type": kind}),
        # With a bound: a random model likes exponents beyond any float.
        st.just({"type": "number", "minimum": -0.5, "maximum": 1000}),
        st.builds(lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, *[st.integers(0, 99)] * 2),
        st.lists(st.sampled_from(VALUES), min_size=1, max_size=4).map(lambda found: {"enum": found}),
        st.sampled_from(VALUES).map(lambda value: {"const": value}),
        st.just({"type": ["integer", "null"]}),
        st.just({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]}),
        st.just({"$ref": "#/$defs/node"}),
    )  # fmt: skip


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], left_out: set[str], more: Any) -> dict[str, Any]:
        required = [name for name in properties if name not in left_out]
        found = {"type": "object", "properties": properties, "required": required}
        return found if more is None else found | {"additionalProperties": more}

    names, more = st.sampled_from(NAMES), st.sampled_from([None, False, {"type": "boolean"}])
    return st.builds(build, st.dictionaries(names, inner, max_size=4), st.sets(names), more)


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner, st.integers(0, 2), st.integers(0, 3),
    )  # fmt: skip


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Of an object with anything in it."""
    values = st.recursive(
        scalars(),
        lambda inner: st.one_of(
            objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found})
        ),
        max_leaves=8,
    )
    return objects(values).map(lambda schema: schema | {"$defs": {"node": NODE}})
