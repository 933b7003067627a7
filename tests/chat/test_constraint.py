"""Which tokens may come: budgets, grammars, the way out; a function of what came, whatever was asked in between."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas_drawn import is_valid, schemas

from nanoglm.chat.constraint import Constraint, Grammar, Grammars
from nanoglm.chat.parser import Parser
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from nanoglm.errors import InputError

STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER, NOW = {"name": "get_weather", "parameters": CITY}, {"name": "now"}


@cache
def grammars(kind: str) -> Grammars:
    """Of bytes, or of a BPE whose model has more rows than it has tokens."""
    tokenizer = byte_tokenizer() if kind == "bytes" else bpe()
    rows = tokenizer.vocab_size + (0 if kind == "bytes" else 4)
    return Grammars(tokenizer, rows, [tokenizer.encode(text)[0] for text in STOPS])


def bpe() -> Tokenizer:
    words = 'in {"name": "Anna", "city": "Rome", "days": 3, "ok": true, "list": [1, 2, 3], "value": null, "next": {}} '
    return train_bpe([words * 3, Path(__file__).read_text(encoding="utf-8")], 700)


BOTH = pytest.mark.parametrize("kind", ["bytes", "bpe"])


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a text is one of a grammar's, token by token."""
    matcher = grammar.matcher.deep_copy()
    for token in grammar.grammars.tokenizer.encode(text):
        if not grammar.allowed(matcher)[token]:
            return False
        matcher.consume_tokens([token])
    return bool(matcher.is_accepting())


def allowed(constraint: Constraint, outputs: Sequence[int]) -> set[int] | None:
    found = constraint(outputs)
    return None if found is None else set(found.nonzero().flatten().tolist())


# ---------------------------------------------------------------------------------- thought
@BOTH
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_budget(kind: str, budget: int) -> None:
    found = grammars(kind)
    end, again = found.token("</think>"), found.token("<think>")
    constraint = Constraint(found, 100, thinking=True, budget=budget)
    outputs = list[int]()
    for _ in range(budget):
        assert constraint(outputs) is None
        outputs.append(65)
    assert allowed(constraint, outputs) == {end}
    assert constraint([*outputs[:-1], end]) is not None or budget == 0
    outputs.append(end)
    for text in ("", "abc"):  # anything, but no second thought
        free = allowed(constraint, [*outputs, *found.tokenizer.encode(text)])
        assert free == set(range(found.vocab_size)) - {again}


def test_a_call_ends_thought() -> None:
    found = grammars("bytes")
    call, end, key = (found.token(text) for text in ("<tool_call>", "</tool_call>", "<arg_key>"))
    constraint = Constraint(found, 100, thinking=True, budget=3, names=found.names([{"name": "ab"}, {"name": "a"}]))
    assert allowed(constraint, [65, call]) == {ord("a")}  # nothing but the name of a tool makes it a call
    assert allowed(constraint, [65, call, ord("a")]) == {ord("b"), key, end}
    assert allowed(constraint, [65, call, ord("a"), key]) == set(range(320)) - {found.token("<think>")}
    without = Constraint(found, 100, thinking=True, budget=3)
    assert allowed(without, [65, call, 65]) == {found.token("</think>")}  # where there are no tools it is text


def test_without_a_budget_thought_is_free_up_to_the_room_for_the_reply() -> None:
    found = grammars("bytes")
    grammar = found.json(CITY)
    constraint = Constraint(found, 200, thinking=True, grammar=grammar)
    stops, call, end = set(found.stop_ids), found.token("<tool_call>"), found.token("</think>")
    outputs = list[int]()
    while (ways := allowed(constraint, outputs)) != {end}:
        assert ways == set(range(320)) - stops - {call}
        outputs.append(65)
    assert 120 < len(outputs) < 187
    outputs.append(end)
    while (ways := allowed(constraint, outputs)) and not ways & stops:
        outputs.append(min(ways))
    assert json.loads(found.tokenizer.decode(outputs).partition("</think>")[2]).keys() >= {"city"}
    assert len(outputs) < 200


