"""The parser of the model's output: every case of serving spec 3, however the output is cut, and what always holds."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parser_cases import CASES, CITY, LITERAL, STRING, TOOLS, Case, declare, pair, wrap

from nanoglm.chat.parser import CALL_TAGS, THINK_TAGS, Call, Delta, Message, Parser, parse
from nanoglm.errors import InputError


def deltas(parser: Parser, chunks: Iterable[str], stopped: bool) -> list[Delta]:
    return [delta for chunk in chunks for delta in parser.push(chunk)] + parser.finish(stopped)


def joined(pieces: Sequence[Delta]) -> list[Delta]:
    """Neighbours of one kind as one: all that a client sees of a stream."""
    result: list[Delta] = []
    for piece in pieces:
        if result and (result[-1].kind, result[-1].index) == (piece.kind, piece.index):
            assert piece.kind != "call", "a name came twice"
            result[-1] = Delta(piece.kind, result[-1].text + piece.text, piece.index)
        else:
            result.append(piece)
    return result


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def arguments(pieces: Sequence[Delta], index: int = 0) -> str:
    text = "".join(piece.text for piece in pieces if piece.kind == "arguments" and piece.index == index)
    return text.encode().decode()  # servers send it: no halves of surrogate pairs


def check(case: Case, chunks: Iterable[str]) -> None:
    """The stream of these chunks is the case's message, in a form that clients can follow."""
    parser = Parser(case.thinking, case.tools)
    stream = joined(deltas(parser, chunks, case.stopped))
    assert stream == joined(deltas(Parser(case.thinking, case.tools), [case.raw], case.stopped))

    texts = {kind: "".join(d.text for d in stream if d.kind == kind) or None for kind in ("reasoning", "content")}
    names = [delta for delta in stream if delta.kind == "call"]
    assert [delta.index for delta in names] == [*range(len(case.calls))]
    found = [(delta.text, json.loads(arguments(stream, delta.index))) for delta in names]
    assert texts == {"reasoning": case.reasoning, "content": case.content}
    assert json.dumps(found) == json.dumps(case.calls), "types count: 1, 1.0 and true are equal in Python"
    assert parser.calls == (len(case.calls) if case.complete is None else case.complete)
    assert parser.reasoning == (not case.ended)
    message = Message(case.reasoning, case.content, tuple(Call(*call) for call in case.calls), case.ended)
    assert parse(case.raw, case.thinking, case.tools, case.stopped) == message


# ------------------------------------------------------------------------------- every case
@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python's parser warns of escapes like \C
        for size in 10**6, 1, 2, 3, 5, 7, 8:
            check(CASES[name], cut(CASES[name].raw, size))


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_case_at_any_cuts(data: st.DataObject) -> None:
    case = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    ends = sorted(data.draw(st.lists(st.integers(0, len(case.raw)), max_size=12)))
    check(case, [case.raw[a:b] for a, b in zip([0, *ends], [*ends, len(case.raw)], strict=True)])


