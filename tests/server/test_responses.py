"""OpenAI's own client against the Responses API: items, events and their order, tools, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pydantic
import pytest
from server.conftest import Live
from server.scripted import TOKENIZER, call

WEATHER = {
    "type": "function", "name": "get_weather", "description": "Get weather", "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
CLOCK = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False}


def whole(server: Live, asked: Any, **options: Any) -> Any:
    return server.openai.responses.create(model="tiny", input=asked, **options)


def streamed(server: Live, asked: Any, **options: Any) -> Any:
    """The response of a stream, whose events are checked to tell the same as it."""
    events = list(server.openai.responses.create(model="tiny", input=asked, stream=True, **options))
    check(events)
    return events[-1].response


Ask = Callable[..., Any]
BOTH = pytest.mark.parametrize("ask", [whole, streamed])
TEXTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def check(events: list[Any]) -> None:
    """Numbers without a gap, every item opened, filled and closed before the next, and at last the whole."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    created, progress, *middle, last = events
    assert (created.type, progress.type) == ("response.created", "response.in_progress")
    assert created.response.status == "in_progress" and created.response.output == []
    assert last.type == f"response.{last.response.status}"
    rest = iter(middle)
    for number, item in enumerate(last.response.output):
        event = next(rest)
        assert (event.type, event.output_index) == ("response.output_item.added", number)
        assert (event.item.id, event.item.type, event.item.status) == (item.id, item.type, "in_progress")
        if item.type == "function_call":
            event, arguments = next(rest), ""
            while event.type == "response.function_call_arguments.delta":
                assert (event.item_id, event.output_index) == (item.id, number)
                event, arguments = next(rest), arguments + event.delta
            assert event.type == "response.function_call_arguments.done"
            assert arguments == event.arguments == item.arguments and event.name == item.name
        else:
            event, text, name = next(rest), "", TEXTS[item.type]
            assert event.type == "response.content_part.added" and event.part.text == ""
            event = next(rest)
            while event.type == f"{name}.delta":
                assert (event.item_id, event.output_index, event.content_index) == (item.id, number, 0)
                event, text = next(rest), text + event.delta
            assert event.type == f"{name}.done" and event.text == text == item.content[0].text
            event = next(rest)
            assert event.type == "response.content_part.done" and event.part.text == text
        event = next(rest)
        assert event.type == "response.output_item.done" and event.item == item
    assert next(rest, None) is None


# ---------------------------------------------------------------------------------- plain
@BOTH
def test_a_response_with_thought(scripted: Live, ask: Ask) -> None:
    scripted.says({"Hi": "Let me think.</think>Hello, Zoë!"})
    found = ask(scripted, "Hi", instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=100)
    reasoning, message = found.output
    assert reasoning.content[0].text == "Let me think." and message.content[0].text == found.output_text
    assert found.output_text == "Hello, Zoë!" and found.status == "completed" and found.error is None
    assert {item.status for item in found.output} == {"completed"}
    assert scripted.prompt() == (
        "[gMASK]<sop><|system|>Reasoning Effort: Max<|system|>Be kind.<|user|>Hi<|assistant|><think>"
    )
    usage = found.usage
    assert usage.input_tokens == len(TOKENIZER.encode(scripted.prompt()))
    assert usage.output_tokens_details.reasoning_tokens == len("Let me think.")
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert (found.instructions, found.metadata, found.max_output_tokens) == ("Be kind.", {"a": "b"}, 100)


@BOTH
def test_effort(scripted: Live, ask: Ask) -> None:
    scripted.says({"Hi": "Hello!"})
    found = ask(scripted, "Hi", reasoning={"effort": "none"})
    assert [item.type for item in found.output] == ["message"] and found.output_text == "Hello!"
    scripted.says({"Hi": "So.</think>Hello!"})
    assert len(ask(scripted, "Hi", reasoning={"effort": "low", "summary": "auto"}).output) == 2
    assert "Reasoning Effort: High" in scripted.prompt()


