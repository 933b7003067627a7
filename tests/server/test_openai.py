"""OpenAI's own client against a live server: chat, tools, streams, JSON, log-probabilities, errors, completions."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx2
import openai
import pydantic
import pytest
import torch
from server.conftest import Live
from server.scripted import TOKENIZER, call, serving

from nanoglm.engine import SamplingParams, generate
from nanoglm.server.run import make_service

PARAMETERS = {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"],
}  # fmt: skip
FUNCTION = {"name": "get_weather", "description": "Get weather", "parameters": PARAMETERS}
WEATHER = {"type": "function", "function": FUNCTION}
CLOCK = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Heard(NamedTuple):
    """A first choice, however it came. ``calls``: id, name and arguments."""

    reasoning: str | None
    content: str | None
    calls: list[tuple[str, str, Any]]
    finish: str
    usage: Any
    logprobs: list[Any]
    stop_reason: str | None = None

    @property
    def functions(self) -> list[tuple[str, Any]]:
        return [found[1:] for found in self.calls]


def whole(server: Live, asked: str | list[Any], **options: Any) -> Heard:
    messages = [user(asked)] if isinstance(asked, str) else asked
    answer = server.openai.chat.completions.create(model="tiny", messages=messages, **options)
    (choice,) = answer.choices
    calls = [(c.id, c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or ()]
    logprobs = choice.logprobs.content if choice.logprobs else []
    reasoning = choice.message.reasoning_content
    assert reasoning == choice.message.reasoning
    return Heard(
        reasoning, choice.message.content, calls, choice.finish_reason, answer.usage, logprobs, choice.stop_reason
    )


def streamed(server: Live, asked: str | list[Any], **options: Any) -> Heard:
    """Joins chunks, and asserts what holds of every stream."""
    messages = [user(asked)] if isinstance(asked, str) else asked
    usage = {"include_usage": True}
    chunks = list(
        server.openai.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options=usage, **options
        )
    )
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last.choices == [] and last.usage is not None and all(chunk.usage is None for chunk in chunks)
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    first, *middle, end = [chunk.choices[0] for chunk in chunks]
    assert first.delta.role == "assistant" and first.delta.content == ""
    assert [choice.finish_reason for choice in middle] == [None] * len(middle) and end.finish_reason is not None
    reasoning, content, calls, logprobs = "", "", list[list[Any]](), list[Any]()
    for choice in [first, *middle, end]:
        delta = choice.delta
        logprobs += choice.logprobs.content if choice.logprobs else []
        if (thought := getattr(delta, "reasoning_content", None)) is not None:
            assert thought == delta.reasoning and delta.content is None and not calls
            reasoning += thought
        content += delta.content or ""
        for part in delta.tool_calls or ():
            if part.id is not None:  # complete at once, and once
                assert part.index == len(calls) and part.type == "function" and part.function.arguments == ""
                calls.append([part.id, part.function.name, ""])
            else:
                assert part.function.name is None and part.type is None and part.index == len(calls) - 1
                calls[part.index][2] += part.function.arguments
    found = [(id, name, json.loads(arguments)) for id, name, arguments in calls]
    empty = None if calls or reasoning else ""
    return Heard(
        reasoning or None, content or empty, found, end.finish_reason, last.usage, logprobs, end.stop_reason
    )  # fmt: skip


Hear = Callable[..., Heard]
BOTH = pytest.mark.parametrize("hear", [whole, streamed])


# ---------------------------------------------------------------------------------- plain
@BOTH
def test_an_answer_with_thought(scripted: Live, hear: Hear) -> None:
    scripted.says({"Hi": "Let me think.</think>Hello, Zoë! 你好"})
    heard = hear(scripted, [{"role": "system", "content": "Be kind."}, user("Hi")])
    assert (heard.reasoning, heard.content, heard.finish) == ("Let me think.", "Hello, Zoë! 你好", "stop")
    assert scripted.prompt() == (
        "[gMASK]<sop><|system|>Reasoning Effort: Max<|system|>Be kind.<|user|>Hi<|assistant|><think>"
    )
    usage, reply = heard.usage, TOKENIZER.encode("Let me think.</think>Hello, Zoë! 你好")
    assert usage.prompt_tokens == len(TOKENIZER.encode(scripted.prompt()))
    assert usage.completion_tokens == len(reply) and usage.total_tokens == usage.prompt_tokens + len(reply)
    details = usage.completion_tokens_details
    assert details.reasoning_tokens == len("Let me think.")
    assert (details.accepted_prediction_tokens > 0) == (scripted.drafts > 0)


@BOTH
def test_without_thought(scripted: Live, hear: Hear) -> None:
    scripted.says({"Hi": "Hello!"})
    for off in (
        {"reasoning_effort": "none"}, {"reasoning_effort": "minimal"},
        {"extra_body": {"thinking": {"type": "disabled"}}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, "reasoning_effort": "high"},
    ):  # fmt: skip
        heard = hear(scripted, "Hi", **off)
        assert (heard.reasoning, heard.content, heard.finish) == (None, "Hello!", "stop")
        assert scripted.prompt() == "[gMASK]<sop><|user|>Hi<|assistant|><think></think>"
        assert heard.usage.completion_tokens_details.reasoning_tokens == 0


@BOTH
def test_an_empty_answer(scripted: Live, hear: Hear) -> None:
    scripted.says({"Hi": ""})
    heard = hear(scripted, "Hi", reasoning_effort="none")
    assert (heard.reasoning, heard.content, heard.finish, heard.usage.completion_tokens) == (None, "", "stop", 0)


def test_effort_reaches_the_template_by_the_vendors_table(scripted: Live) -> None:
    scripted.says({"Hi": "So.</think>Yes."})
    for options, level in (
        ({}, "Max"), ({"reasoning_effort": "max"}, "Max"), ({"reasoning_effort": "xhigh"}, "Max"),
        ({"reasoning_effort": "high"}, "High"), ({"reasoning_effort": "low"}, "High"),
        ({"reasoning_effort": "high", "extra_body": {"chat_template_kwargs": {"reasoning_effort": "low"}}}, "Max"),
        ({"extra_body": {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}}}, "Max"),
    ):  # fmt: skip
        assert whole(scripted, "Hi", **options).reasoning == "So."
        assert scripted.prompt().startswith(f"[gMASK]<sop><|system|>Reasoning Effort: {level}<|user|>Hi")


def test_developer_is_system(scripted: Live) -> None:
    scripted.says({"Hi": "</think>Yes."})
    assert whole(scripted, [{"role": "developer", "content": "Be brief."}, user("Hi")]).content == "Yes."
    assert "<|system|>Be brief.<|user|>Hi" in scripted.prompt()


def test_vendor_fields_that_change_nothing(scripted: Live) -> None:
    scripted.says({"Weather": f"</think>{call('get_weather', city='Rome')}"})
    extra = {"tool_stream": True, "request_id": "1", "user_id": "me"}
    assert streamed(scripted, "Weather?", tools=[WEATHER], extra_body=extra).functions == [
        ("get_weather", {"city": "Rome"})
    ]


# ---------------------------------------------------------------------------------- tools
@BOTH
def test_a_loop_of_three_steps_replays_reasoning(scripted: Live, hear: Hear) -> None:
    scripted.says({
        "Where is it warmest?": f"I need Paris.</think>Let me look.{call('get_weather', city='Paris', days=3)}",
        "18C": f"Now two.</think>{call('get_weather', city='Rome')}{call('now')}",
        "noon": "Rome wins.</think>It is Rome.",
    })  # fmt: skip
    messages, steps = [user("Where is it warmest?")], list[Heard]()
    for results in (["18C"], ["30C", "noon"], []):
        heard = hear(scripted, messages, tools=[WEATHER, CLOCK])
        steps.append(heard)
        calls = [
            {"id": i, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, name, arguments in heard.calls
        ]
        message = {"role": "assistant", "content": heard.content, "reasoning_content": heard.reasoning}
        messages.append(message | ({"tool_calls": calls} if calls else {}))
        assert heard.finish == ("tool_calls" if calls else "stop") and len(calls) == len(results)
        messages += [
            {"role": "tool", "tool_call_id": made["id"], "content": result}
            for made, result in zip(calls, results, strict=True)
        ]
    assert steps[0].content == "Let me look." and steps[0].functions == [("get_weather", {"city": "Paris", "days": 3})]
    assert steps[1].content is None and steps[1].functions == [("get_weather", {"city": "Rome"}), ("now", {})]
    assert steps[2].content == "It is Rome." and steps[2].reasoning == "Rome wins."
    assert len({made[0] for step in steps for made in step.calls}) == 3
    assert scripted.prompt().partition("<|user|>")[2] == (
        "Where is it warmest?<|assistant|><think>I need Paris.</think>Let me look."
        f"{call('get_weather', city='Paris', days=3)}<|observation|><tool_response>18C</tool_response>"
        f"<|assistant|><think>Now two.</think>{call('get_weather', city='Rome')}{call('now')}"
        "<|observation|><tool_response>30C</tool_response><tool_response>noon</tool_response><|assistant|><think>"
    )
    cached = steps[2].usage.prompt_tokens_details.cached_tokens
    assert cached >= 64 * ((steps[1].usage.prompt_tokens - 1) // 64)  # the loop's prefix stays


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_preserved_thinking(scripted: Live, name: str) -> None:
    scripted.says({"2+2?": "</think>4"})
    messages = [user("1+1?"), {"role": "assistant", "content": "2", name: "Add."}, user("2+2?")]
    whole(scripted, messages)
    assert "<think></think>2<|user|>" in scripted.prompt()
    for extra in ({"thinking": {"clear_thinking": False}}, {"chat_template_kwargs": {"clear_thinking": False}}):
        whole(scripted, messages, extra_body=extra)
        assert "<think>Add.</think>2<|user|>" in scripted.prompt()


@BOTH
def test_tool_choice(scripted: Live, hear: Hear) -> None:
    said = f"</think>Well.{call('get_weather', city='Rome')}{call('now')}"
    scripted.says({"Say": said, "Chat": "Hm.</think>Hello there."})
    tools = [WEATHER, CLOCK]
    heard = hear(scripted, "Say", tools=tools, tool_choice="none")
    assert (heard.content, heard.calls, heard.finish) == (said.removeprefix("</think>"), [], "stop")
    assert "# Tools" not in scripted.prompt()
    heard = hear(scripted, "Say", tools=tools, tool_choice="auto")
    assert heard.content == "Well." and [name for name, _ in heard.functions] == ["get_weather", "now"]
    heard = hear(scripted, "Say", tools=tools, parallel_tool_calls=False)
    assert heard.functions == [("get_weather", {"city": "Rome"})] and heard.finish == "tool_calls"
    for choice, names in (
        ("required", {"get_weather", "now"}), ({"type": "function", "function": {"name": "now"}}, {"now"}),
    ):  # fmt: skip
        heard = hear(scripted, "Chat", tools=tools, tool_choice=choice, parallel_tool_calls=False, max_tokens=200)
        assert heard.reasoning == "Hm." and heard.content is None and heard.finish == "tool_calls"
        ((name, arguments),) = heard.functions
        assert name in names and (name == "now" or isinstance(arguments["city"], str))


def test_the_clients_own_loop_of_events(scripted: Live) -> None:
    scripted.says({"Weather": f"Hm.</think>Look.{call('get_weather', city='Rome', days=2)}"})
    with scripted.openai.chat.completions.stream(model="tiny", messages=[user("Weather?")], tools=[WEATHER]) as events:
        kinds = [event.type for event in events]
        found = events.get_final_completion().choices[0]
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert found.message.content == "Look." and found.finish_reason == "tool_calls"
    assert json.loads(found.message.tool_calls[0].function.arguments) == {"city": "Rome", "days": 2}


# ---------------------------------------------------------------------------------- JSON
class Trip(pydantic.BaseModel):
    city: str
    days: int
    by_train: bool


def test_parse_into_a_pydantic_model(scripted: Live) -> None:
    scripted.says({"Plan": 'Easy.</think>{"city": "Rome", "days": 3, "by_train": true}', "Chat": "Hm.</think>No."})
    made = scripted.openai.chat.completions.parse(model="tiny", messages=[user("Plan")], response_format=Trip)
    assert made.choices[0].message.parsed == Trip(city="Rome", days=3, by_train=True)
    assert made.choices[0].message.reasoning == "Easy."
    made = scripted.openai.chat.completions.parse(
        model="tiny", messages=[user("Chat")], response_format=Trip, max_tokens=150
    )
    assert isinstance(made.choices[0].message.parsed, Trip)  # whatever the model would have said
    with scripted.openai.chat.completions.stream(model="tiny", messages=[user("Plan")], response_format=Trip) as events:
        assert events.get_final_completion().choices[0].message.parsed == Trip(city="Rome", days=3, by_train=True)


def test_parse_tool_arguments(scripted: Live) -> None:
    scripted.says({"Plan": f"</think>{call('Trip', city='Rome', days=3, by_train=True)}"})
    made = scripted.openai.chat.completions.parse(
        model="tiny", messages=[user("Plan")], tools=[openai.pydantic_function_tool(Trip)]
    )
    assert made.choices[0].message.tool_calls[0].function.parsed_arguments == Trip(city="Rome", days=3, by_train=True)


@BOTH
def test_json_object(scripted: Live, hear: Hear) -> None:
    scripted.says({"Plan": 'Easy.</think>{"a": [1, 2]}', "Chat": "Hm.</think>No."})
    form = {"response_format": {"type": "json_object"}}
    assert hear(scripted, "Plan", **form).content == '{"a": [1, 2]}'
    heard = hear(scripted, "Chat", max_tokens=90, **form)
    assert isinstance(json.loads(heard.content or ""), dict) and heard.reasoning == "Hm." and heard.finish == "stop"


@BOTH
def test_markup_within_json_stays_text(scripted: Live, hear: Hear) -> None:
    """A grammar's strings are spelled in bytes, also where they spell a tag."""
    schema = {"type": "object", "properties": {"html": {"type": "string"}}, "required": ["html"]}
    said = json.dumps({"html": "a<think>b</think>c<tool_call>now</tool_call>"})
    scripted.says({"Plan": ["", said]})
    form = {"type": "json_schema", "json_schema": {"name": "page", "schema": schema}}
    heard = hear(scripted, "Plan", response_format=form, reasoning_effort="none")
    assert heard.content == said and heard.reasoning is None
    heard = hear(scripted, "Plan", response_format=form, reasoning_effort="none", tools=[CLOCK])
    assert heard.content == said and heard.calls == []


