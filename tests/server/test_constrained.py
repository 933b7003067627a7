"""Constrained replies of a server: behind thought, over the borders of verified chains, in time, for any schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemas_drawn import is_valid, schemas
from server.conftest import Live
from server.scripted import call

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
# A random model is neither quick nor slow in a way that is the test's fault, and a server has no state to reset.
ANY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def ask(server: Live, text: str = "Go", **asked: Any) -> dict[str, Any]:
    """The first choice."""
    body = {"messages": [{"role": "user", "content": text}]} | asked
    found = server.http.post("/v1/chat/completions", json=body)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0] | {"usage": found.json()["usage"]}


def calls(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    made = [found["function"] for found in choice["message"].get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in made]


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "do", "parameters": parameters}}


# ---------------------------------------------------------------------------------- the border within a chain
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_thought_its_end_and_a_call_in_one_verified_chain(scripted: Live, choice: Any) -> None:
    """Elsewhere this aborts the request (serving spec 4.7). With each length of thought the border lies elsewhere in a
    chain; the script's own text is what comes, so nothing was masked that should not be."""
    for n in range(8):
        thought = "0123456"[:n]
        scripted.says({"Go": f"{thought}</think>{call('get_weather', city='Rome')}{call('get_weather', city='Oslo')}"})
        found = ask(scripted, tools=[WEATHER, NOW], tool_choice=choice)
        assert found["message"]["reasoning_content"] == (thought or None) and found["message"]["content"] is None
        assert calls(found) == [("get_weather", {"city": "Rome"}), ("get_weather", {"city": "Oslo"})]
        assert found["finish_reason"] == "tool_calls"
        usage = found["usage"]["completion_tokens_details"]
        assert usage["reasoning_tokens"] == n and (usage["accepted_prediction_tokens"] > 0) == (scripted.drafts > 0)


@pytest.mark.parametrize("budget", range(9))
def test_a_budget_and_a_grammar(scripted: Live, budget: int) -> None:
    """The end of thought is forced within a chain, and the grammar begins right behind it."""
    scripted.says({"Go": "01234567" + call("get_weather", city="Rome")})  # and never ends its thought
    found = ask(scripted, tools=[WEATHER, NOW], tool_choice=NAMED, thinking_token_budget=budget, max_tokens=250)
    assert found["message"]["reasoning_content"] == ("01234567"[:budget] or None)
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == min(budget, 8)
    ((name, arguments), *_) = calls(found)
    assert name == "get_weather" and isinstance(arguments["city"], str)


def test_a_schema_behind_thought(scripted: Live) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
    for n in range(5):
        text = '{"a": 12, "b": "y"}'
        scripted.says({"Go": f"{'01234'[:n]}</think>{text}"})
        found = ask(scripted, response_format=form(schema))
        assert found["message"]["content"] == text and found["finish_reason"] == "stop"
    # Braces in thought are thought.
    scripted.says({"Go": f'{{"a": "no"}}</think>{text}'})
    found = ask(scripted, response_format=form(schema))
    assert found["message"]["reasoning_content"] == '{"a": "no"}' and found["message"]["content"] == text


def test_a_schema_or_calls(scripted: Live) -> None:
    city = form(CITY)
    scripted.says({"Call": f"Hm.</think>{call('now')}", "Say": 'Hm.</think>{"city": "Rome"}', "Talk": "Hm.</think>So."})
    assert calls(ask(scripted, "Call", tools=[NOW], response_format=city)) == [("now", {})]
    assert ask(scripted, "Say", tools=[NOW], response_format=city)["message"]["content"] == '{"city": "Rome"}'
    found = ask(scripted, "Talk", tools=[NOW], response_format=city, max_tokens=300)
    assert calls(found) or is_valid(CITY, json.loads(found["message"]["content"]))
    found = ask(scripted, "Call", tools=[NOW], tool_choice="none", response_format=city, max_tokens=300)
    assert is_valid(CITY, json.loads(found["message"]["content"]))


# ---------------------------------------------------------------------------------- arguments come back as they were
TEXTS = [
    "", " ", "  indented\n\tcode  ", "null", "42", "true", '"quoted"', '"half', "{}", "[1", "a\\nb", "C:\\Users\\test",
    "ü 你好 🌊", "<b>&amp;</b>", "<think>x</think>", "left </arg_value> then </tool_call> as data <tool_call> more",
    "</arg_value></tool_call>", "</arg_value><arg_key>city</arg_key><arg_value>x", "<|user|>", "\x00\x1f\x7f",
]  # fmt: skip


