"""What hypothesis draws of conversations: text that spells markup, and everything that a client may send."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from nanoglm.chat.tokenizer import ADDED_TOKENS

PIECES = [
    *ADDED_TOKENS,
    "<",
    "|>",
    "<|",
    "<|us",
    "er|>",
    "[",
    "[gMASK",
    "]",
    "/",
    "</thi",
    "nk>",
    "é",
    "🙂",
    " ",
    "the",
]
TEXT = st.lists(st.one_of(st.text(max_size=5), st.sampled_from(PIECES)), max_size=8).map("".join)
JSON = st.recursive(
    st.one_of(TEXT, st.integers(), st.none()), lambda v: st.lists(v) | st.dictionaries(TEXT, v), max_leaves=4
)
THOUGHT = st.lists(
    st.sampled_from(["<think>", "</think>", "a", " b ", "\n", "\u2003", "<|user|>", "</thi"]), max_size=6
).map("".join)
NAMES = st.sampled_from(["f", "g", "<think>", "h é"])
KINDS = ["image", "image_url", "audio", "audio_url", "input_audio", "video", "video_url", "input_video", "x", "<sop>"]


def objects(always: dict[str, Any], sometimes: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with these fields, in any order: the order shows in a tool's JSON."""
    fields = st.fixed_dictionaries(always, optional=sometimes)
    return fields.flatmap(lambda found: st.permutations(list(found.items())).map(dict))


PART = st.one_of(
    TEXT,
    THOUGHT,
    objects({"type": st.just("text")}, {"text": TEXT | THOUGHT}),
    st.sampled_from(KINDS).map(lambda kind: {"type": kind, "text": "unseen"}),
)
CONTENT = st.one_of(TEXT, THOUGHT, st.none(), st.lists(PART, max_size=4))
ARGUMENTS = st.none() | st.dictionaries(TEXT, JSON | st.booleans() | st.floats(), max_size=3)
CALL = objects({"name": NAMES}, {"arguments": ARGUMENTS})
FUNCTION = objects(
    {"name": NAMES},
    {
        "description": TEXT | st.none(),
        "parameters": JSON,
        "strict": st.booleans(),
        "defer_loading": st.booleans(),
        "extra": JSON,
    },
)
TOOL = FUNCTION | objects(
    {"function": FUNCTION}, {"type": st.just("function"), "defer_loading": st.booleans(), "strict": st.booleans()}
)
TOOLS = st.none() | st.lists(TOOL, max_size=3)
REFERENCE = objects({"type": st.just("tool_reference")}, {"name": NAMES})
RESULT = st.one_of(
    CONTENT,
    st.lists(objects({"output": JSON}, {"type": st.just("text")}), max_size=3),
    st.builds(lambda first, rest: [first, *rest], REFERENCE, st.lists(REFERENCE | PART, max_size=3)),
)
CALLS = st.none() | st.lists(CALL | objects({"function": CALL}, {"type": st.just("function")}), max_size=3)
MESSAGE = st.one_of(
    objects({"role": st.sampled_from(["system", "user", "user", "developer"])}, {"content": CONTENT}),
    objects({"role": st.just("tool")}, {"content": RESULT, "tool_call_id": TEXT}),
    objects(
        {"role": st.just("assistant")},
        {"content": CONTENT, "reasoning_content": TEXT | THOUGHT | st.none(), "tool_calls": CALLS},
    ),
)
VALUES = st.sampled_from([None, True, False, "high", "max", "low", "false", "", 0])
SWITCHES = st.fixed_dictionaries(
    {}, optional={n: VALUES for n in ("enable_thinking", "reasoning_effort", "clear_thinking", "other")}
)
OPTIONS = st.builds(
    lambda switches, tools, begin: switches | {"tools": tools, "add_generation_prompt": begin},
    SWITCHES,
    TOOLS,
    st.booleans(),
)