# ---------------------------------------------------------------------------------- what is a reply
@BOTH
def test_json(kind: str) -> None:
    grammar = grammars(kind).json(CITY)
    assert accepts(grammar, '{"city": "Zürich"}') and accepts(grammar, '{"city": "a", "other": [1]}')
    for text in ("", "{}", '{"city": 5}', '{"city":"a"}', ' {"city": "a"}', '{"city": "a"} ', '{"city": "a"'):
        assert not accepts(grammar, text)


@BOTH
def test_the_end_is_allowed_exactly_when_the_grammar_accepts(kind: str) -> None:
    found = grammars(kind)
    text = '{"city": "Rome", "other": [1, 2]}'
    for grammar in (found.json(CITY), found.calls([NOW], otherwise=CITY)):
        constraint, outputs = Constraint(found, 900, thinking=False, grammar=grammar), list[int]()
        for token in found.tokenizer.encode(text):
            ways = allowed(constraint, outputs)
            assert ways is not None and token in ways and not ways & set(found.stop_ids)
            outputs.append(token)
        assert allowed(constraint, outputs) == set(found.stop_ids)
        assert constraint([*outputs, found.stop_ids[0], 65]) is None  # drafts behind the end


@BOTH
def test_calls(kind: str) -> None:
    one = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>New York, <b>\n</arg_value></tool_call>"
    other = "<tool_call>now</tool_call>"
    found = grammars(kind)
    several, single = found.calls([WEATHER, NOW]), found.calls([WEATHER, NOW], several=False)
    assert all(accepts(several, text) for text in (one, other, one + other, other * 3))
    assert accepts(single, one) and not accepts(single, one + other)
    for text in ("", "Hello", "Hello" + one, one + "Hello", "<tool_call>get</tool_call>", '{"city": "a"}'):
        assert not accepts(several, text)
    assert not accepts(several, "<tool_call>get_weather</tool_call>")  # its city is required
    either = found.calls([NOW], otherwise=CITY)
    assert accepts(either, other) and accepts(either, '{"city": "a"}') and not accepts(either, other + '{"city": "a"}')


@BOTH
@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"type": "string"}, ["", "a b", '"q"', "ü\n<tag>"], []),
        ({"type": "integer"}, ["0", "-42"], ["", "a", "1.5", '"1"']),
        ({"type": "boolean"}, ["true"], ["True", ""]),
        ({"type": ["string", "null"]}, ["null", "abc", ""], []),
        ({"enum": ["a b", "null"]}, ["a b", "null"], ['"a b"', "a"]),
        ({"enum": ["5", 5, None]}, ['"5"', "5", "null"], ["6", '"a"']),
        ({"const": "x"}, ["x"], ["xx", '"x"']),
        ({"anyOf": [{"type": "string", "enum": ["red"]}, {"type": "null"}]}, ["red", "null"], ["blue", '"red"']),
        ({"$ref": "#/$defs/colour"}, ["red"], ["blue"]),
        ({"anyOf": [{"$ref": "#/$defs/colour"}, {"const": "green"}]}, ["red", "green"], ["blue"]),
        ({"allOf": [{"$ref": "#/$defs/colour"}], "description": "x"}, ["red"], ["blue"]),
        ({"allOf": [{"type": "integer"}]}, ["5"], ["a"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "üöä"], ["a", "abcd"]),
        ({"type": "string", "pattern": r"^\d{2}/[a-z]+$"}, ["12/ab"], ["12/", "x12/ab", "1२/ab"]),
        ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
        ({"type": "string", "pattern": "^a", "minLength": 2}, ["ab"], ["a", "ba"]),
        ({"type": ["string", "integer"], "minimum": 5}, ['"a"', "7"], ["a", "3"]),
        ({"type": "array", "items": {"type": "string"}}, ["[]", '["a", "b"]'], ["a", "[a]"]),
        ({"type": "object"}, ["{}", '{"a": {"b": [1, null]}}'], ["", "a"]),
        ({}, ["a", "5", "[1]", ""], []),
        (True, ["a", "5"], []),
    ],
)  # fmt: skip
def test_values_as_glm_writes_them(kind: str, schema: Any, yes: list[str], no: list[str]) -> None:
    parameters = {
        "type": "object", "properties": {"x": schema}, "required": ["x"],
        "$defs": {"colour": {"type": "string", "enum": ["red"]}},
    }  # fmt: skip
    grammar = grammars(kind).calls([{"name": "f", "parameters": parameters}])
    for texts, expected in ((yes, True), (no, False)):
        for text in texts:
            call = f"<tool_call>f<arg_key>x</arg_key><arg_value>{text}</arg_value></tool_call>"
            assert accepts(grammar, call) == expected, text