# ---------------------------------------------------------------------------------- log-probabilities, seeds, n
@BOTH
def test_logprobs_are_the_models(random: Live, hear: Hear) -> None:
    messages = [user("Say something.")]
    options = {"temperature": 0.7, "seed": 5, "max_tokens": 12, "logprobs": True, "top_logprobs": 4}
    heard = hear(random, messages, extra_body={"top_k": 30, "min_tokens": 12}, **options)
    prompt = random.ids(messages)
    ids = [BY_BYTES[bytes(each.bytes)] for each in heard.logprobs]
    assert len(ids) == heard.usage.completion_tokens == 12
    (logits_TV,) = random.service.model.logits([[*prompt, *ids]])
    expected_TV = logits_TV.float().log_softmax(-1)[len(prompt) - 1 :]
    for each, token, row_V in zip(heard.logprobs, ids, expected_TV, strict=False):
        assert each.logprob == pytest.approx(float(row_V[token]), abs=1e-5)
        best = row_V.topk(4)
        assert [BY_BYTES[bytes(top.bytes)] for top in each.top_logprobs] == best.indices.tolist()
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert each.token == bytes(each.bytes).decode(errors="replace")


BY_BYTES = {TOKENIZER.token_bytes(i, skip_special=False): i for i in range(TOKENIZER.vocab_size)}


