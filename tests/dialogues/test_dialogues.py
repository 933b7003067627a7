"""Generated conversations: what they state is true."""

import re

import numpy as np
import pytest

from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.dialogues import LEVELS, Problem, calculated, conversation, lookup, problem, tool
from nanoglm.dialogues.arithmetic import LARGEST, columns
from nanoglm.train.sft import samples

TOKENIZER = byte_tokenizer()


def drawn(seed: int, count: int, **options: object) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [problem(rng, **options) for _ in range(count)]


def test_answers_are_what_python_calculates() -> None:
    for found in drawn(0, 500):
        assert eval(found.expression) == found.answer
        assert all(0 <= result <= LARGEST for *_, result in found.steps)


def test_every_thought_is_right() -> None:
    for found in drawn(1, 500):
        for level in ("high", "max"):
            equations = re.findall(r"(\d+(?:[-+*]\d+)+)=(\d+)", found.thinking(level))
            assert equations and all(eval(left) == int(right) for left, right in equations)
            assert found.thinking(level).endswith(f"={found.answer}")


@pytest.mark.parametrize(
    ("a", "sign", "b", "way"),
    [
        (47, "+", 28, "7+8=15 4+2+1=7"), (97, "+", 8, "7+8=15 9+0+1=10"), (103, "-", 45, "13-5=8 10-4-1=5 1-0-1=0"),
        (17, "*", 6, "7*6=42 1*6+4=10"), (6, "*", 17, "7*6=42 1*6+4=10"), (5, "-", 5, "5-5=0"),
    ],
)  # fmt: skip
def test_columns_carry_and_borrow(a: int, sign: str, b: int, way: str) -> None:
    assert columns(a, sign, b) == way


def test_more_effort_is_more_thinking() -> None:
    for found in drawn(2, 200):
        assert len(found.thinking("off")) == 0 < len(found.thinking("high")) < len(found.thinking("max"))


def test_training_never_draws_a_problem_that_is_held_out() -> None:
    held = {found.expression for found in drawn(3, 100, terms=2, held_out=True)}
    assert not held & {found.expression for found in drawn(4, 2000, terms=2)}
    assert held & {found.expression for found in drawn(5, 2000, terms=2, held_out=True)}


def test_conversations_stay_within_2048_tokens() -> None:
    rng = np.random.default_rng(6)
    lengths = [len(d.ids) for _ in range(150) for d in samples(conversation(rng), TOKENIZER)]
    assert np.mean(np.array(lengths) <= 2049) > 0.97 and max(lengths) > 1500


def test_calls_lead_to_the_answer_each_using_the_one_before() -> None:
    rng = np.random.default_rng(7)
    offered = [tool("get_time", rng), tool("calculator", rng)]
    for steps in (1, 2, 3):
        messages = calculated(rng, "high", offered, steps)
        calls = [m["tool_calls"][0]["function"] for m in messages if m.get("tool_calls")]
        results = [re.findall(r"-?\d+", m["content"])[-1] for m in messages if m["role"] == "tool"]
        assert [call["name"] for call in calls] == ["calculator"] * steps and len(results) == steps
        assert [str(eval(call["arguments"]["expression"])) for call in calls] == results
        assert all(call["arguments"]["expression"].startswith(r) for call, r in zip(calls[1:], results, strict=False))
        assert messages[-1]["content"] == f"The answer is {results[-1]}."


def test_texts_hold_what_is_asked_for() -> None:
    rng = np.random.default_rng(8)
    for size in (200, 1900):
        for level in LEVELS:
            messages = lookup(rng, level, size, 2)
            text = messages[0]["content"]
            stated = [m["content"] for m in messages if m["role"] == "assistant"]
            assert all(text.count(sentence) == 1 for sentence in stated)
            assert size - 60 < len(text) < size + 250