@BOTH
def test_parameters(kind: str) -> None:
    def pair(name: str, value: str) -> str:
        return f"<arg_key>{name}</arg_key><arg_value>{value}</arg_value>"

    def accepted(parameters: Any, *pairs: str) -> bool:
        grammar = grammars(kind).calls([{"name": "f", "parameters": parameters}])
        return accepts(grammar, f"<tool_call>f{''.join(pairs)}</tool_call>")

    two = {"type": "object", "properties": {"a": {}, "b": {"type": "integer"}}, "required": ["b"]}
    assert accepted(two, pair("a", "x"), pair("b", "1")) and accepted(two, pair("b", "1"))
    assert not accepted(two, pair("a", "x")) and not accepted(two, pair("b", "1"), pair("a", "x"))
    assert not accepted(two, pair("b", "1"), pair("c", "1"))
    undeclared = {"type": "object", "properties": {"a": {}}, "required": ["c"]}
    assert accepted(undeclared, pair("c", "x")) and not accepted(undeclared, pair("a", "x"))
    for free in (None, {}, {"type": "object"}, {"type": "object", "additionalProperties": True}):
        assert accepted(free) and accepted(free, pair("any", "x"), pair("other_1", "[1]"))
    typed = {"type": "object", "additionalProperties": {"type": "integer"}}
    assert accepted(typed, pair("any", "1")) and not accepted(typed, pair("any", "x"))
    assert not accepted({"type": "object", "additionalProperties": False}, pair("any", "x"))
    behind = {"$ref": "#/$defs/it", "$defs": {"it": {"type": "object", "properties": {"a": {}}, "required": ["a"]}}}
    assert accepted(behind, pair("a", "x")) and not accepted(behind)
    for name in ("größe", "a b", 'q"q', "back\\slash", "", "a\nb", "/re/"):
        assert accepted({"properties": {name: {"type": "integer"}}, "required": [name]}, pair(name, "5"))


def test_rows_without_a_token_never_come() -> None:
    """They had no name, and an empty one is the beginning of all markup."""
    found = grammars("bpe")
    named = found.tokenizer.vocab_size
    assert found.vocab_size > named
    constraint = Constraint(found, 2000, thinking=False, grammar=found.calls([WEATHER, NOW]))
    outputs = found.tokenizer.encode("<tool_call>now")
    for at in range(len(outputs) + 1):
        assert max(allowed(constraint, outputs[:at]) or ()) < named
    assert len(allowed(constraint, outputs) or ()) > 1  # not the way out alone


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "schema cannot be kept to: Invalid type: nonsense"),
        ({"type": "string", "pattern": "(?=a)b"}, "schema cannot be kept to: regex parse error"),
        ({"not": {"type": "string"}}, "schema cannot be kept to: Unimplemented keys"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "schema cannot be kept to: Unsat"),
        ({"$ref": "#/$defs/none"}, "schema cannot be kept to"),
        (5, "schema is 5; expected a JSON schema"),
    ],
)
def test_what_cannot_be_kept_to(schema: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        grammars("bytes").json(schema)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"x": {"type": "integer", "not": {}}}},
        {"properties": {"x": {"type": "string", "pattern": "("}}},
        {"properties": {"x": {"type": "string", "pattern": "^a|b$"}}},
        {"properties": 5},
        {"properties": {"x": {"type": "string", "pattern": 5}}},
        {"properties": {"x": {"type": "string", "anyOf": 5}}},
        {"properties": {"x": {"type": "string", "maxLength": "y"}}},
        {"required": 5},
    ],
)
def test_parameters_that_cannot_be_kept_to(parameters: Any) -> None:
    with pytest.raises(InputError):
        grammars("bytes").calls([{"name": "f", "parameters": parameters}])


