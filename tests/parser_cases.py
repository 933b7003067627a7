"""What a model may write and what it means: the cases of serving spec 3.2 to 3.4, by their names there, and some more.

Where the spec leaves a choice or its sources disagree, the case says what was chosen. Its table for prompts without
``<think>`` (GLM-4.5 and 4.6) is left out: GLM-5.2's prompts always decide about the thought.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STRING: dict[str, Any] = {"type": "string"}


def declare(name: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


TOOLS: list[dict[str, Any]] = [
    declare("get_current_date"),
    declare("get_weather", city=STRING, date=STRING),
    {"type": "function", "name": "noop"},  # flat, and without a schema
    {"name": "action", "description": "Acts.", "parameters": None},
    declare("search", query=STRING),
    declare("send", command=STRING),
    declare("send_command_to_shell", command=STRING),
    declare("tool_1"),
    declare("tool_12"),
    declare(
        "typed",
        city=STRING,
        count={"type": "number"},
        whole={"type": "integer"},
        filters={"type": "object"},
        items={"type": "array"},
        flag={"type": "boolean"},
        choice={"enum": ["value", None], "type": ["string", "null"]},
        key={"anyOf": [STRING, {"type": "null"}]},
        text={"type": ["string", "null"]},
        both={"type": ["string", "integer"]},
        anything={},
    ),
]


@dataclass(frozen=True)
class Case:
    """A raw output, and the message that it is; nothing else of it may appear."""

    raw: str
    content: str | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    reasoning: str | None = None
    thinking: bool = False
    ended: bool = True
    stopped: bool = True
    complete: int | None = None  # calls that are; all if left out
    tools: list[dict[str, Any]] | None = field(default_factory=lambda: TOOLS)


def wrap(name: str, *pairs: tuple[str, str]) -> str:
    """A call as the model is asked to write it."""
    return f"<tool_call>{name}{''.join(pair(*item) for item in pairs)}</tool_call>"


def pair(key: str, value: str) -> str:
    return f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"


def typed(key: str, raw: str, value: Any) -> Case:
    """One argument of the function ``typed``."""
    return Case(wrap("typed", (key, raw)), calls=[("typed", {key: value})])


def thought(raw: str, reasoning: str | None, content: str | None = None, ended: bool = True, **options: Any) -> Case:
    return Case(raw, content, reasoning=reasoning, thinking=True, ended=ended, **options)


BEIJING = ("get_weather", {"city": "Beijing"})
SHANGHAI = ("get_weather", {"city": "Shanghai"})
DATE: tuple[str, dict[str, Any]] = ("get_current_date", {})
CITY = wrap("get_weather", ("city", "Beijing"))
LITERAL = "left </arg_value> then </tool_call> as data <tool_call> more"

# Serving spec 3.2. Reasoning that is empty is none, streamed or not.
REASONING: dict[str, Case] = {
    "both": thought(
        "This is a reasoning section</think>This is the rest", "This is a reasoning section", "This is the rest"
    ),
    "no content": thought("This is a reasoning section</think>", "This is a reasoning section"),
    "no tag": thought("This is content", "This is content", ended=False),
    "lines": thought("This\nThat</think>This is the rest\nThat", "This\nThat", "This is the rest\nThat"),
    "empty thought": thought("</think>This is the rest", None, "This is the rest"),
    "opener repeated": thought(
        "<think>This is a reasoning section</think>This is the rest", "This is a reasoning section", "This is the rest"
    ),
    "opener repeated, cut": thought("<think>This is a reasoning section", "This is a reasoning section", ended=False),
    "nothing": thought("", None, ended=False),
    "cut by length": thought("This is content", "This is content", ended=False, stopped=False),
    "thought, answer, call": thought(f"plan</think>Answer{CITY}", "plan", "Answer", calls=[BEIJING]),
    "plain answer": thought("</think>Plain answer", None, "Plain answer"),
    "thinking off": Case("Plain answer", "Plain answer"),
    "closer": thought("plan</think>after", "plan", "after"),
    "false closer": thought("plan</thought more", "plan</thought more", ended=False),
    "blanks of a thought stay": thought("\n plan \n</think>\n\n Answer \n", "\n plan \n", "Answer \n"),
    "blank content is none": thought("plan</think> \n ", "plan"),
    "second closer": thought("plan</think>a</think>b", "plan", "ab"),
    "thought again": Case("a<think>b</think>c", "ac", reasoning="b"),
    "thought again, cut": Case("a<think>b", "a", reasoning="b", ended=False),
    "call instead of a closer": thought(f"plan{CITY}", "plan", calls=[BEIJING]),
    "content behind such a call": thought(f"plan{CITY}</think>after", "plan", "after", calls=[BEIJING]),
    "prose about tags in a thought": thought("I <tool_call> now</think>Yes", "I <tool_call> now", "Yes"),
    "other vendors' calls": thought('<invoke name="get_weather">', '<invoke name="get_weather">', ended=False),
    "no tools, a call in a thought": thought(f"plan{CITY}", f"plan{CITY}", ended=False, tools=None),
}

# Serving spec 3.3.
CALLS: dict[str, Case] = {
    "T1": Case("This is a plain response.", "This is a plain response."),
    "T2": Case("<tool_call>get_current_date</tool_call>", calls=[DATE]),
    "T3": Case("<tool_call>get_current_date\n</tool_call>", calls=[DATE]),
    "T4": Case(CITY, calls=[BEIJING]),
    "T5": Case(
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Beijing</arg_value>\n</tool_call>",
        calls=[BEIJING],
    ),
    "T6": Case("Checking.<tool_call>get_current_date</tool_call>", "Checking.", [DATE]),
    "T7": Case("  \n  <tool_call>get_current_date</tool_call>", calls=[DATE]),
    "T8": Case(CITY + wrap("get_weather", ("city", "Shanghai")), calls=[BEIJING, SHANGHAI]),
    "T9": Case(  # both texts, as in streams
        "First I'll do this.<tool_call>action</tool_call>Then I'll do that.",
        "First I'll do this.Then I'll do that.",
        [("action", {})],
    ),
    "T10": Case(f"{CITY} middle <tool_call>noop</tool_call> tail", "middle  tail", [BEIJING, ("noop", {})]),
    "T11": Case(
        wrap("typed", ("city", "北京"), ("count", '"42"'), ("filters", '{"a": 1}')),
        calls=[("typed", {"city": "北京", "count": 42, "filters": {"a": 1}})],
    ),
    "T12": typed("city", "123", "123"),
    "T13": typed("city", r"C:\Users\test", r"C:\Users\test"),
    "T14": typed("city", r'"\C|\."', r"\C|\."),
    "T14 valid JSON": typed("city", '"Beijing"', '"Beijing"'),
    "T14 two strings": typed("city", r'"\$A" "\$B"', r'"\$A" "\$B"'),
    "T14 not closed": typed("city", r'"\$A', r'"\$A'),
    "T14 half an escape": typed("city", '"a\\', '"a\\'),
    "T14 docstring": typed("city", '"""Docs."""\n', '"""Docs."""\n'),
    "T15": typed("city", "    indented code    ", "    indented code    "),
    "T16": typed("city", "", ""),
    "T17 {}": typed("filters", "{}", {}),
    "T17 []": typed("items", "[]", []),
    "T18 0": typed("count", "0", 0),
    "T18 -42.5": typed("count", "-42.5", -42.5),
    "T18 1e10": typed("count", "1e10", 1e10),
    "T19 12345": typed("city", "12345", "12345"),
    "T19 67.89": typed("city", "67.89", "67.89"),
    "T19 123_456": typed("city", "123_456", "123_456"),
    "T19 1_000.5": typed("city", "1_000.5", "1_000.5"),
    "T20": typed("anything", "123_456", 123456),
    "T21": typed("filters", r"{'pattern': '\d+'}", {"pattern": r"\d+"}),
    "T22": typed("items", '["a", {"b": "c"}]', ["a", {"b": "c"}]),
    "T22 escaped": typed("items", r"[\"a\", {\"b\": \"c\"}]", ["a", {"b": "c"}]),
    "T23": typed(
        "items",
        r'[{"path": "C:\\Users\\test.txt", "text": "a\\nb"}]',
        [{"path": r"C:\Users\test.txt", "text": r"a\nb"}],
    ),
    "T24 null": typed("choice", "null", None),
    "T24 value": typed("choice", "value", "value"),
    "T25": typed("city", "null", "null"),
    "T26": typed("key", "sk-12345678", "sk-12345678"),
    "T26 null": typed("key", "null", None),
    "T27": typed("text", "test message", "test message"),
    "T27 longer than null": typed("text", "nullable", "nullable"),
    "T27 shorter than null": typed("text", "nul", "nul"),
    "T28 true": typed("flag", "true", True),
    "T28 True": typed("flag", "True", True),
    "T29": Case(
        wrap("noop", ("a", "add"), ("b", "42"), ("c", "3.14"), ("d", "true")),
        calls=[("noop", {"a": "add", "b": 42, "c": 3.14, "d": True})],
    ),
    "T30": Case(wrap("noop", ("a", "你好世界"), ("b", "🎉 ok")), calls=[("noop", {"a": "你好世界", "b": "🎉 ok"})]),
    "T31": Case(wrap("unknown", ("a", "1")) + " tail", wrap("unknown", ("a", "1")) + " tail"),  # so nothing is lost
    "T31 behind a call": Case(CITY + wrap("unknown"), wrap("unknown"), [BEIJING]),
    "T32": Case(CITY.removesuffix("</tool_call>"), calls=[BEIJING]),  # begun, so it stays
    "T32 cut": Case(CITY.removesuffix("</tool_call>"), calls=[BEIJING], stopped=False, complete=0),
    "T32 name only": Case("<tool_call>get_current_date", "<tool_call>get_current_date"),
    "T33": Case("<tool_call>   ", "<tool_call>   "),
    "T34": Case(  # as if the closer of the key were there
        f"<tool_call>get_weather{pair('city', 'Beijing')}<arg_key>date\n<arg_value>2025</arg_value></tool_call>",
        calls=[("get_weather", {"city": "Beijing", "date": "2025"})],
    ),
    "T34 unterminated": Case(
        f"<tool_call>get_weather{pair('city', 'Beijing')}<arg_key>incomplete_arg\n<arg_value>inc",
        calls=[("get_weather", {"city": "Beijing", "incomplete_arg": "inc"})],
    ),
    "T35 <": typed("city", "a<b & c", "a<b & c"),
    "T35 quotes": typed("city", 'say "hi"\nok', 'say "hi"\nok'),
    "T36": Case("a < b and c > d. done", "a < b and c > d. done"),
}

# What the typing of 3.3 says beyond its table.
TYPING: dict[str, Case] = {
    "a quoted fraction is no integer": typed("whole", '"1.5"', "1.5"),
    "a fraction stays the number it is": typed("whole", "1.5", 1.5),
    "a quoted integer": typed("whole", '"7"', 7),
    "a quoted boolean": typed("flag", '"false"', False),
    "a word for a boolean": typed("flag", "yes", "yes"),
    "a word for a number": typed("count", "many", "many"),
    "None": typed("anything", "None", None),
    "None is a word where strings are": typed("text", "None", "None"),
    "an object in quotes": typed("filters", r'"{\"a\": 1}"', {"a": 1}),
    "an array for an object": typed("filters", "[1]", [1]),
    "string or integer: integer": typed("both", "42", 42),
    "string or integer: quoted": typed("both", '"42"', "42"),
    "string or integer: neither": typed("both", "[1]", "[1]"),
    "no JSON: NaN": typed("count", "NaN", "NaN"),
    "no JSON: infinite": typed("count", "1e999", "1e999"),
    "no JSON: a set": typed("anything", "{1, 2}", "{1, 2}"),
    "too many digits": typed("anything", "9" * 5000, "9" * 5000),
    "no JSON: NaN in an object": typed("filters", '{"a": NaN}', '{"a": NaN}'),
    "digits stay": typed("anything", "12345678901234567890", 12345678901234567890),
    "too deep": typed("items", "[" * 150 + "]" * 150, "[" * 150 + "]" * 150),
    "a date": typed("anything", "2025-08-01", "2025-08-01"),
    "a version": typed("anything", "1.2.3", "1.2.3"),
    "lines around JSON": typed("filters", '\n{\n  "a": [1]\n}\n', {"a": [1]}),
    "half a surrogate pair": typed("anything", r"'\ud800'", "\ud800"),
    "a property that is not declared": typed("more", "[1]", [1]),
    "twice the same key": Case(
        wrap("typed", ("city", "a"), ("city", "b"), ("whole", "1"), ("whole", "2")),
        calls=[("typed", {"city": "a", "whole": 1})],
    ),
    "cut off in a string": Case(
        "<tool_call>typed" + "<arg_key>city</arg_key><arg_value>Bei",
        calls=[("typed", {"city": "Bei"})],
        stopped=False,
        complete=0,
    ),
    "cut off in a number": Case(
        f"<tool_call>typed{pair('city', 'a')}<arg_key>count</arg_key><arg_value>4",
        calls=[("typed", {"city": "a"})],
        stopped=False,
        complete=0,
    ),
    "cut off in an object": Case(
        '<tool_call>typed<arg_key>filters</arg_key><arg_value>{"a": 1}',
        calls=[("typed", {})],
        stopped=False,
        complete=0,
    ),
    "cut off before a value": Case(
        f"<tool_call>typed{pair('city', 'a')}<arg_key>count</arg_key>",
        calls=[("typed", {"city": "a"})],
        stopped=False,
        complete=0,
    ),
    "stopped in a number": Case(
        "<tool_call>typed<arg_key>count</arg_key><arg_value>42", calls=[("typed", {"count": 42})]
    ),
    "number without a closer": Case(
        "<tool_call>typed<arg_key>count</arg_key><arg_value>42</tool_call>", calls=[("typed", {"count": 42})]
    ),
}

# Serving spec 3.4.
MALFORMED: dict[str, Case] = {
    "no <arg_value>": Case(
        "<tool_call>search<arg_key>query</arg_key>how many vacation days left</arg_value></tool_call>",
        calls=[("search", {"query": "how many vacation days left"})],
    ),
    "no <arg_key>": Case(
        "<tool_call>send_command_to_shellcommand</arg_key><arg_value>echo test</arg_value></tool_call>",
        calls=[("send_command_to_shell", {"command": "echo test"})],
    ),
    "no <arg_key>, unknown name": Case(
        "<tool_call>deletecommand</arg_key><arg_value>echo</arg_value></tool_call>",
        "<tool_call>deletecommand</arg_key><arg_value>echo</arg_value></tool_call>",
    ),
    "no <arg_key>, no key": Case("<tool_call>send</arg_key>", "<tool_call>send</arg_key>"),
    "closer behind a name": Case("<tool_call>tool_12</arg_value></tool_call>", calls=[("tool_12", {})]),
    "closer behind a name, no end": Case("<tool_call>tool_12</arg_value>", calls=[("tool_12", {})]),
    "two closers of a call": Case(f"{CITY}</tool_call>after", "after", [BEIJING]),
    "closer in prose": Case("Use </tool_call> at the end.", "Use </tool_call> at the end."),
    "two openers": Case(
        "I will issue a <tool_call><tool_call>get_weather</tool_call>", "I will issue a ", [("get_weather", {})]
    ),
    "opener in prose": Case(f"I will issue a <tool_call> tag: {CITY}", "I will issue a <tool_call> tag: ", [BEIJING]),
    "lone opener": Case("I will issue a <tool_call>", "I will issue a <tool_call>"),
    "opener before nothing known": Case("a <tool_call>get_weather is a tool", "a <tool_call>get_weather is a tool"),
    "tags in a value": Case(wrap("get_weather", ("city", LITERAL)), calls=[("get_weather", {"city": LITERAL})]),
    "tags in a value, another behind it": Case(
        wrap("get_weather", ("city", LITERAL), ("date", "now")),
        calls=[("get_weather", {"city": LITERAL, "date": "now"})],
    ),
    "tags in an object": typed("filters", '{"a": "</arg_value>, </tool_call>"}', {"a": "</arg_value>, </tool_call>"}),
    "all tags in a value": typed(
        "city", *["<arg_value>a</arg_value>b<arg_key></arg_key><think></think><tool_call></tool_call></arg_value>"] * 2
    ),
    "value begins with its closer": typed("city", "</arg_value>starts", "</arg_value>starts"),
    # The first closer that its call goes on behind decides: a stream cannot wait for a later one.
    "closer and end in a value": Case(
        wrap("get_weather", ("city", "left </arg_value></tool_call>tail")),
        "tail</arg_value></tool_call>",
        [("get_weather", {"city": "left "})],
    ),
    "no </arg_value>": Case(  # the new engine's reading: the value is on its way
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>unterminated</tool_call>after",
        calls=[("get_weather", {"city": "unterminated</tool_call>after"})],
    ),
    "text behind a value": Case(
        f"<tool_call>get_weather{pair('city', 'Beijing')} stray </tool_call>after", calls=[BEIJING]
    ),
    "text behind a value, cut": Case(
        f"<tool_call>get_weather{pair('city', 'Beijing')} stray", calls=[BEIJING], stopped=False, complete=0
    ),
    "a call in an unclosed value": Case(
        f"<tool_call>get_weather{pair('city', 'first')}<arg_key>date</arg_key><arg_value>/L</think>{CITY[:-30]}",
        calls=[("get_weather", {"city": "first", "date": f"/L</think>{CITY[:-30]}"})],
    ),
    "call in a thought": thought(f"I need it. {CITY}", "I need it. ", calls=[BEIJING]),
    "no </tool_call> between calls": Case(
        CITY.removesuffix("</tool_call>") + wrap("get_weather", ("city", "Shanghai")), calls=[BEIJING, SHANGHAI]
    ),
    "key without a value": Case("<tool_call>search<arg_key>query</arg_key></tool_call>", calls=[("search", {})]),
    "empty value without its opener": Case(
        "<tool_call>search<arg_key>query</arg_key></arg_value></tool_call>", calls=[("search", {"query": ""})]
    ),
    "key begun twice": Case(
        "<tool_call>search<arg_key>que<arg_key>query</arg_key><arg_value>x</arg_value></tool_call>",
        calls=[("search", {"query": "x"})],
    ),
    "a call begun in a key": Case(f"<tool_call>search<arg_key>{CITY}", calls=[("search", {}), BEIJING]),
    "key closed as a value": Case(
        "<tool_call>search<arg_key>query</arg_value><arg_value>x</arg_value></tool_call>",
        calls=[("search", {"query": "x"})],
    ),
    "no name": Case("<tool_call></tool_call>", "<tool_call></tool_call>"),
    "half a name": Case(wrap("get", ("city", "Beijing")), wrap("get", ("city", "Beijing"))),
    "blanks without end": Case(f"<tool_call>{' ' * 400}{CITY[11:]}", f"<tool_call>{' ' * 400}{CITY[11:]}"),
    "no tools": Case(f"limit < {CITY}", f"limit < {CITY}", tools=None),
    "an empty list of tools": Case(CITY, CITY, tools=[]),
}

CASES: dict[str, Case] = {
    f"{table}: {name}": case
    for table, cases in (
        ("reasoning", REASONING),
        ("calls", CALLS),
        ("typing", TYPING),
        ("malformed", MALFORMED),
    )
    for name, case in cases.items()
}
