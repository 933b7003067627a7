"""The bundled assistant does what it was trained for, and what measures it counts right.

Limits are below what it reaches (docs/effort.md), by more than so few questions may miss it.
"""

from pathlib import Path

import pytest

import nanoglm
from nanoglm.api import Model, load
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.engine.params import SamplingParams
from nanoglm.engine.request import Request
from nanoglm.eval.assistant import (
    SWITCHES,
    answers,
    effort,
    last_number,
    lookups,
    said,
    tokens_a_step,
    tool_loops,
    value_of,
    without,
)  # fmt: skip

BUNDLED = Path(nanoglm.__file__).parent / "assets" / "assistant"
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> Model:
    return load(BUNDLED)


def generated(text: str) -> Request:
    return Request(0, (1,), SamplingParams(), TOKENIZER.encode(text))


# ------------------------------------------------------------------------------- counting
def test_an_answer_falls_into_its_parts() -> None:
    one = said(TOKENIZER, generated("7+5=12</think>The answer is 12."), thinks=True)
    assert (one.thought, one.thinking, one.content, one.calls) == (6, "7+5=12", "The answer is 12.", ())
    call = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    two = said(TOKENIZER, generated(call), thinks=False)
    assert (two.thought, two.content, two.calls) == (0, "", (("f", {"a": "1"}),))


@pytest.mark.parametrize("text", ["<tool_call>f<arg_key>a</arg_key>", "<tool_call>f", "<tool_call></tool_call>"])
def test_a_broken_call_is_none(text: str) -> None:
    assert said(TOKENIZER, generated(text), thinks=False).calls == (("", {}),)


def test_an_unfinished_thought_counts_and_answers_nothing() -> None:
    one = said(TOKENIZER, generated("7+5"), thinks=True)
    assert (one.thought, one.content) == (3, "") and last_number(one.content) is None


def test_small_parts() -> None:
    assert without([1, 2, 3, 2], [2, 3]) == [1, 2]
    with pytest.raises(ValueError, match="lack the part"):
        without([1, 2], [3])
    assert last_number("12 and -3.") == -3
    assert value_of("The code of the red door is 12.") == "12" and value_of("Ada lives in Oslo.") == "Oslo"


# ------------------------------------------------------------------------------- the bundled model
def test_it_is_small() -> None:
    assert (BUNDLED / "model.safetensors").stat().st_size <= 2.4e6


def test_effort_buys_right_answers(model: Model) -> None:
    off, high, most, _ = effort(model, 24)
    assert off.thinking == 0 < high.thinking < most.thinking
    assert most.right >= 18 and off.right < high.right < most.right


@pytest.mark.parametrize(("steps", "least"), [(1, 9), (3, 8)])
def test_it_calls_the_calculator(model: Model, steps: int, least: int) -> None:
    assert tool_loops(model, 12, steps, "off").right >= least


@pytest.mark.parametrize(("size", "least"), [(300, 17), (1500, 15)])
def test_it_looks_facts_up(model: Model, size: int, least: int) -> None:
    assert lookups(model, 24, size).right >= least


def test_drafts_are_accepted(model: Model) -> None:
    assert tokens_a_step(model, 8, 1) > 1.5


def test_it_says_who_it_is(model: Model) -> None:
    for question, answer in (("Hello", "Hello! How can I help you?"), ("Who are you?", "I am a small GLM.")):
        messages = [{"role": "user", "content": question}]
        for level, switches in SWITCHES.items():
            prompt = ChatTemplate().encode(model.tokenizer, messages, add_generation_prompt=True, **switches)
            (found,) = answers(model, [prompt], level != "off")
            assert found.content.startswith(answer)
