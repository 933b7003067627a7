"""Schemas that clients should not send: refused in a sentence, and in a time that others can wait."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from nanoglm.chat.constraint import MOST_LEAST, Constraint, Grammars
from nanoglm.chat.limits import check_schema
from nanoglm.chat.schema import Schema, longest_minimum
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.errors import InputError

BYTES = byte_tokenizer()
END = BYTES.encode("<|endoftext|>")[0]
GRAMMARS = Grammars(BYTES, 320, (END,))
SECONDS = 5.0  # of a processor, for what takes one or two where nobody else is at it


def chain(kind: str, length: int, width: int = 2) -> dict[str, Any]:
    """References that part and meet again at every link."""
    links = {f"a{i}": {kind: [{"$ref": f"#/$defs/a{i + 1}"}] * width} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "string"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


MEET = {"type": "string", "pattern": "^(a|b)*a(a|b){1000}$"}
LINKED = {
    "type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "x": {"type": "integer"}},
    "required": ["next"],
}  # fmt: skip


# ------------------------------------------------------------------------------- form and size
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (5, r"s is 5; expected a JSON schema"),
        ({"properties": []}, r"s.properties is \[\]; expected an object"),
        ({"properties": {"a": 5}}, r"s.properties.a is 5; expected a JSON schema"),
        ({"$defs": 1}, r"s.\$defs is 1; expected an object"),
        ({"required": 5}, r"s.required is 5; expected a list of names"),
        ({"required": ["a", {}]}, r"s.required is .*; expected a list of names"),
        ({"anyOf": 5}, r"s.anyOf is 5; expected a list"),
        ({"enum": "a"}, r"s.enum is 'a'; expected a list"),
        ({"enum": [*range(10_001)]}, r"s.enum has 10001 values; expected at most 10000"),
        ({"items": [True]}, r"s.items is \[True\]; expected a JSON schema"),
        ({"minLength": "1}/"}, r"s.minLength is '1}/'; expected a whole number"),
        ({"maxItems": -1}, r"s.maxItems is -1; expected a whole number"),
        ({"properties": {"a": {"$ref": "#/x/b"}}, "x": {"b": {"required": 5}}}, r"s.properties.a.\$ref.required is 5"),
        (nested(65), r"s is too large a schema; expected at most 10000 schemas in all, 64 within each other"),
        ({"anyOf": [{"title": str(i)} for i in range(10_001)]}, r"s is too large a schema"),
        (optional(1001), r"s has more than 1000 properties"),
        ({"required": [str(i) for i in range(1001)]}, r"s has more than 1000 properties"),
        ({"allOf": [{"pattern": f"a{i}b"} for i in range(17)]}, r"s has more than 16 patterns under allOf"),
        (
            {"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {"allOf": [{"format": "date"} for _ in range(17)]}}},
            r"s has more than 16 patterns under allOf",
        ),
    ],
)  # fmt: skip
def test_what_is_no_schema_or_too_much_of_one(schema: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_schema(schema, "s")


@pytest.mark.parametrize(
    "schema",
    [
        {}, True, LINKED, nested(60), optional(1000), {"properties": {"properties": {"enum": []}, "required": True}},
        {"enum": [{"required": 5, "properties": 7}], "default": {"anyOf": 5}, "examples": 5},  # values, not schemas
        {"type": "object", "properties": {str(i): {"allOf": [{"pattern": "a"}], "title": "T"} for i in range(100)}},
    ],
)  # fmt: skip
def test_what_is_one(schema: Any) -> None:
    check_schema(schema, "s")


@pytest.mark.parametrize("kind", ["anyOf", "allOf"])
def test_references_that_meet_again_are_followed_once(kind: str) -> None:
    begin = time.process_time()
    schema = chain(kind, 30)
    check_schema(schema, "s")
    longest_minimum(schema)
    assert Schema(chain("anyOf", 30)).types(chain("anyOf", 30)) == {"string"}
    assert time.process_time() - begin < SECONDS


# ------------------------------------------------------------------------------- grammars
def write(grammar: Any, max_tokens: int, letters: str = "") -> tuple[list[int], float]:
    """A reply of random tokens, those of ``letters`` rather; and the seconds of the slowest mask."""
    constraint, draw, slowest = Constraint(GRAMMARS, max_tokens, thinking=False, grammar=grammar), random.Random(0), 0.0
    reply = list[int]()
    while len(reply) < max_tokens:
        begin = time.process_time()
        allowed_V = constraint(reply)
        slowest = max(slowest, time.process_time() - begin)
        assert allowed_V is not None
        allowed = allowed_V.nonzero().flatten().tolist()
        token = draw.choice([i for i in allowed if i in {*letters.encode()}] or allowed)
        if token == END:
            break
        reply.append(token)
    return reply, slowest


@pytest.mark.parametrize(
    "schema",
    [
        optional(1000), {"anyOf": [optional(900) | {"title": str(i)} for i in range(10)]}, chain("allOf", 30),
        chain("anyOf", 30), {"type": "string", "pattern": "a|" * 50_000}, {"enum": [f"v{i}" for i in range(10_000)]},
        {"type": "string", "allOf": [{"pattern": f"a{i}b"} for i in range(16)]}, {"type": "string", "minLength": 10**9},
        {"type": "string", "pattern": "^((.{0,1000}){0,1000}){0,1000}$"}, {"type": "array", "minItems": 10**9}, MEET,
        {"type": "object", "patternProperties": {"^(a|b)*a(a|b){20}$": {}, "^(a|b)*b(a|b){20}$": {}}}, {"$ref": "#"},
        LINKED | {"required": ["next", "x"]}, {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
)  # fmt: skip
def test_a_schema_is_compiled_or_refused_in_seconds(schema: dict[str, Any]) -> None:
    begin = time.process_time()
    for tools in (False, True):
        try:
            parameters = {"type": "object", "properties": {"x": schema}, "$defs": schema.get("$defs", {})}
            grammar = GRAMMARS.calls([{"name": "f", "parameters": parameters}]) if tools else GRAMMARS.json(schema)
            assert grammar.least is None or grammar.least <= MOST_LEAST
            Constraint(GRAMMARS, 8192, thinking=False, grammar=grammar)
        except InputError as error:
            assert "backtrace" not in str(error) and "<state>" not in str(error)
    assert time.process_time() - begin < SECONDS


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLength": 10**5}, f"schema has no reply within {MOST_LEAST} tokens that is found"),
        ({"$ref": "#"}, "schema has no reply within 4096 tokens that is found"),
        (optional(500), "schema has no reply .* found Parser Error: Current row has [0-9]+ items; max is 2000"),
        ({"type": "string", "minLength": 50}, "max_tokens is 40; expected more, the schema's least reply does not fit"),
    ],
)
def test_a_least_reply_that_is_not_found_or_does_not_fit(schema: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Constraint(GRAMMARS, 40, thinking=False, grammar=GRAMMARS.json(schema))


@pytest.mark.parametrize(
    ("schema", "letters"),
    [
        ({"type": "string", "pattern": "^(a|b)*a(a|b){300}$"}, "ab"), ({"type": "array", "items": {"$ref": "#"}}, "["),
        (LINKED, '{"'), ({}, '["a'),
        ({"type": "array", "minItems": 500, "items": {"type": "integer"}}, ",1"),
        ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^a{1500}$"}]}, '"a'),
    ],
)  # fmt: skip
def test_masks_of_a_long_reply_are_found_in_time(schema: dict[str, Any], letters: str) -> None:
    """Where the way out is walked again and again: nobody gets a token meanwhile."""
    begin = time.process_time()
    reply, slowest = write(GRAMMARS.json(schema), 2048, letters)
    assert len(reply) > 3 and slowest < 1.0
    assert time.process_time() - begin < 4 * SECONDS


def walks(monkeypatch: pytest.MonkeyPatch, grammar: Any) -> list[int]:
    found, real = list[int](), grammar.way_out

    def counted(matcher: Any, most: int, reply: Sequence[int] = ()) -> Sequence[int] | None:
        found.append(most)
        return real(matcher, most, reply)

    monkeypatch.setattr(grammar, "way_out", counted)
    return found


def test_the_way_out_is_taken_without_being_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """That was quadratic. The reply that is written on the way is the one that was found."""
    grammar = GRAMMARS.json({"type": "array", "minItems": 100, "maxItems": 100, "items": {"const": "abcdef"}})
    expected = grammar.way_out(grammar.matcher, 4096)
    assert expected is not None
    counts = walks(monkeypatch, grammar)
    reply, _ = write(grammar, len(expected) + 2)
    assert reply == expected and len(counts) < 10


def test_a_way_that_cannot_be_found_is_not_looked_for_at_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = GRAMMARS.json({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^a{3000}$"}]})
    monkeypatch.setattr(grammar, "least", 4)  # null; the way out prefers the quote
    counts = walks(monkeypatch, grammar)
    reply, _ = write(grammar, 1000, '"a')
    assert len(reply) == 1000 and len(counts) < 30


def test_a_grammar_that_reaches_a_limit_in_mid_reply_does_not_let_it_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that only the end may follow, wherever that is."""
    monkeypatch.setattr(GRAMMARS, "_limits", type(GRAMMARS._limits)(max_lexer_states=200))
    grammar = GRAMMARS.json(MEET)
    monkeypatch.setattr(grammar, "least", 2)
    monkeypatch.setattr(grammar, "way_out", lambda matcher, most, reply: None)
    with pytest.raises(InputError, match="schema cannot be kept to: .*too many states"):
        write(grammar, 400, "ab")


# ------------------------------------------------------------------------------- what good ones get
NODE = {
    "type": "object",
    "properties": {"v": {"type": "string"}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
}
LIST = {"$ref": "#/$defs/n", "$defs": {"n": NODE | {"required": ["v", "next"]}}}
TREE = {
    "type": "object", "properties": {"v": {"type": "integer"}, "of": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["v", "of"],
}  # fmt: skip


@pytest.mark.parametrize("schema", [LIST, TREE, LINKED])
@pytest.mark.parametrize("max_tokens", [40, 100, 300])
def test_a_reply_of_a_schema_that_holds_itself_closes_and_is_not_held_to_the_least(
    schema: Any, max_tokens: int
) -> None:
    for letters in ('{["vof', "1,[{", 'next": {v'):
        reply, _ = write(GRAMMARS.json(schema), max_tokens, letters)
        found = json.loads(bytes(reply).decode(errors="replace"))
        assert len(reply) < max_tokens and isinstance(found, dict)
    assert longest_minimum(schema) < 300
