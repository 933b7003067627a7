"""Anthropic's own client against a live server: blocks, events and their order, tools, thinking, errors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import anthropic
import pydantic
import pytest
from server.conftest import Live
from server.scripted import TOKENIZER, call

WEATHER = {
    "name": "get_weather", "description": "Get weather",
    "input_schema": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"],
    },
}  # fmt: skip
CLOCK = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
ENABLED = {"type": "enabled", "budget_tokens": 1024}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def options_of(asked: Any, options: dict[str, Any]) -> dict[str, Any]:
    messages = asked if isinstance(asked, list) else [user(asked)]
    return {"model": "tiny", "max_tokens": 200, "messages": messages} | options


def whole(server: Live, asked: Any, **options: Any) -> anthropic.types.Message:
    return server.anthropic.messages.create(**options_of(asked, options))


def streamed(server: Live, asked: Any, **options: Any) -> anthropic.types.Message:
    """The message that the client makes of a stream, whose events are checked; it adds events of its own."""
    with server.anthropic.messages.stream(**options_of(asked, options)) as stream:
        check([event for event in stream if event.type.startswith(("message_", "content_block_"))])
        return stream.get_final_message()


Ask = Callable[..., anthropic.types.Message]
BOTH = pytest.mark.parametrize("ask", [whole, streamed])


def check(events: list[Any]) -> None:
    """The documented order: a message, its blocks one after the other, its end."""
    start, *middle, end, stop = events
    assert (start.type, end.type, stop.type) == ("message_start", "message_delta", "message_stop")
    assert start.message.content == [] and start.message.stop_reason is None and start.message.usage.input_tokens >= 0
    assert end.delta.stop_reason is not None and end.usage.output_tokens >= 0
    rest = iter(middle)
    for number, event in enumerate(rest):
        assert (event.type, event.index) == ("content_block_start", number)
        kind, deltas, partial = event.content_block.type, list[str](), ""
        while (event := next(rest)).type == "content_block_delta":
            assert event.index == number
            deltas.append(event.delta.type)
            partial += getattr(event.delta, "partial_json", "")
        assert (event.type, event.index) == ("content_block_stop", number)
        if kind == "thinking":
            assert deltas[-1] == "signature_delta" and set(deltas[:-1]) == {"thinking_delta"}
        else:
            assert set(deltas) == {{"text": "text_delta", "tool_use": "input_json_delta"}[kind]}
        assert kind != "tool_use" or isinstance(json.loads(partial), dict)


def blocks(message: anthropic.types.Message) -> list[Any]:
    """Of each block what it says."""
    said = {"text": lambda b: b.text, "thinking": lambda b: b.thinking, "tool_use": lambda b: (b.name, b.input)}
    return [said[block.type](block) for block in message.content]


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


# ---------------------------------------------------------------------------------- plain
@BOTH
def test_without_thinking_unless_asked(scripted: Live, ask: Ask) -> None:
    scripted.says({"Hi": "Hello, Zoë!"})
    for options in (
        {},
        {"thinking": {"type": "disabled"}},
        {"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}},
    ):
        found = ask(scripted, "Hi", **options)
        assert blocks(found) == ["Hello, Zoë!"] and (found.stop_reason, found.stop_sequence) == ("end_turn", None)
        assert scripted.prompt() == "[gMASK]<sop><|user|>Hi<|assistant|><think></think>"
    assert (found.role, found.type, found.model) == ("assistant", "message", "tiny")
    assert found.usage.output_tokens == len(TOKENIZER.encode("Hello, Zoë!"))


@BOTH
def test_thinking(scripted: Live, ask: Ask) -> None:
    scripted.says({"Hi": "Let me think.</think>Hello!"})
    for options, level in (
        ({"thinking": ENABLED}, "Max"), ({"thinking": {"type": "adaptive"}}, "Max"),
        ({"output_config": {"effort": "high"}}, "High"), ({"output_config": {"effort": "max"}}, "Max"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"}}, "High"),
    ):  # fmt: skip
        found = ask(scripted, "Hi", **options)
        assert blocks(found) == ["Let me think.", "Hello!"] and found.stop_reason == "end_turn"
        assert found.content[0].type == "thinking" and found.content[0].signature
        assert found.usage.output_tokens_details.thinking_tokens == len("Let me think.")
        assert scripted.prompt().startswith(f"[gMASK]<sop><|system|>Reasoning Effort: {level}<|user|>Hi")


@BOTH
@pytest.mark.parametrize("budget", [0, 1, 3, 4, 9, 11])
def test_budget_tokens_to_the_token(scripted: Live, ask: Ask, budget: int) -> None:
    thought = "0123456789"
    scripted.says({"Hi": f"{thought}</think>Done."})
    found = ask(scripted, "Hi", thinking={"type": "enabled", "budget_tokens": budget})
    assert blocks(found) == [*([thought[:budget]] if budget else []), thought[budget + 1 :] + "Done."]


@BOTH
def test_length_and_clamp(scripted: Live, ask: Ask) -> None:
    scripted.says({"Hi": "Thought.</think>Text that goes on."})
    found = ask(scripted, "Hi", max_tokens=12, thinking=ENABLED)
    assert blocks(found) == ["Thought.", "Tex"] and found.stop_reason == "max_tokens"
    assert found.usage.output_tokens == 12
    found = ask(scripted, "Hi", max_tokens=3, thinking=ENABLED)
    assert blocks(found) == ["Tho"] and found.stop_reason == "max_tokens"
    found = ask(scripted, "Hi", max_tokens=64_000, thinking=ENABLED)  # as Claude Code asks, whatever there is room for
    assert blocks(found) == ["Thought.", "Text that goes on."] and found.stop_reason == "end_turn"


@BOTH
def test_stop_sequences(scripted: Live, ask: Ask) -> None:
    scripted.says({"Go": f"I STOP here.</think>One, two STOP three END{call('now')}"})
    for stop, text, found_stop in ((["END", "STOP"], "One, two ", "STOP"), (["END"], "One, two STOP three ", "END")):
        found = ask(scripted, "Go", stop_sequences=stop, thinking=ENABLED, tools=[CLOCK])
        assert blocks(found) == ["I STOP here.", text]
        assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", found_stop)
    found = ask(scripted, "Go", stop_sequences=["ENDS"], thinking=ENABLED, tools=[CLOCK])
    assert (found.stop_reason, found.stop_sequence, found.content[-1].type) == ("tool_use", None, "tool_use")


def test_sampling_is_taken(random: Live) -> None:
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.001}):
        first, second = (whole(random, "Hi", max_tokens=12, extra_body=options) for _ in range(2))
        assert blocks(first) == blocks(second)
    assert blocks(whole(random, "Hi", max_tokens=12)) != blocks(whole(random, "Hi", max_tokens=12))


# ---------------------------------------------------------------------------------- tools
@BOTH
def test_a_loop_of_three_steps_replays_thinking(scripted: Live, ask: Ask) -> None:
    scripted.says({
        "Where is it warmest?": f"I need Paris.</think>Let me look.{call('get_weather', city='Paris', days=3)}",
        "18C": f"Now two.</think>{call('get_weather', city='Rome')}{call('now')}",
        "noon": "Rome wins.</think>It is Rome.",
    })  # fmt: skip
    messages, said, ids = [user("Where is it warmest?")], list[list[Any]](), set[str]()
    for results in (["18C"], ["30C", "noon"], []):
        found = ask(scripted, messages, tools=[WEATHER, CLOCK], thinking=ENABLED)
        said.append(blocks(found))
        calls = [block for block in found.content if block.type == "tool_use"]
        ids |= {made.id for made in calls}
        assert found.stop_reason == ("tool_use" if calls else "end_turn")
        messages += [
            {"role": "assistant", "content": found.content},
            user([
                {"type": "tool_result", "tool_use_id": made.id, "content": result}
                for made, result in zip(calls, results, strict=True)
            ]),
        ]  # fmt: skip
    assert said == [
        ["I need Paris.", "Let me look.", ("get_weather", {"city": "Paris", "days": 3})],
        ["Now two.", ("get_weather", {"city": "Rome"}), ("now", {})],
        ["Rome wins.", "It is Rome."],
    ]
    assert len(ids) == 3
    assert scripted.prompt().partition("<|user|>")[2] == (
        "Where is it warmest?<|assistant|><think>I need Paris.</think>Let me look."
        f"{call('get_weather', city='Paris', days=3)}<|observation|><tool_response>18C</tool_response>"
        f"<|assistant|><think>Now two.</think>{call('get_weather', city='Rome')}{call('now')}"
        "<|observation|><tool_response>30C</tool_response><tool_response>noon</tool_response><|assistant|><think>"
    )


@BOTH
def test_tool_choice(scripted: Live, ask: Ask) -> None:
    scripted.says({"Say": f"Well.{call('get_weather', city='Rome')}{call('now')}", "Chat": "Hello."})
    tools = [WEATHER, CLOCK, {"type": "web_search_20250305", "name": "web_search"}]
    assert len(ask(scripted, "Say", tools=tools, tool_choice={"type": "auto"}).content) == 3
    one = {"type": "auto", "disable_parallel_tool_use": True}
    assert blocks(ask(scripted, "Say", tools=tools, tool_choice=one)) == ["Well.", ("get_weather", {"city": "Rome"})]
    found = ask(scripted, "Say", tools=tools, tool_choice={"type": "none"})
    assert [block.type for block in found.content] == ["text"] and "# Tools" not in scripted.prompt()
    for choice, names in (({"type": "any"}, {"get_weather", "now"}), ({"type": "tool", "name": "now"}, {"now"})):
        choice = choice | {"disable_parallel_tool_use": True}
        found = ask(scripted, "Chat", tools=tools, tool_choice=choice, max_tokens=160, thinking=ENABLED)
        made = found.content[-1]
        assert made.type == "tool_use" and made.name in names and found.stop_reason == "tool_use"


def test_call_within_thought(scripted: Live) -> None:
    """Thought that goes into a call without its end: the call is a block all the same."""
    scripted.says({"Go": f"I look.{call('now')}"})
    found = streamed(scripted, "Go", tools=[CLOCK], thinking=ENABLED)
    assert blocks(found) == ["I look.", ("now", {})] and found.stop_reason == "tool_use"


# ---------------------------------------------------------------------------------- what comes in
def prompt_of(server: Live, messages: list[Any], **options: Any) -> str:
    """The prompt, and that its tokens are counted right."""
    server.says({"last": "Yes."})
    found = whole(server, messages, **options)
    counted = server.anthropic.messages.count_tokens(model="tiny", messages=messages, **options).input_tokens
    assert counted == found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)
    assert counted == len(TOKENIZER.encode(server.prompt()))
    return server.prompt()


def test_system_blocks_with_cache_control(scripted: Live) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "Be kind. "}, {"type": "text", "text": "Be brief.", **mark}]
    found = prompt_of(scripted, [user([{"type": "text", "text": "last", **mark}])], system=system)
    assert found == "[gMASK]<sop><|system|>Be kind. Be brief.<|user|>last<|assistant|><think></think>"
    assert prompt_of(scripted, [user("last")], system="Be kind.").startswith("[gMASK]<sop><|system|>Be kind.<|user|>")


def test_tool_results_of_all_forms_come_before_text(scripted: Live) -> None:
    use = [{"type": "tool_use", "id": f"t{i}", "name": "now", "input": {}} for i in range(4)]
    results = [
        text("And "),
        {"type": "tool_result", "tool_use_id": "t0", "content": "noon"},
        {"type": "tool_result", "tool_use_id": "t1", "content": [text("a"), text("b")]},
        text("last"),
        {"type": "tool_result", "tool_use_id": "t2", "content": "it failed", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t3"},
    ]  # fmt: skip
    found = prompt_of(scripted, [user("time?"), {"role": "assistant", "content": use}, user(results)], tools=[CLOCK])
    assert found.endswith(
        f"<|assistant|><think></think>{call('now') * 4}<|observation|><tool_response>noon</tool_response>"
        "<tool_response>ab</tool_response><tool_response>it failed</tool_response><tool_response></tool_response>"
        "<|user|>And last<|assistant|><think></think>"
    )


def test_deferred_tools_and_references(scripted: Live) -> None:
    """Tools that a search finds, as Claude Code has them: not listed before, printed where they are referred to."""
    search = {"name": "search", "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}}}
    use = {"type": "tool_use", "id": "t", "name": "search", "input": {"q": "weather"}}
    reference = {"type": "tool_reference", "tool_name": "get_weather"}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [reference]}
    tools = [search, WEATHER | {"defer_loading": True}]
    first, *rest = [user("last")], {"role": "assistant", "content": [use]}, user([result])
    assert "get_weather" not in prompt_of(scripted, first, tools=tools)
    found = prompt_of(scripted, [*first, *rest], tools=tools)
    listed, _, after = found.partition("<|user|>")
    assert "get_weather" not in listed and "<tool_response><tools>\n{" in after and '"name": "get_weather"' in after
    assert '"parameters": {"type": "object", "properties": {"city"' in after
    scripted.says({"last": call("get_weather", city="Rome")})
    made = streamed(scripted, [*first, *rest], tools=tools)
    assert blocks(made) == [("get_weather", {"city": "Rome"})]  # and it can be called


def test_thinking_comes_back(scripted: Live) -> None:
    thought = {"type": "thinking", "thinking": "Add.", "signature": "nanoglm"}
    messages = [user("1+1?"), {"role": "assistant", "content": [thought, text("2")]}, user("last")]
    found = prompt_of(scripted, messages, thinking=ENABLED)
    assert "<think></think>2<|user|>last" in found  # an earlier turn's is cleared
    found = prompt_of(scripted, messages, thinking={**ENABLED, "clear_thinking": False})
    assert "<think>Add.</think>2<|user|>last" in found
    messages[1]["content"][0] = {"type": "redacted_thinking", "data": "x"}
    assert "<think></think>2<|user|>last" in prompt_of(scripted, messages, thinking=ENABLED)


def test_traffic_of_claude_code(scripted: Live) -> None:
    """All at once, on the beta path, with the window's suffix and fields that mean nothing here."""
    scripted.says({"fix it": f"I see.</think>I will look.{call('Bash', command='ls -la', timeout=5)}"})
    bash = {"name": "Bash", "description": "Runs a command", "input_schema": {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "additionalProperties": False,
        "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}}, "required": ["command"],
    }}  # fmt: skip
    with scripted.anthropic.beta.messages.stream(
        model="tiny[1m]", max_tokens=32_000, betas=["claude-code-20250219", "interleaved-thinking-2025-05-14"],
        system=[{"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        messages=[user([text("<system-reminder>x</system-reminder>"), text("fix it")])],
        tools=[bash, {**WEATHER, "defer_loading": True}], thinking={"type": "enabled", "budget_tokens": 31_999},
        metadata={"user_id": "me"}, context_management={"edits": []}, extra_body={"temperature": 1, "top_k": 50},
    ) as events:  # fmt: skip
        found = events.get_final_message()
    assert blocks(found) == ["I see.", "I will look.", ("Bash", {"command": "ls -la", "timeout": 5})]
    assert found.stop_reason == "tool_use"


def test_cached_tokens(scripted: Live) -> None:
    scripted.says({"Long": "Yes."})
    asked = f"Long {uuid.uuid4()}" + " and long" * 30
    first, second = whole(scripted, asked).usage, whole(scripted, asked).usage
    total = first.input_tokens
    assert first.cache_read_input_tokens == 0 and second.input_tokens + (second.cache_read_input_tokens or 0) == total
    assert second.cache_read_input_tokens == 64 * ((total - 1) // 64) > 0


# ---------------------------------------------------------------------------------- JSON
class Trip(pydantic.BaseModel):
    city: str
    days: int


def test_parse_into_a_pydantic_model(scripted: Live) -> None:
    scripted.says({"Plan": '{"city": "Rome", "days": 3}', "Chat": "No."})
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 150, "output_format": Trip}
    found = scripted.anthropic.messages.parse(messages=[user("Plan")], **asked)
    assert found.parsed_output == Trip(city="Rome", days=3)
    found = scripted.anthropic.messages.parse(messages=[user("Chat")], **asked)
    assert isinstance(found.parsed_output, Trip)


# ---------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"messages": []}, "messages is empty; expected at least one"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0] has role 'tool'; expected user, assistant"),
        ({"messages": [user(5)]}, "messages[0] has content 5"),
        ({"messages": [user([{"type": "magic"}])]}, "messages[0] holds a block of type 'magic'"),
        ({"messages": [user("x" * 9000)]}, "prompt has 90"),
        ({"thinking": {"type": "often"}}, "thinking.type is 'often'"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens is -1"),
        ({"output_config": {"effort": "ultra"}}, "reasoning_effort is 'ultra'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for 'any'; expected tools"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [CLOCK]}, "tool_choice asks for 'f'"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
        ({"extra_body": {"temperature": -1}}, "temperature is -1.0"),
        ({"stop_sequences": [""]}, "stop holds an empty text"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_a_bad_request(scripted: Live, options: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": [user("Hi")], "stream": stream}
        with pytest.raises(anthropic.BadRequestError) as refused:
            scripted.anthropic.messages.create(**asked | options)
        assert refused.value.body["type"] == "error"  # type: ignore[index]
        error = refused.value.body["error"]  # type: ignore[index]
        assert error["type"] == "invalid_request_error" and message in error["message"]


def test_other_errors(strict: Live) -> None:
    def refused(kind: type[anthropic.APIStatusError], **options: Any) -> str:
        with pytest.raises(kind) as found:
            client = strict.anthropic.with_options(auth_token=options.pop("key", strict.key))
            client.messages.create(**{"model": "tiny", "max_tokens": 9, "messages": [user("Hi")]} | options)
        assert found.value.body["type"] == "error"  # type: ignore[index]
        return str(found.value.body["error"]["type"])  # type: ignore[index]

    assert refused(anthropic.AuthenticationError, key="wrong") == "authentication_error"
    assert refused(anthropic.NotFoundError, model="claude") == "not_found_error"
    assert refused(anthropic.APIStatusError, messages=[user("x" * 4000)]) == "request_too_large"
    keyed = anthropic.Anthropic(base_url=strict.url, api_key=strict.key, max_retries=0)
    strict.says({"Go": "on and " * 100, "Hi": "Yes."}, pause=0.02)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 900, "messages": [user("Go")]}
    with keyed.messages.create(stream=True, **asked) as events:
        next(iter(events))
        assert refused(anthropic.RateLimitError) == "rate_limit_error"
    strict.quiet()
    assert blocks(whole(strict, "Hi")) == ["Yes."]


def test_models(scripted: Live) -> None:
    assert [model.id for model in scripted.anthropic.models.list()] == ["tiny", "other"]
    assert scripted.anthropic.models.retrieve("other").display_name == "other"
    scripted.says({"Hi": "Yes."})
    assert blocks(whole(scripted, "Hi", model="other[1m]")) == ["Yes."]


def test_who_closes_a_stream_ends_the_request(scripted: Live) -> None:
    scripted.says({"Go": "on and " * 300}, pause=0.01)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 4000, "messages": [user("Go")]}
    with scripted.anthropic.messages.create(stream=True, **asked) as events:
        assert len([event for event, _ in zip(events, range(12), strict=False)]) == 12
    scripted.quiet()