def test_logprobs_without_and_with_all(random: Live) -> None:
    assert whole(random, "Hi", max_tokens=3).logprobs == []
    heard = whole(random, "Hi", max_tokens=3, logprobs=True, extra_body={"min_tokens": 3})
    assert len(heard.logprobs) == 3 and all(each.top_logprobs == [] for each in heard.logprobs)
    heard = whole(random, "Hi", max_tokens=2, logprobs=True, top_logprobs=20)
    for each in heard.logprobs:
        total = torch.tensor([top.logprob for top in each.top_logprobs]).exp().sum()
        assert len(each.top_logprobs) == 20 and 0 < total < 1


def test_seeds(random: Live) -> None:
    def said(**options: Any) -> list[str]:
        answer = random.openai.chat.completions.create(
            model="tiny", messages=[user("Hi")], max_tokens=16, reasoning_effort="none", **options
        )
        return [choice.message.content or "" for choice in answer.choices]

    assert said(seed=1) == said(seed=1) != said(seed=2)
    assert said() != said()
    assert said(seed=-1) == said(seed=2**64 - 1)
    three = said(seed=1, n=3)
    assert len(set(three)) == 3 and three == said(seed=1, n=3) and three[:1] == said(seed=1)
    assert said(temperature=0) == said(extra_body={"do_sample": False}, temperature=1.5)