@pytest.mark.parametrize("name", CASES)
def test_case_stopped_after_each_character(name: str) -> None:
    """Cut off anywhere, a call that was begun is valid JSON and nothing contradicts what came before."""
    case = CASES[name]
    for end in range(0, len(case.raw), max(1, len(case.raw) // 60)):
        for stopped in (False, True):
            stream = deltas(Parser(case.thinking, case.tools), [case.raw[:end]], stopped)
            assert joined(stream) == joined(deltas(Parser(case.thinking, case.tools), case.raw[:end], stopped))
            for delta in stream:
                assert delta.kind != "call" or isinstance(json.loads(arguments(stream, delta.index)), dict)


# ------------------------------------------------------------------------------- the contract of streams (3.5)
def stages(*chunks: str, thinking: bool = False) -> list[list[tuple[str, str]]]:
    parser = Parser(thinking, TOOLS)
    return [[(delta.kind, delta.text) for delta in parser.push(chunk)] for chunk in chunks]


def test_what_may_become_a_tag_is_held_back() -> None:
    assert stages("a <", "b", " </thi", "nk>c") == [
        [("content", "a ")], [("content", "<b")], [("content", " ")], [("content", "c")]
    ]  # fmt: skip
    assert stages("x</th", "ink>after", thinking=True) == [[("reasoning", "x")], [("content", "after")]]
    assert stages("x</th", "ought", thinking=True) == [[("reasoning", "x")], [("reasoning", "</thought")]]


def test_a_name_comes_once_and_complete() -> None:
    assert stages("Hi<tool_call>get_weat", "her", "<arg_key>city") == [
        [("content", "Hi")], [], [("call", "get_weather")]
    ]  # fmt: skip
    assert stages("<tool_call>get", "</tool_call>") == [[], [("content", "<tool_call>get</tool_call>")]]
    assert stages("<tool_call>get_current_date", "</tool_call>") == [
        [], [("call", "get_current_date"), ("arguments", "{}")]
    ]  # fmt: skip


def test_an_unknown_name_is_text_as_soon_as_it_is_one() -> None:
    assert stages("<tool_call>get", "_tim", "e") == [[], [("content", "<tool_call>get_tim")], [("content", "e")]]


def test_arguments_grow_to_one_object() -> None:
    assert stages(
        "<tool_call>get_weather", "<arg_key>city</arg_key>", "<arg_value>", "Bei", "jing", "</arg_value>",
        "<arg_key>date</arg_key><arg_value>", "2025-08", "-01</arg_value>", "</tool_call>",
    ) == [
        [], [("call", "get_weather")], [], [("arguments", '{"city": "Bei')], [("arguments", "jing")], [],
        [("arguments", '"')], [("arguments", ', "date": "2025-08')], [("arguments", "-01")], [("arguments", '"}')],
    ]  # fmt: skip


def test_other_types_wait_for_their_end() -> None:
    start = "<tool_call>typed<arg_key>{}</arg_key><arg_value>"
    for key, value in ("count", "42"), ("filters", '{"a": 1}'), ("anything", "x"), ("both", "x"):
        *before, last = stages(start.format(key), value[:1], value[1:] or " ", "</arg_value></tool_call>")
        assert before == [[("call", "typed")], [], []]
        assert [kind for kind, _ in last] == ["arguments"]


def test_strings_stream_as_they_arrive() -> None:
    """Also those with null beside them, and those that begin with a quote, once it is not around all."""
    body = '"""A file."""\n' + "".join(f"line {i} = '\\t'\n" for i in range(20))
    for key in "city", "key", "text", "choice":
        stream = deltas(Parser(False, TOOLS), cut(wrap("typed", (key, body)), 8), True)
        fragments = [delta.text for delta in stream if delta.kind == "arguments"]
        assert len(fragments) > 30 and json.loads("".join(fragments)) == {key: body}
    assert stages("<tool_call>typed<arg_key>text</arg_key><arg_value>nu", "l", "l", "s") == [
        [("call", "typed")], [], [], [("arguments", '{"text": "nulls')]
    ]  # fmt: skip
    assert stages("<tool_call>typed<arg_key>city</arg_key><arg_value>", '"a\\', '"b', '"', " ", "c")[1:] == [
        [], [], [], [("arguments", r'{"city": "\"a\\\"b\" ')], [("arguments", "c")]
    ]  # fmt: skip


def test_a_value_stops_where_it_may_end_until_that_is_decided() -> None:
    start = "<tool_call>search<arg_key>query</arg_key><arg_value>left "
    assert stages(start, "</arg_value>", "\n", "then", "</arg_value>", "</tool_call>")[1:] == [
        [], [], [], [("arguments", r"</arg_value>\nthen")], [("arguments", '"}')]
    ]  # fmt: skip


def test_content_comes_before_the_call_behind_it() -> None:
    kinds = [delta.kind for delta in joined(deltas(Parser(True, TOOLS), [f"t</think>a{CITY}b{CITY}c"], True))]
    call = ["call", "arguments"]
    assert kinds == ["reasoning", "content", *call, "content", *call, "content"]


def test_reasoning_says_what_comes_next() -> None:
    parser, states = Parser(True, TOOLS), []
    for chunk in ("a", "</think>", "b", "<think>", "c", "<tool_call>", "search", "</tool_call>"):
        parser.push(chunk)
        states.append(parser.reasoning)
    assert states == [True, False, False, True, True, True, True, False]
    assert not Parser(False).reasoning


def test_calls_are_counted_when_complete() -> None:
    parser, counts = Parser(False, TOOLS), []
    for chunk in ("<tool_call>search", pair("query", "x"), "</tool_call>", CITY, "<tool_call>search<arg_key>"):
        parser.push(chunk)
        counts.append(parser.calls)
    assert counts == [0, 0, 1, 2, 2]
    parser.finish(stopped=False)
    assert parser.calls == 2


def test_nothing_comes_after_the_end() -> None:
    parser = Parser(False, TOOLS)
    assert parser.push("a<") == [Delta("content", "a")]
    assert parser.finish() == [Delta("content", "<")]
    assert parser.push(f"b{CITY}") == parser.finish() == []


def test_no_tools_no_holding_back() -> None:
    """Their markup is text: not even its beginnings wait."""
    parser = Parser(False, None)
    assert parser.push("limit <tool") == [Delta("content", "limit <tool")]
    assert parser.push("<tool_call>") == [Delta("content", "<tool_call>")]
    assert parser.push("</arg_value") == [Delta("content", "</arg_value")]


@pytest.mark.parametrize("tool", [{}, {"name": 1}, {"name": ""}, {"function": {}}, {"function": 1}, "search"])
def test_a_tool_without_a_name_is_refused(tool: Any) -> None:
    with pytest.raises(InputError, match=r"tools\[1\] is .*; expected a function with a name"):
        Parser(False, [TOOLS[0], tool])


# ------------------------------------------------------------------------------- schemas
def value_of(schema: Any, raw: str, key: str = "a", **definitions: Any) -> Any:
    tools = [{"name": "f", "parameters": {"properties": {key: schema}} | definitions}]
    return parse(wrap("f", (key, raw)), False, tools).calls[0].arguments[key]


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (STRING, "1"),
        ({"type": "integer"}, 1),
        ({"const": "1"}, "1"),
        ({"const": 1}, 1),
        ({"enum": ["1", "2"]}, "1"),
        ({"enum": [1, None]}, 1),
        ({"anyOf": [STRING, {"type": "null"}]}, "1"),
        ({"oneOf": [STRING, {"type": "number"}]}, 1),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": ["string", "null"]}]}, "1"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, 1),  # contradiction: nothing is known
        ({"type": ["string", "integer"], "enum": ["1", "2"]}, "1"),
        ({"$ref": "#/$defs/Name"}, "1"),
        ({"$ref": "#/$defs/Link"}, "1"),
        ({"$ref": "#/$defs/a~1b%20c"}, "1"),
        ({"anyOf": [{"$ref": "#/$defs/Name"}, {"type": "null"}]}, "1"),
        ({"$ref": "#/$defs/Loop"}, 1),
        ({"$ref": "#/nowhere"}, 1),
        ({"$ref": "https://example.com/schema"}, 1),
        ({"type": "text"}, 1),
        ({"enum": []}, 1),
        (True, 1),
        (None, 1),
        ({"type": [["string"]], "anyOf": 1, "enum": "1", "allOf": [1], "$ref": 1}, 1),
    ],
    ids=repr,
)
def test_a_schema_decides_the_type(schema: Any, found: Any) -> None:
    definitions = {
        "Name": STRING,
        "Link": {"$ref": "#/$defs/Name", "description": "x"},
        "a/b c": STRING,
        "Loop": {"$ref": "#/$defs/Loop"},
    }
    value = value_of(schema, "1", **{"$defs": definitions})
    assert (value, type(value)) == (found, type(found))


