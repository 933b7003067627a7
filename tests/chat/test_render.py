"""The template in plain Python is the Jinja one, byte for byte and id for id."""

from __future__ import annotations

from typing import Any

import pytest
from chat_drawn import MESSAGE, OPTIONS, TEXT
from chat_examples import EXAMPLES, WEATHER, assistant, call, tool, user
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanoglm.chat import render
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from nanoglm.errors import InputError

TEMPLATE, BYTES = ChatTemplate(), byte_tokenizer()
MERGED = train_bpe(['the weather of the house, <tool> [call] über /think 🙂 {"name": "f"}\n Max '] * 20, 320)
OWN = {
    *("[gMASK]<sop>", "<|system|>", "<|user|>", "<|observation|>", "<|assistant|><think>", "</think>"),
    *("<|assistant|><think></think>", "<|system|>Reasoning Effort: High", "<|system|>Reasoning Effort: Max"),
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key><arg_value>", "</arg_value>", "<tool_response>"),
    *("</tool_response>", "<tool_response><tools>\n", "</tools></tool_response>"),
    *(render.TOOLS_BEGIN, render.TOOLS_END, render.IMAGE, ""),
    *(render.REMINDER.format("audio"), render.REMINDER.format("video")),
}
CONVERSATION = st.lists(MESSAGE, max_size=6)


# ------------------------------------------------------------------------------- text
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    messages, options, text = EXAMPLES[name]
    options = {"add_generation_prompt": True} | options
    assert render.render(messages, **options) == text
    for tokenizer in (BYTES, MERGED):
        assert render.encode(tokenizer, messages, **options) == TEMPLATE.encode(tokenizer, messages, **options)


@settings(deadline=None, max_examples=400)
@given(CONVERSATION, OPTIONS)
def test_the_same_text(messages: Any, options: dict[str, Any]) -> None:
    messages = [m | {"role": "bot"} if m["role"] == "developer" else m for m in messages]  # neither is printed
    assert render.render(messages, **options) == TEMPLATE.render(messages, **options)


@settings(deadline=None)
@given(st.one_of(st.integers(), st.booleans(), st.dictionaries(TEXT, TEXT)))
def test_content_of_no_known_form_is_printed_alike(content: Any) -> None:
    for message in (user(content), assistant(content), assistant([content, {"type": "text", "text": content}])):
        assert render.render([message]) == TEMPLATE.render([message])


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        ([assistant("", {"name": "f", "arguments": "{}"})], None, "tool call has arguments '{}'; expected an object"),
        ([assistant("", call("f", x={1, 2}))], None, "hold a value that is no JSON: .* set"),
        ([tool({"a": 1})], None, "tool message has content {'a': 1}; expected text or a list"),
        ([tool([{"output": 1}, "x"])], None, "has 'x' among outputs; expected an object with output"),
        ([user("q")], ["f"], "tools holds 'f'; expected an object"),
    ],
)
def test_what_cannot_be_printed_is_refused_by_both(messages: Any, tools: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        render.render(messages, tools)
    with pytest.raises(InputError):
        TEMPLATE.render(messages, tools)


# ------------------------------------------------------------------------------- ids
@settings(deadline=None, max_examples=400)
@given(CONVERSATION, OPTIONS, st.sampled_from([BYTES, MERGED]))
@example([assistant([{"type": "image"}, "<think>a</think> b "])], {}, BYTES)  # not taken out: not text alone
def test_the_same_ids(messages: Any, options: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert render.encode(tokenizer, messages, **options) == TEMPLATE.encode(tokenizer, messages, **options)


@settings(deadline=None)
@given(CONVERSATION, OPTIONS)
def test_markup_is_what_the_template_says_by_itself(messages: Any, options: dict[str, Any]) -> None:
    assert {text for text, is_markup in render.segments(messages, **options) if is_markup} <= OWN


def test_words_merge_across_the_borders_of_segments() -> None:
    """`\\n` of the tool block and `{"` of a tool; two parts of a message."""
    for messages, tools in (([user("q")], [WEATHER]), ([user(["th", "e wea", "ther"])], None)):
        ids = render.encode(MERGED, messages, tools)
        assert ids == MERGED.encode(render.render(messages, tools))
    assert len(render.encode(MERGED, [user(["th", "e"])])) == len(render.encode(MERGED, [user("the")]))


def test_bad_messages_are_one_sentence() -> None:
    with pytest.raises(InputError, match=r"messages\[0\] has role 'bot'"):
        render.encode(BYTES, [{"role": "bot"}])
    with pytest.raises(InputError, match=r"U\+D800"):
        render.encode(BYTES, [user("\ud800")])