@pytest.mark.parametrize("begin", range(0, len(TEXTS), 5))
def test_string_values_of_any_characters(scripted: Live, begin: int) -> None:
    """Markup that a value spells is spelled by other tokens than markup."""
    values = {f"x{i}": text for i, text in enumerate(TEXTS[begin : begin + 5])}
    parameters = {"properties": dict.fromkeys(values, {"type": "string"}), "required": list(values)}
    reply, before = list[str](), "Hm.</think><tool_call>do"
    for name, text in values.items():
        reply += [f"{before}<arg_key>{name}</arg_key><arg_value>", text]
        before = "</arg_value>"
    scripted.says({"Go": [*reply, "</arg_value></tool_call>"]})
    found = ask(scripted, tools=[tool(parameters)], tool_choice="required")
    assert calls(found) == [("do", values)] and found["message"]["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "a", "when": "now", "count": 5, "where": {"city": "Rome", "at": [1.5, -2]}, "tags": ["x", "y"]},
        {"name": "null", "when": "later", "count": None, "where": {"city": "null", "at": []}},
        {"name": "5", "when": "now", "count": 0},
        {"name": "", "when": "now", "count": None, "tags": []},
        {"name": "x", "when": "now", "count": 1, "more": {"any": [{"thing": None}]}, "free": "five"},
        {"name": "x", "when": "now", "count": 1, "more": {}, "free": [1, "2"]},
    ],
)
def test_arguments_of_all_kinds(scripted: Live, arguments: dict[str, Any]) -> None:
    where = {
        "type": "object", "required": ["city", "at"], "additionalProperties": False,
        "properties": {"city": {"type": "string"}, "at": {"type": "array", "items": {"type": "number"}}},
    }  # fmt: skip
    parameters = {
        "type": "object", "required": ["name", "when", "count"], "additionalProperties": False,
        "properties": {
            "name": {"type": "string"}, "when": {"type": "string", "enum": ["now", "later"]},
            "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "where": where,
            "tags": {"type": "array", "items": {"type": "string"}}, "more": {"type": "object"}, "free": {},
        },
    }  # fmt: skip
    assert is_valid(parameters, arguments)
    scripted.says({"Go": f"</think>{call('do', **arguments)}"})
    found = ask(scripted, tools=[tool(parameters)], tool_choice="required", parallel_tool_calls=False)
    assert calls(found) == [("do", arguments)]


# ---------------------------------------------------------------------------------- any schema, a random model
def check(server: Live, schema: dict[str, Any], **asked: Any) -> None:
    """Of text, or of a call's arguments: what comes is of the schema, and it comes to its end."""
    several = asked.pop("several")
    with_tools = {"tools": [tool(schema), NOW], "tool_choice": "required", "parallel_tool_calls": several}
    for options in ({"response_format": form(schema)}, with_tools):
        body = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 300, **asked, **options}
        answer = server.http.post("/v1/chat/completions", json=body)
        if answer.status_code == 400:
            assert "least reply does not fit" in answer.json()["error"]["message"]
            continue
        (choice,) = answer.json()["choices"]
        made, content = calls(choice), choice["message"]["content"]
        if options is with_tools:
            assert choice["finish_reason"] == "tool_calls" and content is None and (len(made) == 1 or several)
            assert all(is_valid(schema, arguments) for name, arguments in made if name == "do")
        else:
            assert choice["finish_reason"] == "stop" and is_valid(schema, json.loads(content))
        if (budget := asked.get("thinking_token_budget")) is not None:
            assert answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget


OPTIONS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63), "temperature": st.sampled_from([1.0, 2.0]), "several": st.booleans(),
        "reasoning_effort": st.sampled_from(["none", "max"]),
    },
    optional={"thinking_token_budget": st.sampled_from([0, 3, 20])},
)  # fmt: skip


@given(schema=schemas(), options=OPTIONS)
@settings(max_examples=3, **ANY)
def test_any_schema(random: Live, schema: dict[str, Any], options: dict[str, Any]) -> None:
    check(random, schema, **options)


@pytest.mark.slow
@given(schema=schemas(), options=OPTIONS)
@settings(max_examples=50, **ANY)
def test_any_schema_at_length(random: Live, schema: dict[str, Any], options: dict[str, Any]) -> None:
    check(random, schema, **options)


def test_a_random_model_that_must_call(random: Live) -> None:
    """Thinking on, temperature 2, and every chain crosses some border."""
    for seed in range(2):
        found = ask(random, tools=[WEATHER, NOW], tool_choice="required", temperature=2.0, seed=seed, max_tokens=200)
        assert found["finish_reason"] == "tool_calls" and calls(found)
        assert all(name in ("get_weather", "now") for name, _ in calls(found))


def test_greedy_replies_do_not_depend_on_drafts(random: Live) -> None:
    """The mask is a function of what came; the plain server's replies are kept for the other one."""
    for seed, schema in enumerate((CITY, {"type": "array", "items": {"type": "integer"}}, {"type": "object"})):
        found = ask(random, response_format=form(schema), temperature=0, max_tokens=150, thinking_token_budget=5)
        said = found["message"]["reasoning_content"], found["message"]["content"]
        assert GREEDY.setdefault(seed, said) == said


GREEDY: dict[int, tuple[str, str]] = {}


def test_what_cannot_be_kept_to_is_a_bad_request(scripted: Live) -> None:
    must = {"tool_choice": "required"}
    for options, message in (
        ({"response_format": form({"type": "nonsense"})}, "schema cannot be kept to: Invalid type: nonsense"),
        ({"response_format": form({"not": {}})}, "schema cannot be kept to: Unimplemented keys"),
        ({"response_format": form(CITY), "max_tokens": 10}, "max_tokens is 10; expected more, the schema's least"),
        ({"tools": [tool({"properties": {"x": {"type": "string", "pattern": "("}}})]} | must, "regex parse error"),
        ({"tools": [tool({"properties": 5})]} | must, "tools[0].parameters.properties is 5"),
    ):  # fmt: skip
        body = {"messages": [{"role": "user", "content": "Go"}]} | options
        answer = scripted.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