def test_n_as_a_stream(random: Live) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": [user("Hi")], "max_tokens": 9, "seed": 3, "n": 3}
    options["extra_body"] = {"min_tokens": 9}
    texts, ends = {0: "", 1: "", 2: ""}, list[int]()
    for chunk in random.openai.chat.completions.create(stream=True, reasoning_effort="none", **options):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    answer = random.openai.chat.completions.create(reasoning_effort="none", **options)
    assert texts == {choice.index: choice.message.content for choice in answer.choices}
    assert sorted(ends) == [0, 1, 2] and answer.usage.completion_tokens == 27


# ---------------------------------------------------------------------------------- ends
@BOTH
def test_stop(scripted: Live, hear: Hear) -> None:
    scripted.says({"Go": "I STOP here.</think>One, two STOP three END four"})
    for stop, content, found in (
        ("STOP", "One, two ", "STOP"), (["END", "STOP"], "One, two ", "STOP"), (["END"], "One, two STOP three ", "END"),
        (["three ENDS", "STOP three X"], "One, two STOP three END four", None),
        (["four"], "One, two STOP three END ", "four"), (["One"], None, "One"),
    ):  # fmt: skip
        heard = hear(scripted, "Go", stop=stop)
        assert (heard.reasoning, heard.content, heard.stop_reason) == ("I STOP here.", content, found)
        assert heard.finish == "stop"