@BOTH
def test_incomplete(scripted: Live, ask: Ask) -> None:
    scripted.says({"Hi": "Thought.</think>Text that goes on."})
    found = ask(scripted, "Hi", max_output_tokens=12)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output_text == "Tex" and [item.status for item in found.output] == ["completed", "incomplete"]
    found = ask(scripted, "Hi", max_output_tokens=3)
    assert found.output[0].content[0].text == "Tho" and found.output[0].status == "incomplete"
    found = ask(scripted, "Hi", max_output_tokens=10**6)  # no more than there is room for
    assert found.status == "completed"


def test_messages_of_all_kinds(scripted: Live) -> None:
    scripted.says({"last": "</think>Yes."})
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text} for text in "ab"]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"role": "user", "content": "last"},
    ]  # fmt: skip
    assert whole(scripted, items).output_text == "Yes."
    assert "<|system|>Be brief.<|user|>ab<|assistant|><think></think>c<|user|>last<|assistant|>" in scripted.prompt()


# ---------------------------------------------------------------------------------- tools
@BOTH
@pytest.mark.parametrize("way", ["items", "previous_response_id"])
def test_a_loop_of_three_steps(scripted: Live, ask: Ask, way: str) -> None:
    scripted.says({
        "Where is it warmest?": f"I need Paris.</think>Let me look.{call('get_weather', city='Paris')}",
        "18C": f"Now two.</think>{call('get_weather', city='Rome')}{call('now')}",
        "noon": "Rome wins.</think>It is Rome.",
    })  # fmt: skip
    given: list[Any] = [{"role": "user", "content": "Where is it warmest?"}]
    options: dict[str, Any] = {"tools": [WEATHER, CLOCK], "instructions": "Be kind."}
    kinds = list[list[str]]()
    for results in (["18C"], ["30C", "noon"], []):
        found = ask(scripted, given, **options)
        kinds.append([item.type for item in found.output])
        calls = [item for item in found.output if item.type == "function_call"]
        outputs = [
            {"type": "function_call_output", "call_id": made.call_id, "output": result}
            for made, result in zip(calls, results, strict=True)
        ]
        if way == "items":
            given = [*given, *found.output, *outputs]
        else:
            given, options["previous_response_id"] = outputs, found.id
    assert kinds == [
        ["reasoning", "message", "function_call"], ["reasoning", "function_call", "function_call"],
        ["reasoning", "message"],
    ]  # fmt: skip
    assert found.output_text == "It is Rome."
    assert scripted.prompt().partition("<|system|>Be kind.")[2] == (
        f"<|user|>Where is it warmest?<|assistant|><think>I need Paris.</think>Let me look."
        f"{call('get_weather', city='Paris')}<|observation|><tool_response>18C</tool_response>"
        f"<|assistant|><think>Now two.</think>{call('get_weather', city='Rome')}{call('now')}"
        "<|observation|><tool_response>30C</tool_response><tool_response>noon</tool_response><|assistant|><think>"
    )
    assert (found.previous_response_id is not None) == (way == "previous_response_id")


@BOTH
def test_tool_choice(scripted: Live, ask: Ask) -> None:
    scripted.says({"Say": f"</think>{call('get_weather', city='Rome')}{call('now')}", "Chat": "Hm.</think>Hello."})
    tools = [WEATHER, CLOCK, {"type": "web_search"}]
    found = ask(scripted, "Say", tools=tools, parallel_tool_calls=False)
    assert [(item.name, json.loads(item.arguments)) for item in found.output] == [("get_weather", {"city": "Rome"})]
    assert found.parallel_tool_calls is False
    found = ask(scripted, "Say", tools=tools, tool_choice="none")
    assert [item.type for item in found.output] == ["message"] and "# Tools" not in scripted.prompt()
    for choice, names in (("required", {"get_weather", "now"}), ({"type": "function", "name": "now"}, {"now"})):
        found = ask(scripted, "Chat", tools=tools, tool_choice=choice, max_output_tokens=200)
        reasoning, *calls = found.output
        assert reasoning.content[0].text == "Hm." and calls and {made.name for made in calls} <= names
        assert all(isinstance(json.loads(made.arguments), dict) for made in calls)


