"""A conversation in the terminal: what is remembered, what is shown, which effort is asked for."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from server.scripted import Script, scripted_engine, scripted_model

from nanoglm.engine import SamplingParams
from nanoglm.errors import InputError
from nanoglm.terminal import Session, talk

REPLIES = {
    "Max<|user|>Hi": "They greet.</think>Hello!",
    "High<|user|>Hi": "Greet.</think>Hello.",
    "<sop><|user|>Hi": "Hello",
    "And you?": "Polite.</think>Fine.",
}


def session(effort: str = "max", drafts: int = 0, **options: object) -> Session:
    model = scripted_model()
    params = SamplingParams(100)
    return Session(model, scripted_engine(model, Script(REPLIES), drafts), params, effort, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("drafts", [0, 3])
def test_thought_and_content_come_apart_and_are_remembered(drafts: int) -> None:
    talking = session(drafts=drafts)
    answer = talking.say("Hi")
    kinds = [delta.kind for delta in answer]
    assert kinds == sorted(kinds, reverse=True)  # reasoning before content
    assert (answer.thought, answer.content, answer.thoughts) == ("They greet.", "Hello!", len("They greet."))
    assert list(talking.say("And you?")) and talking.messages[-1]["content"] == "Fine."
    assert [m["role"] for m in talking.messages] == ["user", "assistant"] * 2
    assert talking.engine.busy is False and "tokens/s" in answer.figures
    assert ("a step" in answer.figures) == (drafts > 0)


@pytest.mark.parametrize(("effort", "content"), [("max", "Hello!"), ("high", "Hello."), ("off", "Hello")])
def test_effort_reaches_the_prompt(effort: str, content: str) -> None:
    talking = session(effort)
    assert list(talking.say("Hi")) and talking.messages[-1]["content"] == content


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_budget_ends_thought(budget: int, drafts: int) -> None:
    answer = session(drafts=drafts, budget=budget).say("Hi")
    list(answer)
    assert answer.thoughts == budget and answer.thought == "They greet."[:budget]


def test_leaving_an_answer_ends_it_and_keeps_what_came() -> None:
    talking = session()
    for delta in talking.say("Hi"):
        if delta.kind == "content":
            break
    assert not talking.engine.busy and talking.messages[-1]["content"] == "H"


def test_no_room_is_one_sentence_and_nothing_is_remembered() -> None:
    talking = session()
    with pytest.raises(InputError, match="expected fewer than the context"):
        talking.say("x" * 9000)
    assert talking.messages == []


def test_lines_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Hi\n/thought\n/effort high\n/new\nHi\n/nonsense\n/quit\nHi\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, talking = io.StringIO(), session()
    talk(talking, Console(file=out, highlight=False, soft_wrap=True))
    said = out.getvalue()
    assert "thought for 11 tokens" in said and "They greet." in said and "/effort off|high|max" in said
    assert said.count("Hello!") == 1 and said.count("Hello.\n") == 1
    assert [message["content"] for message in talking.messages] == ["Hi", "Hello."]