@BOTH
def test_stop_is_not_matched_in_calls(scripted: Live, hear: Hear) -> None:
    scripted.says({"Go": f"</think>Well, ST{call('get_weather', city='STOP')}"})
    heard = hear(scripted, "Go", stop=["STOP"], tools=[WEATHER])
    assert (heard.content, heard.functions) == ("Well, ST", [("get_weather", {"city": "STOP"})])


@BOTH
def test_length(scripted: Live, hear: Hear) -> None:
    scripted.says({"Go": "Thought.</think>Text that goes on."})
    for most in ({"max_tokens": 12}, {"max_completion_tokens": 12}, {"max_completion_tokens": 12, "max_tokens": 3}):
        heard = hear(scripted, "Go", **most)
        assert (heard.reasoning, heard.content, heard.finish) == ("Thought.", "Tex", "length")
        assert heard.usage.completion_tokens == 12
    heard = hear(scripted, "Go", max_tokens=4)
    assert (heard.reasoning, heard.content, heard.finish) == ("Thou", None, "length")  # nothing becomes content


@BOTH
@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 5, 7, 8, 10, 12])
def test_thinking_token_budget_to_the_token(scripted: Live, hear: Hear, budget: int) -> None:
    thought = "0123456789"
    scripted.says({"Go": f"{thought}</think>Done."})
    heard = hear(scripted, "Go", extra_body={"thinking_token_budget": budget})
    kept = thought[:budget]
    assert heard.reasoning == (kept or None)
    assert heard.usage.completion_tokens_details.reasoning_tokens == len(kept)
    # The end stood in place of a token; what the script says behind it comes.
    assert heard.content == thought[budget + 1 :] + "Done."


def test_budget_holds_where_thought_begins_again(scripted: Live) -> None:
    scripted.says({"Go": "0123456789</think>Text.<think>More thought.</think>End."})
    heard = whole(scripted, "Go", extra_body={"thinking_token_budget": 4})
    assert heard.usage.completion_tokens_details.reasoning_tokens <= 4