# ---------------------------------------------------------------------------------- the way out
def tree(*kinds: str) -> dict[str, Any]:
    """Expressions of several kinds, all but leaf or num of two more: not one of those for ever."""

    def kind(name: str) -> dict[str, Any]:
        held = {"value": {"type": "integer"}} if name in ("leaf", "num") else dict.fromkeys(("left", "right"), ITSELF)
        properties = {"kind": {"const": name}, **held}
        return {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
        }  # fmt: skip

    return {**ITSELF, "$defs": {"e": {"anyOf": [kind("node"), *map(kind, kinds)]}}}


ITSELF = {"$ref": "#/$defs/e"}


@BOTH
@pytest.mark.parametrize(
    ("schema", "most"),
    [
        (CITY, 14),
        ({"type": "string", "pattern": "^[a-z]+@[a-z]+$"}, 12),  # not one letter for ever
        ({"type": "string", "format": "email"}, 40),
        ({"type": "string", "pattern": "^[^;]*x$"}, 120),
        ({"type": "array", "items": {"type": "array", "minItems": 1, "items": {"type": "array"}}, "minItems": 2}, 14),
        ({"anyOf": [{"$ref": "#"}, {"type": "integer"}]}, 2),
        (tree("leaf"), 40),
        (tree("add", "leaf", "mul"), 40),
        (tree("neg", "num", "sum"), 40),
    ],
)  # fmt: skip
def test_the_way_out_is_found(kind: str, schema: Any, most: int) -> None:
    grammar = grammars(kind).json(schema)
    way = grammar.way_out(grammar.matcher, most)
    assert way is not None
    assert is_valid(schema, json.loads(grammars(kind).tokenizer.decode(way)))


def test_too_few_tokens_for_any_reply() -> None:
    found = grammars("bytes")
    least = '{"city": ""}'
    Constraint(found, len(least) + 1, thinking=False, grammar=found.json(CITY))
    with pytest.raises(InputError, match="max_tokens is 12; expected more, the schema's least reply does not fit"):
        Constraint(found, len(least), thinking=False, grammar=found.json(CITY))


def test_a_schema_of_little_room_is_not_closed_at_once() -> None:
    """What is required is in the way out already: it is no thing that a token could add."""
    found = grammars("bytes")
    names = [f"property_{i}" for i in range(8)]
    schema = {"properties": {name: {"type": "string"} for name in names}, "required": names, "type": "object"}
    constraint = Constraint(found, 260, thinking=False, grammar=found.json(schema))
    assert len(allowed(constraint, found.tokenizer.encode('{"property_0": "')) or ()) > 100


def test_a_walk_behind_rejected_drafts_says_nothing_of_what_came_instead() -> None:
    """Drafts that open nothing have a shorter way out than brackets in their place."""
    found = grammars("bytes")
    grammar = found.json({"type": "array"})
    narrow = set[bool]()
    for most, n, chain in product((120, 121), range(30, 50), ("1", "11")):
        asked, fresh = (Constraint(found, most, thinking=False, grammar=grammar) for _ in range(2))
        begin = [ord("[")] * n
        if len(allowed(asked, begin) or ()) == 1:
            continue
        for at in range(1, len(chain) + 1):
            asked([*begin, *chain[:at].encode()])
        instead = [*begin, ord("[")]
        assert allowed(asked, instead) == allowed(fresh, instead)
        narrow.add(len(allowed(fresh, instead) or ()) == 1)
    assert narrow == {True, False}


