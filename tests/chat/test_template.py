"""The chat template as text: every example of serving spec 2.5 byte for byte, and any other template in the sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_examples import EXAMPLES, MAX, REMINDER, assistant, call, function, system, tool, user
from transformers import PreTrainedTokenizerFast

from nanoglm.chat.template import ChatTemplate, normalise
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.errors import CheckpointError, InputError

TEMPLATE, BYTES = ChatTemplate(), byte_tokenizer()


# ------------------------------------------------------------------------------- text
@pytest.mark.parametrize("name", EXAMPLES)
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
