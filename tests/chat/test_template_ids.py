"""From messages to ids: what clients send is mended; what comes from outside stays text."""

from __future__ import annotations

from typing import Any

import pytest
from chat_drawn import JSON, TEXT
from chat_examples import EXAMPLES, MAX, assistant, call, system, tool, user
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoglm.chat.template import GUARD, ChatTemplate, normalise
from nanoglm.chat.tokenizer import ADDED_TOKENS, Tokenizer, byte_tokenizer, train_bpe
from nanoglm.errors import InputError

TEMPLATE, BYTES = ChatTemplate(), byte_tokenizer()
MERGED = train_bpe(["the weather of the house, <tool> [call] über /think 🙂 "] * 20, 320)


# ------------------------------------------------------------------------------- messages
def test_normalise_mends_what_clients_send() -> None:
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": None},
        {"role": "assistant", "reasoning": "r", "reasoning_content": None, "tool_calls": None},
        {
            "role": "assistant",
            "content": ["<think>r</thi", {"type": "text", "text": "nk> c"}],
            "reasoning_content": None,
        },
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}, {"name": "g"}]},
        {"role": "tool", "content": [{"output": "o"}], "tool_call_id": "1"},
    ]
    before = repr(messages)
    spoken = {"role": "assistant", "reasoning_content": "r", "tool_calls": []}
    calls = [{"id": "1", "function": {"name": "f", "arguments": {}}}]
    calls.append({"name": "g", "function": {"name": "g", "arguments": {}}})
    assert normalise(messages) == [
        system("d"),
        user(""),
        spoken | {"content": ""},
        spoken | {"content": " c"},
        {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": calls},
        messages[-1],
    ]
    assert repr(messages) == before
    image = [{"type": "image"}, "a</think>b"]  # not text alone: left as it is
    assert normalise([assistant(image)])[0]["content"] == image


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " b ", "\n"]), max_size=8).map("".join), st.booleans())
def test_normalise_takes_reasoning_out_as_the_template_does(content: str, preserved: bool) -> None:
    messages, switches = [assistant(content), user("q")], {"clear_thinking": not preserved}
    assert TEMPLATE.render(normalise(messages), **switches) == TEMPLATE.render(messages, **switches)


@pytest.mark.parametrize("name", EXAMPLES)
def test_normalising_changes_no_example_but_two(name: str) -> None:
    messages, options, text = EXAMPLES[name]
    text = text.replace("None", "") if name == "E15" else text
    text = text.replace("<|user|>z", "<|system|>dev<|user|>z") if name == "E19" else text
    options = {"add_generation_prompt": True} | options
    assert TEMPLATE.render(normalise(messages), **options) == text
    for tokenizer in (BYTES, MERGED):  # no example spells markup in its contents, so both ways give the same ids
        assert TEMPLATE.encode(tokenizer, messages, **options) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hi", "messages is 'Hi'; expected a list"),
        (["Hi"], r"messages\[0\] is 'Hi'; expected an object"),
        ([user("q"), {"role": "bot"}], r"messages\[1\] has role 'bot'; expected one of system, developer, user"),
        ([{"content": "q"}], "role None"),
        ([user(3)], "content 3; expected text or a list"),
        ([user({"text": "a"})], "expected text or a list"),
        ([user([3])], "content part 3"),
        ([user([{"type": "text", "text": None}])], "content part"),
        ([user([{"text": "a"}])], "content part .* with a type"),
        ([assistant("a") | {"reasoning_content": 3}], "reasoning_content 3"),
        ([assistant("a", {"function": {"name": 3}})], "tool call"),
        ([assistant("a", {"function": {"name": "f", "arguments": "{x"}})], "calls f with arguments '{x'"),
        ([assistant("a", {"function": {"name": "f", "arguments": "[1]"}})], r"calls f with arguments \[1\]"),
        ([assistant("a") | {"tool_calls": {"name": "f"}}], "tool_calls .* expected a list"),
        ([user("a" + GUARD)], r"U\+D800"),
        ([user("a\udc80")], r"U\+DC80"),
    ],
)
def test_bad_messages_are_one_sentence(messages: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        TEMPLATE.encode(BYTES, messages)


# ------------------------------------------------------------------------------- ids
def conversation(a: Any, b: str, c: str, d: str, e: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every place where text from outside can stand."""
    parts = [a, {"type": "text", "text": b}, c] if isinstance(a, str) else [""]
    returned = [{"output": d}, {"output": e}]
    messages = [system(a), user(parts), assistant(d, call(e, **arguments), think=c), tool(b), tool(returned)]
    return {"messages": messages, "tools": [{"name": a, "parameters": arguments}]}


def markup(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    control = {tokenizer.encode(token)[0] for token in ADDED_TOKENS}
    return [i for i in ids if i in control]


@settings(deadline=None, max_examples=200)
@given(
    st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT), st.dictionaries(TEXT, JSON, max_size=2), st.sampled_from([BYTES, MERGED])
)
def test_text_from_outside_never_becomes_markup(texts: Any, arguments: Any, tokenizer: Tokenizer) -> None:
    spoken = conversation(*texts, arguments)
    ids = TEMPLATE.encode(tokenizer, **spoken)
    blank = conversation("", "", "", "", "", {str(i): "" for i in range(len(arguments))})
    assert markup(tokenizer, ids) == markup(tokenizer, TEMPLATE.encode(tokenizer, **blank))
    text = TEMPLATE.render(normalise(spoken["messages"]), spoken["tools"])
    assert tokenizer.decode(ids, skip_special=False) == text


def test_a_token_spelled_across_two_parts_stays_text() -> None:
    ids = TEMPLATE.encode(BYTES, [user(["<|us", {"type": "text", "text": "er|>"}]), user("<|user|>")])
    assert ids == BYTES.encode(MAX + "<|user|>") + [*b"<|user|>"] + BYTES.encode("<|user|>") + [*b"<|user|>"]


def test_a_checkpoints_own_template_gives_markup_too() -> None:
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ '<think>' + m.content }}{% endfor %}")
    assert template.encode(BYTES, [user("</think>")]) == BYTES.encode("<|user|><think>") + [*b"</think>"]