# ---------------------------------------------------------------------------------- any schema, any model
def walk(
    constraint: Constraint, stops: Sequence[int], vocabulary: int, most: int, seed: int, drafts: int
) -> tuple[list[int], bool]:
    """A continuation that a model of its own taste draws, and whether it ended by itself. In between it asks for
    drafts, which are rejected: what comes does not depend on them."""
    taste, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    other = random.Random(seed)
    logits_V = torch.randn(vocabulary, generator=taste) * (seed % 4 + 0.5)

    def draw(outputs: list[int], generator: torch.Generator) -> int:
        p_V = (logits_V + torch.randn(vocabulary, generator=generator)).exp()
        mask = constraint(outputs)
        return int(torch.multinomial(p_V if mask is None else p_V * mask, 1, generator=generator))

    outputs = list[int]()
    while len(outputs) < most:
        if drafts and other.random() < 0.5:
            chain, elsewhere = list[int](), torch.Generator().manual_seed(other.randrange(2**32))
            for _ in range(min(drafts, most - len(outputs) - 1)):
                chain.append(draw(outputs + chain, elsewhere))
        token = draw(outputs, own)
        if token in stops:
            return outputs, True
        outputs.append(token)
    return outputs, False


def read(found: Grammars, tools: list[Any], reply: Sequence[int]) -> list[tuple[str, Any]]:
    """The calls of a reply, as the server reads them."""
    parser, text, calls = Parser(False, tools), found.tokenizer.stream(), list[list[str]]()
    deltas = [d for i in reply for d in parser.push(text.push(i), i not in found.markup)] + parser.finish(True)
    for delta in deltas:
        if delta.kind == "call":
            calls.append([delta.text, ""])
        else:
            assert delta.kind == "arguments"
            calls[delta.index][1] += delta.text
    return [(name, json.loads(arguments)) for name, arguments in calls]


@BOTH
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_replies_close_in_time_and_are_of_the_schema(kind: str, data: st.DataObject) -> None:
    found, schema, seed = grammars(kind), data.draw(schemas()), data.draw(st.integers(0, 2**32))
    thinking, several = data.draw(st.booleans()), data.draw(st.booleans())
    most, budget = data.draw(st.sampled_from([120, 250, 500])), data.draw(st.sampled_from([None, 0, 7]))
    tools = [{"name": "f", "parameters": schema}, {"name": "now", "parameters": {"additionalProperties": False}}]
    form = data.draw(st.sampled_from(["json", "calls", "either"]))
    grammar = found.json(schema) if form == "json" else found.calls(
        tools, several, schema if form == "either" else None
    )  # fmt: skip
    try:
        constraints = [Constraint(found, most, thinking=thinking, budget=budget, grammar=grammar) for _ in range(2)]
    except InputError as error:
        assert "least reply does not fit" in str(error)
        return
    plain, drafted = (
        walk(constraint, found.stop_ids, found.vocab_size, most, seed, drafts)
        for constraint, drafts in zip(constraints, (0, 3), strict=True)
    )
    assert plain == drafted
    reply, ended = plain
    assert ended
    if thinking:
        end = reply.index(found.token("</think>"))
        assert budget is None or end <= budget
        reply = reply[end + 1 :]
    if reply[:1] == [found.token("<tool_call>")] and form != "json":
        calls = read(found, tools, reply)
        assert len(calls) == 1 or several
        assert all(is_valid(schema if name == "f" else {"maxProperties": 0}, it) for name, it in calls)
    else:
        assert is_valid(schema, json.loads(found.tokenizer.decode(reply)))