# ---------------------------------------------------------------------------------- usage and errors
def test_cached_tokens(scripted: Live) -> None:
    scripted.says({"Long": "</think>Yes."})
    asked = f"Long {uuid.uuid4()}" + " and long" * 30
    first, second = whole(scripted, asked).usage, whole(scripted, asked).usage
    assert first.prompt_tokens == second.prompt_tokens
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 64 * ((second.prompt_tokens - 1) // 64) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reasoning_effort": "ultra"}, "reasoning_effort is 'ultra'; expected one of none, "),
        ({"temperature": -1}, "temperature is -1.0; expected a number, 0 or more"),
        ({"messages": []}, "messages is empty; expected at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0] has role 'robot'; expected one of"),
        ({"messages": [user("x" * 9000)]}, "prompt has 90"),
        ({"max_tokens": 9000}, "and 9000 new ones are wanted; expected at most 8192 together"),
        ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"n": 0}, "n is 0; expected 1 to 16"),
        ({"top_logprobs": 21}, "top_logprobs is 21"),
        ({"stop": [""]}, "stop holds an empty text"),
        ({"tool_choice": "required"}, "tool_choice asks for 'any'; expected tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "asks for 'f'"),
        ({"tools": [{"type": "function"}]}, "tools[0] is"),
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema is None"),
        ({"logit_bias": {"x": 1}}, "logit_bias names 'x'"),
        ({"logit_bias": {"999": 1}}, "logit_bias names token id 999"),
        ({"extra_body": {"thinking_token_budget": -1}}, "thinking_token_budget is -1"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs holds 'messages'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_a_bad_request(scripted: Live, options: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        asked: dict[str, Any] = {"model": "tiny", "messages": [user("Hi")], "stream": stream} | options
        with pytest.raises(openai.BadRequestError) as refused:
            scripted.openai.chat.completions.create(**asked)
        assert refused.value.type == "invalid_request_error"
        assert message in refused.value.message


def test_models_and_unknown_ones(scripted: Live) -> None:
    assert [model.id for model in scripted.openai.models.list()] == ["tiny", "other"]
    assert scripted.openai.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served here; expected one of tiny, other"):
        scripted.openai.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served here"):
        scripted.openai.chat.completions.create(model="gpt", messages=[user("Hi")])
    with pytest.raises(openai.NotFoundError):
        scripted.openai.images.generate(prompt="x")


def test_the_key(strict: Live) -> None:
    strict.says({"Hi": "</think>Yes."})
    assert whole(strict, "Hi").content == "Yes."
    for key in ("wrong", "secre", "secrets"):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            strict.openai.with_options(api_key=key).models.list()


def test_a_body_that_is_too_large(strict: Live) -> None:
    with pytest.raises(openai.APIStatusError, match="body is too large; expected at most 4000 bytes") as refused:
        whole(strict, "x" * 4000)
    assert refused.value.status_code == 413


def test_one_request_too_many(strict: Live) -> None:
    strict.says({"Go": "</think>" + "on and " * 100, "Hi": "</think>Yes."}, pause=0.02)
    with strict.openai.chat.completions.create(model="tiny", messages=[user("Go")], stream=True) as chunks:
        next(iter(chunks))
        with pytest.raises(openai.RateLimitError, match="expected at most 1, try again later"):
            whole(strict, "Hi")
    strict.quiet()
    assert whole(strict, "Hi").content == "Yes."


def test_who_closes_a_stream_ends_the_request(scripted: Live) -> None:
    scripted.says({"Go": "</think>" + "on and " * 300}, pause=0.01)
    for n in (1, 3):
        with scripted.openai.chat.completions.create(model="tiny", messages=[user("Go")], stream=True, n=n) as chunks:
            found = [chunk for chunk, _ in zip(chunks, range(20), strict=False)]
        assert len(found) == 20
        scripted.quiet()


def test_who_hangs_up_ends_the_request(scripted: Live) -> None:
    scripted.says({"Go": "</think>" + "on and " * 300}, pause=0.01)
    with pytest.raises(openai.APITimeoutError):
        scripted.openai.with_options(timeout=0.3).chat.completions.create(model="tiny", messages=[user("Go")])
    scripted.quiet()


def test_the_bundled_model() -> None:
    """As many drafts as pay: its greedy text is the plain loop's."""
    service, messages = make_service(None, memory="300MB"), [user("Tell me of the sea.")]
    with serving(service) as url:
        made = openai.OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
            model=service.names[0], messages=messages, max_tokens=24, temperature=0, reasoning_effort="none"
        )
    prompt, stops = service.prompt(messages, None, effort="none"), service.model.config.eos_token_id
    expected = generate(service.model.module, prompt, SamplingParams(max_tokens=24, stop_ids=stops))
    assert made.choices[0].message.content == service.tokenizer.decode(expected).lstrip()


# ---------------------------------------------------------------------------------- completions
def test_completions(scripted: Live) -> None:
    scripted.says({"Once": " upon a time.", "Twice": " told."})
    complete = scripted.openai.completions.create
    made = complete(model="tiny", prompt="Once", max_tokens=50, suffix="end")
    assert (made.choices[0].text, made.choices[0].finish_reason) == (" upon a time.", "stop")
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (4, 13)
    made = complete(model="tiny", prompt=["Once", "Twice"], max_tokens=50, n=2, echo=True)
    texts = ["Once upon a time."] * 2 + ["Twice told."] * 2
    assert [(choice.index, choice.text) for choice in made.choices] == list(enumerate(texts))
    assert made.usage.prompt_tokens == 9
    for prompt in (TOKENIZER.encode("Once"), [TOKENIZER.encode("Once")]):
        assert complete(model="tiny", prompt=prompt, max_tokens=50).choices[0].text == " upon a time."
    assert complete(model="tiny", prompt="Once", max_tokens=5).choices[0].finish_reason == "length"
    assert complete(model="tiny", prompt="Once", stop=["a t"]).choices[0].text == " upon "


def test_completions_as_a_stream(scripted: Live) -> None:
    scripted.says({"Once": " upon a time.", "Twice": " told."})
    texts, ends = {0: "", 1: ""}, dict[int, str]()
    *chunks, last = scripted.openai.completions.create(
        model="tiny", prompt=["Once", "Twice"], max_tokens=50, stream=True, echo=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == {0: "Once upon a time.", 1: "Twice told."} and ends == {0: "stop", 1: "stop"}
    assert last.choices == [] and last.usage.completion_tokens == 19


def test_completions_echo_logprobs(random: Live) -> None:
    """What a test harness asks for: the prompt's own log-probabilities, and nothing new."""
    prompt = "Once upon a time, in Zürich"
    ids = TOKENIZER.encode(prompt)
    (logits_TV,) = random.service.model.logits([ids])
    expected = logits_TV.float().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    for given in (prompt, ids):
        made = random.openai.completions.create(model="tiny", prompt=given, max_tokens=0, echo=True, logprobs=2)
        (choice,) = made.choices
        assert choice.text == prompt and made.usage.completion_tokens == 0
        found = choice.logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-5)
        for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert 2 <= len(top) <= 3 and logprob in top.values()
        assert len(found.tokens) == len(found.text_offset) == len(ids)


def test_completions_logprobs_alike_as_a_stream(random: Live) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once é", "max_tokens": 20, "seed": 4, "logprobs": 1}
    for echo in (False, True):
        made = random.openai.completions.create(echo=echo, **asked).choices[0]
        text, joined = "", dict[str, list[Any]]()
        for chunk in random.openai.completions.create(echo=echo, stream=True, **asked):
            text += chunk.choices[0].text
            for name, values in chunk.choices[0].logprobs or {}:
                joined.setdefault(name, []).extend(values)
        assert text == made.text
        assert joined == {name: getattr(made.logprobs, name) for name in joined}
        assert made.logprobs.text_offset == sorted(made.logprobs.text_offset)
        assert all(offset <= len(made.text) for offset in made.logprobs.text_offset)


def test_completions_that_are_none(scripted: Live) -> None:
    for prompt, message in (("", "prompt is empty"), ([], "prompt"), ([999], "prompt holds token id 999")):
        with pytest.raises(openai.BadRequestError, match=message):
            scripted.openai.completions.create(model="tiny", prompt=prompt)


def test_raw_events_are_what_openai_sends(scripted: Live) -> None:
    """Lines of ``data:`` alone, and [DONE] at last."""
    scripted.says({"Hi": "</think>Yes."})
    asked = {"model": "tiny", "messages": [user("Hi")], "stream": True}
    with httpx2.stream("POST", f"{scripted.url}/v1/chat/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, end = [line for line in response.iter_lines() if line]
    assert end == "data: [DONE]" and all(line.startswith("data: {") for line in events)
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in events)