def test_an_alternative_that_contradicts_what_was_read_does_not_count() -> None:
    by_name = {"properties": {"kind": {"const": "name"}, "a": STRING}}
    by_number = {"properties": {"kind": {"enum": ["number"]}, "a": {"type": "integer"}}}
    schema = {"oneOf": [by_name, {"$ref": "#/$defs/Number"}], "$defs": {"Number": by_number}}
    for kind, value in ("name", "1"), ("number", 1), ("other", 1):
        raw = wrap("f", ("kind", kind), ("a", "1"))
        assert parse(raw, False, [{"name": "f", "parameters": schema}]).calls[0].arguments == {"kind": kind, "a": value}


@pytest.mark.parametrize("parameters", [None, 1, [], {"properties": []}, {"properties": {"b": STRING}}, {"anyOf": [1]}])
def test_parameters_that_say_nothing_allow_all(parameters: Any) -> None:
    tools = [{"name": "f", "parameters": parameters}]
    assert parse(wrap("f", ("a", "[1]")), False, tools).calls == (Call("f", {"a": [1]}),)


def test_properties_come_from_all_parts_of_a_schema() -> None:
    base = {"properties": {"a": STRING}, "additionalProperties": STRING}
    for schema in {"allOf": [base]}, {"$ref": "#/$defs/Base", "$defs": {"Base": base}}, {"anyOf": [base]}:
        tools = [{"name": "f", "parameters": schema}]
        assert parse(wrap("f", ("a", "1"), ("b", "2")), False, tools).calls[0].arguments == {"a": "1", "b": "2"}


# ------------------------------------------------------------------------------- whatever the model writes
def fuzz_tools() -> list[dict[str, Any]]:
    return [*TOOLS, declare("f", s=STRING, n={"type": ["string", "null"]}, i={"type": "integer"}, o={"type": "object"})]


PIECES = st.one_of(
    st.sampled_from([*THINK_TAGS, *CALL_TAGS]),
    st.sampled_from([tag[:end] for tag in (*THINK_TAGS, *CALL_TAGS) for end in (1, 2, 6)]),
    st.sampled_from(["f", "search", "get", "s", "n", "i", "o", "query", "null", '"', "\\", "[", "{", "1", " ", "\n"]),
    st.sampled_from([pair("s", "x"), pair("i", "1"), pair("o", '{"a": '), CITY, wrap("f"), LITERAL]),
    st.text(max_size=5),
)


