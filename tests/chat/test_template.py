"""The chat template: every example of serving spec 2.5 byte for byte; what comes from outside stays text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nanoglm.chat.template import GUARD, ChatTemplate, normalise
from nanoglm.chat.tokenizer import ADDED_TOKENS, Tokenizer, byte_tokenizer, train_bpe
from nanoglm.errors import CheckpointError, InputError

TEMPLATE, BYTES = ChatTemplate(), byte_tokenizer()
MERGED = train_bpe(["the weather of the house, <tool> [call] über /think 🙂 "] * 20, 320)

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER_JSON = (
    '{"name": "get_weather", "description": "Get weather", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string"}}, "required": ["city"]}}'
)
BLOCK = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + WEATHER_JSON
    + "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def assistant(content: Any, *calls: dict[str, Any], think: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return (
        message | ({} if think is None else {"reasoning_content": think}) | ({"tool_calls": [*calls]} if calls else {})
    )


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


SUMS = [user("1+1?"), assistant("2", think="Add."), user("2+2?")]
PARIS = call("get_weather", city="Paris")
THANKS = [
    user("Weather in Paris?"),
    assistant("Let me check.", PARIS, think="Need tool."),
    tool('{"t": 18}'),
    assistant("18C.", think="Done."),
    user("Thanks"),
]
MAX, ASK = "[gMASK]<sop><|system|>Reasoning Effort: Max", "<|assistant|><think>"
REMINDER = (
    "<reminder>You are unable to process this {} because you don't have multi-modal input ability. "
    "Try different methods.</reminder>"
)

# name: (messages, tools and switches, text); add_generation_prompt unless it says otherwise
EXAMPLES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "E1": (
        [system("You are a helpful assistant."), user("Hi")],
        {},
        f"{MAX}<|system|>You are a helpful assistant.<|user|>Hi{ASK}",
    ),
    "E2": (
        [user("Hi")],
        {"reasoning_effort": "high"},
        f"[gMASK]<sop><|system|>Reasoning Effort: High<|user|>Hi{ASK}",
    ),
    "E3": (
        [system("Sys"), user("Hi")],
        {"enable_thinking": False},
        f"[gMASK]<sop><|system|>Sys<|user|>Hi{ASK}</think>",
    ),
    "E3b": (
        [user("Hi")],
        {"enable_thinking": False, "reasoning_effort": "high"},
        f"[gMASK]<sop><|user|>Hi{ASK}</think>",
    ),
    "E4": (SUMS, {}, f"{MAX}<|user|>1+1?<|assistant|><think></think>2<|user|>2+2?{ASK}"),
    "E5": (SUMS, {"clear_thinking": False}, f"{MAX}<|user|>1+1?<|assistant|><think>Add.</think>2<|user|>2+2?{ASK}"),
    "E5c": (
        [SUMS[0], assistant("<think>Add.</think>\n2\n"), SUMS[2]],
        {"clear_thinking": False},
        f"{MAX}<|user|>1+1?<|assistant|><think>Add.</think>2<|user|>2+2?{ASK}",
    ),
    "E6": (
        [system("Sys"), user("Weather?")],
        {"tools": [{"type": "function", "function": WEATHER}]},
        f"{MAX}{BLOCK}<|system|>Sys<|user|>Weather?{ASK}",
    ),
    "E6b": (
        [user("Hi")],
        {
            "tools": [
                {"type": "function", "function": WEATHER},
                function(name="f", strict=True, parameters={}),
                function(name="g", defer_loading=True),
            ]
        },
        f"{MAX}{BLOCK}<|user|>Hi{ASK}".replace("\n</tools>", '\n{"name": "f", "parameters": {}}\n</tools>'),
    ),
    "E7": (
        [
            user("Weather in Paris?"),
            assistant(
                "Let me check.",
                call("get_weather", city="Paris", days=3, metric=True, opts={"a": [1, 2]}),
                think="Need tool.",
            ),
            tool('{"t": 18}'),
        ],
        {},
        f"{MAX}<|user|>Weather in Paris?<|assistant|><think>Need tool.</think>Let me check.<tool_call>get_weather"
        "<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key><arg_value>3</arg_value>"
        "<arg_key>metric</arg_key><arg_value>true</arg_value><arg_key>opts</arg_key>"
        '<arg_value>{"a": [1, 2]}</arg_value></tool_call>'
        f'<|observation|><tool_response>{{"t": 18}}</tool_response>{ASK}',
    ),
    "E7b": (
        [user("Weather?"), assistant("", call("get_weather", city="Tokyo"), PARIS), tool("22"), tool("18")],
        {},
        f"{MAX}<|user|>Weather?<|assistant|><think></think>"
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Tokyo</arg_value></tool_call>"
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        f"<|observation|><tool_response>22</tool_response><tool_response>18</tool_response>{ASK}",
    ),
    "E8": (
        THANKS,
        {},
        f"{MAX}<|user|>Weather in Paris?<|assistant|><think></think>Let me check."
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        '<|observation|><tool_response>{"t": 18}</tool_response>'
        f"<|assistant|><think></think>18C.<|user|>Thanks{ASK}",
    ),
    "E8b": (
        THANKS,
        {"clear_thinking": False},
        f"{MAX}<|user|>Weather in Paris?<|assistant|><think>Need tool.</think>Let me check."
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        '<|observation|><tool_response>{"t": 18}</tool_response>'
        f"<|assistant|><think>Done.</think>18C.<|user|>Thanks{ASK}",
    ),
    "E9": (
        [user("go"), assistant("", call("f", x="1"), think="R1"), tool("a"), assistant("", call("g")), tool("b")],
        {},
        f"{MAX}<|user|>go<|assistant|><think>R1</think><tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value>"
        "</tool_call><|observation|><tool_response>a</tool_response><|assistant|><think></think><tool_call>g</tool_call>"
        f"<|observation|><tool_response>b</tool_response>{ASK}",
    ),
    "E10": (
        [user("Hi"), assistant("Hello", think="r")],
        {"add_generation_prompt": False},
        f"{MAX}<|user|>Hi<|assistant|><think>r</think>Hello",
    ),
    "E11": (
        [user([{"type": "text", "text": "A"}, {"type": "image_url", "image_url": {}}, {"type": "input_audio"}])],
        {},
        f"{MAX}<|user|>A<|begin_of_image|><|image|><|end_of_image|>{REMINDER.format('audio')}{ASK}",
    ),
    "E12": (
        [
            user("find"),
            assistant("", call("search", q="w"), think=""),
            tool([{"type": "tool_reference", "name": "get_weather"}]),
        ],
        {"tools": [WEATHER]},
        f"{MAX}{BLOCK}<|user|>find<|assistant|><think></think>"
        "<tool_call>search<arg_key>q</arg_key><arg_value>w</arg_value></tool_call>"
        f"<|observation|><tool_response><tools>\n{WEATHER_JSON}\n</tools></tool_response>{ASK}",
    ),
    "E13": (
        [user("q"), assistant("", call("f")), tool([{"output": "o1"}, {"output": "o2"}])],
        {},
        f"{MAX}<|user|>q<|assistant|><think></think><tool_call>f</tool_call>"
        f"<|observation|><tool_response>o1</tool_response><tool_response>o2</tool_response>{ASK}",
    ),
    "E15": (
        [user("q"), assistant(None, call("f")), tool("r")],
        {},
        f"{MAX}<|user|>q<|assistant|><think></think>None<tool_call>f</tool_call>"
        f"<|observation|><tool_response>r</tool_response>{ASK}",
    ),
    "E18": (
        [user("q"), assistant("c"), system("note"), user("z")],
        {},
        f"{MAX}<|user|>q<|assistant|><think></think>c<|system|>note<|user|>z{ASK}",
    ),
    "E19": ([{"role": "developer", "content": "dev"}, user("z")], {}, f"{MAX}<|user|>z{ASK}"),
}
EXAMPLES |= {
    f"E2b-{effort}": ([user("Hi")], {"reasoning_effort": effort}, f"{MAX}<|user|>Hi{ASK}")
    for effort in ("low", None, "medium", "none", "max")
}
example = pytest.mark.parametrize("name", EXAMPLES)


# ------------------------------------------------------------------------------- text
@example
def test_example(name: str) -> None:
    messages, options, text = EXAMPLES[name]
    assert TEMPLATE.render(messages, **({"add_generation_prompt": True} | options)) == text


def test_transformers_renders_our_template_alike(tmp_path: Path) -> None:
    BYTES.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for name, (messages, options, text) in EXAMPLES.items():
        options = {"add_generation_prompt": True} | options
        if name == "E15":  # transformers takes nulls out of messages before it renders; Jinja alone prints them
            text = text.replace("None", "")
        assert text == theirs.apply_chat_template(messages, chat_template=TEMPLATE.source, tokenize=False, **options)


def test_one_observation_per_run_of_tools_and_values_keep_their_kind() -> None:
    messages = [user("q"), assistant("", call("f", a="é", b=None, c="1", d=["é"])), tool("x"), tool(["y", "z"])]
    messages += [assistant("c"), tool([{"output": {"k": "é"}}])]
    text = TEMPLATE.render(messages)
    assert text.count("<|observation|>") == 2
    values = [part.split("</arg_value>")[0] for part in text.split("<arg_value>")[1:]]
    assert values == ["é", "null", "1", '["é"]']
    assert "<tool_response>x</tool_response><tool_response>yz</tool_response>" in text
    assert text.endswith('<tool_response>{"k": "é"}</tool_response>')


def test_tools_are_printed_in_their_order_without_the_wrapper() -> None:
    deferred = {"type": "function", "defer_loading": True, "function": {"name": "g"}}
    nested = {"strict": 1, "defer_loading": 2}
    tools = [function(z="é</x>", name="f", description=None, strict=False, parameters=nested), deferred]
    line = '{"z": "é</x>", "name": "f", "description": null, "parameters": {"strict": 1, "defer_loading": 2}}'
    assert f"\n<tools>\n{line}\n</tools>\n" in TEMPLATE.render([user("q")], tools)
    for declared in (deferred, function(name="g", defer_loading=True), {"defer_loading": True, "name": "g"}):
        found = TEMPLATE.render([tool([{"type": "tool_reference", "name": "g"}])], [tools[0], declared])
        assert f"\n<tools>\n{line}\n</tools>\n" in found
        assert found.endswith('<tool_response><tools>\n{"name": "g"}\n</tools></tool_response>')
    assert TEMPLATE.render([user("q")], []) == TEMPLATE.render([user("q")])


def test_only_the_last_user_decides_what_is_cleared() -> None:
    """Messages may be equal: it is the place that counts."""
    messages = [user("a"), assistant("b", think="R"), user("a"), assistant("b", think="R")]
    assert TEMPLATE.render(messages).endswith(
        "<|user|>a<|assistant|><think></think>b<|user|>a<|assistant|><think>R</think>b"
    )
    assert TEMPLATE.render([assistant("b", think="R")]).endswith("<think>R</think>b")  # no user at all
    assert TEMPLATE.render(messages, clear_thinking=True) == TEMPLATE.render(messages)
    assert TEMPLATE.render(messages, enable_thinking=True) == TEMPLATE.render(messages)


def test_inline_reasoning_lies_between_the_last_opening_and_the_first_closing() -> None:
    text = TEMPLATE.render([assistant("x<think>y<think> R </think>z</think> c ")])
    assert text.endswith("<|assistant|><think> R </think>c")
    text = TEMPLATE.render([assistant(" a</think>b ", think="R")])  # reasoning is there: content stays whole
    assert text.endswith("<think>R</think>a</think>b")
    assert TEMPLATE.render([assistant("a</think>b", think="")]).endswith("<think></think>a</think>b")


def test_nulls_are_as_good_as_absent() -> None:
    messages = [assistant("a") | {"tool_calls": None}, assistant("", {"name": "f", "arguments": None})]
    text = TEMPLATE.render([*messages, tool([{"type": "tool_reference", "name": "g"}])])
    assert text.endswith(
        "<think></think>a<|assistant|><think></think><tool_call>f</tool_call>"
        "<|observation|><tool_response><tools>\n</tools></tool_response>"
    )


def test_other_media_and_parts() -> None:
    parts = ["a", {"type": "text", "text": "b"}, {"type": "video_url"}, {"type": "image"}, {"type": "x"}]
    images = "<|begin_of_image|><|image|><|end_of_image|>"
    assert TEMPLATE.render([system(parts)]) == f"{MAX}<|system|>ab{REMINDER.format('video')}{images}"


# ------------------------------------------------------------------------------- other templates
def test_a_checkpoints_own_template_is_run_as_transformers_runs_it(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{{ m.role }}: {{ m | tojson }} {{ kind }}\n{% endfor %}\n{{ messages | tojson(indent=1) }}"
    )
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    BYTES.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    template, messages = ChatTemplate.from_directory(tmp_path), [{"role": "user", "content": "<é'&>", "a": 1}]
    text = template.render(messages, kind="x")
    assert text.startswith('user: {"role": "user", "content": "<é\'&>", "a": 1} x\n')
    assert text == theirs.apply_chat_template(messages, chat_template=source, tokenize=False, kind="x")
    assert template.render([{"role": "skip"}]) == '[\n {\n  "role": "skip"\n }\n]'


def test_without_a_template_a_checkpoint_gets_glms(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path).source == TEMPLATE.source


def test_a_template_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="line 2 is no Jinja: Encountered unknown tag 'nonsense'"):
        ChatTemplate("\n{% nonsense %}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),  # a sandbox
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ],
)
def test_what_a_template_refuses_is_one_sentence(source: str, words: str) -> None:
    with pytest.raises(InputError, match=f"cannot be rendered by the chat template: .*({words})"):
        ChatTemplate(source).render([user("q")])


def test_arguments_as_text_fail_until_they_are_normalised() -> None:
    messages = [assistant("", {"function": {"name": "f", "arguments": '{"x": 1}'}})]
    with pytest.raises(InputError, match="'str object' has no attribute 'items'"):
        TEMPLATE.render(messages)
    assert TEMPLATE.render(normalise(messages)).endswith("f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>")


# ------------------------------------------------------------------------------- messages
def test_normalise_mends_what_clients_send() -> None:
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": None},
        {"role": "assistant", "reasoning": "r", "tool_calls": None},
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


@example
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