# ---------------------------------------------------------------------------------- JSON
class Trip(pydantic.BaseModel):
    city: str
    days: int


def test_parse_into_a_pydantic_model(scripted: Live) -> None:
    scripted.says({"Plan": 'Easy.</think>{"city": "Rome", "days": 3}', "Chat": "Hm.</think>No."})
    assert scripted.openai.responses.parse(model="tiny", input="Plan", text_format=Trip).output_parsed == Trip(
        city="Rome", days=3
    )
    made = scripted.openai.responses.parse(model="tiny", input="Chat", text_format=Trip, max_output_tokens=150)
    assert isinstance(made.output_parsed, Trip)
    with scripted.openai.responses.stream(model="tiny", input="Plan", text_format=Trip) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_parsed == Trip(city="Rome", days=3)
    assert kinds[-1] == "response.completed"


def test_json_object(scripted: Live) -> None:
    scripted.says({"Chat": "Hm.</think>No."})
    found = whole(scripted, "Chat", text={"format": {"type": "json_object"}}, max_output_tokens=120)
    assert isinstance(json.loads(found.output_text), dict)


# ---------------------------------------------------------------------------------- what is kept
def test_retrieve(scripted: Live) -> None:
    scripted.says({"Hi": "So.</think>Yes."})
    found = whole(scripted, "Hi")
    assert scripted.openai.responses.retrieve(found.id) == found
    for made in (whole(scripted, "Hi", store=False), streamed(scripted, "Hi", store=False)):
        with pytest.raises(openai.NotFoundError, match="no response 'resp_"):
            scripted.openai.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError, match="no response 'x'"):
        whole(scripted, "Hi", previous_response_id="x")


def test_a_conversation_by_its_ids(scripted: Live) -> None:
    scripted.says({"first": "One.</think>1", "second": "Two.</think>2", "third": "Three.</think>3"})
    first = whole(scripted, "first", instructions="Be kind.")
    second = streamed(scripted, "second", previous_response_id=first.id)
    third = whole(scripted, "third", previous_response_id=second.id)
    assert third.output_text == "3" and third.previous_response_id == second.id
    assert scripted.prompt().endswith(  # instructions are of their own turn only; earlier thought is cleared
        "Max<|user|>first<|assistant|><think></think>1<|user|>second<|assistant|><think></think>2"
        "<|user|>third<|assistant|><think>"
    )


def test_cached_tokens(scripted: Live) -> None:
    scripted.says({"Go": "</think>Yes."})
    first = whole(scripted, "Go " + "and long " * 30)
    second = whole(scripted, "Go on", previous_response_id=first.id)
    assert second.usage.input_tokens_details.cached_tokens >= 64 * ((first.usage.input_tokens - 1) // 64) > 0


# ---------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": [{"type": "magic"}]}, "input[0] has type 'magic'; expected message, reasoning"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0] has content 5"),
        ({"input": []}, "messages is empty"),
        ({"input": "x" * 9000}, "prompt has 90"),
        ({"reasoning": {"effort": "ultra"}}, "reasoning_effort is 'ultra'"),
        ({"text": {"format": {"type": "xml"}}}, "type is 'xml'"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"tool_choice": "required"}, "tool_choice asks for 'any'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "asks for 'f'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_a_bad_request(scripted: Live, options: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            scripted.openai.responses.create(**{"model": "tiny", "input": "Hi", "stream": stream} | options)
        assert message in refused.value.message


def test_who_closes_a_stream_ends_the_request(scripted: Live) -> None:
    scripted.says({"Go": "</think>" + "on and " * 300}, pause=0.01)
    with scripted.openai.responses.create(model="tiny", input="Go", stream=True) as events:
        assert len([event for event, _ in zip(events, range(12), strict=False)]) == 12
    scripted.quiet()
