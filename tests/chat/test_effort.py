"""What requests say about thinking, row by row of serving spec 2.7, down to the prompt's text."""

from __future__ import annotations

from typing import Any

import pytest
from chat_examples import ASK, MAX, assistant, user

from nanoglm.chat.effort import LEVELS, effort_switches, thinking_budget
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.errors import InputError

TEMPLATE = ChatTemplate()
OFF, HIGH = {"enable_thinking": False}, {"reasoning_effort": "high"}
PROMPTS = {  # by what the template then prints
    "off": f"[gMASK]<sop><|user|>Hi{ASK}</think>",
    "high": f"[gMASK]<sop><|system|>Reasoning Effort: High<|user|>Hi{ASK}",
    "max": f"{MAX}<|user|>Hi{ASK}",
}


@pytest.mark.parametrize(
    ("level", "switches", "prompt"),
    [
        (None, {}, "max"),
        ("none", OFF, "off"),
        ("minimal", OFF, "off"),
        ("low", HIGH, "high"),
        ("medium", HIGH, "high"),
        ("high", HIGH, "high"),
        ("xhigh", {}, "max"),
        ("max", {}, "max"),
    ],
)
def test_levels(level: str | None, switches: dict[str, Any], prompt: str) -> None:
    assert effort_switches(level) == switches
    assert TEMPLATE.render([user("Hi")], add_generation_prompt=True, **switches) == PROMPTS[prompt]
    assert level is None or level in LEVELS


@pytest.mark.parametrize(
    ("level", "thinking", "given", "switches"),
    [
        (None, {"type": "enabled"}, None, {}),
        (None, {"type": "adaptive", "budget_tokens": 5, "display": "omitted"}, None, {}),
        (None, {"type": "between_tools"}, None, {}),
        (None, {"type": "disabled"}, None, OFF),
        ("high", {"type": "disabled"}, None, OFF | HIGH),  # the template prints no effort line then
        ("none", {"type": "enabled"}, None, OFF),
        (None, {}, {}, {}),
        (None, {"type": None, "clear_thinking": None}, None, {}),
        (None, {"clear_thinking": False}, None, {"clear_thinking": False}),
        ("low", {"type": "enabled", "clear_thinking": True}, None, HIGH | {"clear_thinking": True}),
        # chat_template_kwargs win, in the template's own words
        ("none", {"type": "disabled"}, {"enable_thinking": True}, {"enable_thinking": True}),
        ("high", None, {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ("max", None, {"reasoning_effort": "high"}, HIGH),
        (None, {"clear_thinking": True}, {"clear_thinking": False}, {"clear_thinking": False}),
        ("low", None, {"enable_thinking": False}, HIGH | OFF),
        (None, None, {"enable_thinking": None, "persona": ["x"]}, {"enable_thinking": None, "persona": ["x"]}),
    ],
)
def test_fields_together(level: Any, thinking: Any, given: Any, switches: dict[str, Any]) -> None:
    assert effort_switches(level, thinking, given) == switches


def test_nothing_given_is_changed() -> None:
    given = {"enable_thinking": True}
    effort_switches("none", {"clear_thinking": False}, given)["x"] = 1
    assert given == {"enable_thinking": True} and effort_switches("none") == OFF and effort_switches("max") == {}


def test_preserved_reasoning_and_other_switches_reach_the_template() -> None:
    messages = [user("a"), assistant("b", think="R"), user("c")]
    switches = effort_switches(None, {"clear_thinking": False}, {"persona": "x"})
    assert "<think>R</think>b" in TEMPLATE.render(messages, **switches)
    other = ChatTemplate("{{ persona }}{{ messages[0].content }}")
    assert other.encode(byte_tokenizer(), messages, **switches) == [*b"xa"]


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenizer", "self"])
def test_what_the_server_sets_cannot_be_given(name: str) -> None:
    with pytest.raises(InputError, match=f"chat_template_kwargs holds '{name}', which the server sets"):
        effort_switches(None, None, {name: []})
    with pytest.raises(TypeError):  # which is why
        TEMPLATE.encode(byte_tokenizer(), [user("a")], None, **{"add_generation_prompt": True}, **{name: []})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("lots",), "reasoning_effort is 'lots'; expected one of none, minimal, low, medium, high, xhigh, max"),
        (("High",), "reasoning_effort is 'High'; expected one of"),
        ((3,), "reasoning_effort is 3; expected one of"),
        ((["low"],), r"reasoning_effort is \['low'\]; expected one of"),
        ((True,), "reasoning_effort is True; expected one of"),
        ((None, "disabled"), "thinking is 'disabled'; expected an object"),
        ((None, False), "thinking is False; expected an object"),
        ((None, {"type": "off"}), "thinking.type is 'off'; expected one of enabled, disabled, adaptive"),
        ((None, {"type": ["disabled"]}), "thinking.type is .*; expected one of"),
        ((None, {"clear_thinking": "false"}), "thinking.clear_thinking is 'false'; expected true or false"),
        ((None, {"clear_thinking": 0}), "thinking.clear_thinking is 0; expected true or false"),
        ((None, None, ["enable_thinking"]), "chat_template_kwargs is .*; expected an object"),
        ((None, None, {"enable thinking": 1}), "chat_template_kwargs holds 'enable thinking'; expected names"),
        ((None, None, {"": 1}), "chat_template_kwargs holds ''; expected names"),
        ((None, None, {3: 1}), "chat_template_kwargs holds 3; expected names"),
    ],
)
def test_what_nobody_knows_is_refused(fields: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        effort_switches(*fields)


@pytest.mark.parametrize(
    ("thinking", "limit", "budget"),
    [
        (None, None, None),
        ({"type": "enabled"}, None, None),
        ({"type": "enabled", "budget_tokens": 2048}, None, 2048),
        ({"budget_tokens": None}, 7, 7),
        (None, 0, 0),
        ({"budget_tokens": 5}, 9, 5),
        ({"budget_tokens": 9}, 5, 5),
    ],
)
def test_budgets(thinking: Any, limit: Any, budget: int | None) -> None:
    assert thinking_budget(thinking, limit) == budget


@pytest.mark.parametrize("value", [-1, True, 1.0, "5", [5]])
def test_a_budget_is_a_whole_number(value: Any) -> None:
    with pytest.raises(InputError, match="thinking.budget_tokens is .*; expected a whole number of tokens"):
        thinking_budget({"budget_tokens": value})
    with pytest.raises(InputError, match="thinking_token_budget is .*; expected a whole number of tokens"):
        thinking_budget(None, value)
    with pytest.raises(InputError, match="thinking is 5; expected an object"):
        thinking_budget(5)  # type: ignore[arg-type]