def outputs(test: Callable[..., None]) -> Callable[..., None]:
    cuts = st.lists(st.integers(0, 200), max_size=20)
    return given(st.lists(PIECES, max_size=20), cuts, st.booleans(), st.booleans(), st.booleans())(test)


@settings(deadline=None, max_examples=300)
@outputs
@example(["<tool_call>", "f", "<arg_key>", "s", "</arg_key>", "\ud800é"], [12, 30], False, True, False)
def test_any_output(pieces: list[str], ends: list[int], thinking: bool, tools: bool, stopped: bool) -> None:
    check_any(pieces, ends, thinking, tools, stopped)


@pytest.mark.slow
@settings(deadline=None, max_examples=10_000)
@outputs
def test_any_output_at_length(pieces: list[str], ends: list[int], thinking: bool, tools: bool, stopped: bool) -> None:
    check_any(pieces, ends, thinking, tools, stopped)


def check_any(pieces: list[str], ends: list[int], thinking: bool, tools: bool, stopped: bool) -> None:
    text = "".join(pieces)
    ends = sorted(end % (len(text) + 1) for end in ends)
    chunks = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    declared = fuzz_tools() if tools else None
    parser = Parser(thinking, declared)
    stream = deltas(parser, chunks, stopped)
    assert joined(stream) == joined(deltas(Parser(thinking, declared), [text], stopped))
    assert joined(stream) == joined(deltas(Parser(thinking, declared), text, stopped))
    assert parser.push(text) == parser.finish() == []
    assert all(delta.text for delta in stream)
    begun = [delta for delta in stream if delta.kind == "call"]
    assert [delta.index for delta in begun] == [*range(len(begun))] and parser.calls <= len(begun)
    for delta in begun:
        pairs = json.loads(arguments(stream, delta.index), object_pairs_hook=list)
        assert len({key for key, _ in pairs}) == len(pairs), "a key comes twice"
    order = [delta.index for delta in stream if delta.kind in ("call", "arguments")]
    assert order == sorted(order), "a call goes on behind the next"
    assert len(parse(text, thinking, declared, stopped).calls) == len(begun)
    if not tools:
        plain = "".join(delta.text for delta in stream if delta.kind == "content").lstrip()
        if not thinking and "<think>" not in text:
            assert plain == text.replace("</think>", "").lstrip()


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from("snioxyz"), st.one_of(st.text(), st.integers()), max_size=5), st.text())
def test_what_the_template_writes_is_read_back(values: dict[str, Any], content: str) -> None:
    """Strings raw, all else as JSON; what a schema says about them decides, here that each is what it is."""
    schema = {key: {"type": "string" if isinstance(value, str) else "integer"} for key, value in values.items()}
    values = {k: v for k, v in values.items() if not (isinstance(v, str) and v.startswith('"'))}
    raw = wrap("f", *((k, v if isinstance(v, str) else json.dumps(v)) for k, v in values.items()))
    message = parse(content + raw, False, [declare("f", **schema)])
    assert message.calls == (Call("f", values),)
    assert (message.content or "") == content.lstrip()


# ------------------------------------------------------------------------------- time
LONG = 200_000
START = "<tool_call>typed<arg_key>{}</arg_key><arg_value>".format
TEXTS = {
    "string": START("city") + "x" * LONG,
    "quoted": START("city") + '"' + "\\a" * (LONG // 2) + '"',
    "after a closer": START("city") + "a</arg_value>" + "x" * LONG,
    "closers": START("city") + "</arg_value>" * (LONG // 12),
    "nearly null": START("text") + "null" + "l" * LONG,
    "brackets": START("anything") + "[" * LONG,
    "untyped": START("anything") + "x" * LONG,
    "digits": START("count") + "1_" * (LONG // 2),
    "no Python": START("filters") + "{'a':" * (LONG // 5),
    "blank name": "<tool_call>" + " " * LONG,
    "endless name": "<tool_call>typed" + "x" * LONG,
    "openers": "<tool_call>" * (LONG // 11),
    "key": "<tool_call>typed<arg_key>" + "x" * LONG,
    "blank": " " * LONG,
    "nearly tags": "</arg_val" * (LONG // 9),
    "calls": wrap("typed") * (LONG // 28),
}


@pytest.mark.parametrize("name", TEXTS)
def test_time_grows_with_length_only(name: str) -> None:
    """200,000 characters, one by one and at once: below a second, where reading all of it again each time took many."""
    for chunks in (TEXTS[name], [TEXTS[name]]):
        begin = time.process_time()
        deltas(Parser(False, TOOLS), chunks, True)
        assert time.process_time() - begin < 3
