"""What the assistant can do, measured on conversations that its training never drew: problems at each thinking effort,
loops of tool calls, lookups in long texts. Everything goes through template and engine, as when it is served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nanoglm.api import Model
from nanoglm.cache import PAGE
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.dialogues import LEVELS, Level, arithmetic, calculated, conversation, lookup, problem, tool
from nanoglm.engine import Engine, SamplingParams
from nanoglm.engine.request import Request
from nanoglm.eval.longcontext import wilson

SEED = 1 << 40  # of what is asked here; training draws from (seed, number of its sample)
EFFORT_LINE = "<|system|>Reasoning Effort: Max"
MOST_TOKENS = 400  # of an answer with its thinking
SWITCHES: dict[Level, dict[str, Any]] = {
    "off": {"enable_thinking": False},
    "high": {"enable_thinking": True, "reasoning_effort": "high"},
    "max": {"enable_thinking": True, "reasoning_effort": "max"},
}


@dataclass(frozen=True)
class Said:
    """An answer in its parts. thought: tokens between <think> and </think>, those of an unfinished thought too."""

    thought: int
    thinking: str
    content: str
    calls: tuple[tuple[str, dict[str, str]], ...]
    request: Request


def answers(
    model: Model, prompts: Sequence[Sequence[int]], thinks: bool, temperature: float = 0.0, top_p: float = 1.0,
    drafts: int = 0,
) -> list[Said]:  # fmt: skip
    """Continues all prompts together.

    Args:
        thinks: whether the prompts end with an open <think>.
    """
    if not prompts:
        return []
    pages = sum(-(-(len(prompt) + MOST_TOKENS + 8) // PAGE) for prompt in prompts)
    engine = Engine(model.module, pages=min(pages, 2048), drafts=drafts)
    ends = model.config.eos_token_id
    requests = [
        engine.add(prompt, SamplingParams(MOST_TOKENS, temperature, top_p=top_p, seed=i, stop_ids=ends))
        for i, prompt in enumerate(prompts)
    ]
    while engine.busy:
        engine.step()
    return [said(model.tokenizer, request, thinks) for request in requests]


def said(tokenizer: Tokenizer, request: Request, thinks: bool) -> Said:
    """The parts of what a request generated."""
    (close,) = tokenizer.encode("</think>")
    ids = request.outputs
    thought = (ids.index(close) if close in ids else len(ids)) if thinks else 0
    text = tokenizer.decode(ids[thought + 1 :] if thinks else ids)
    content, *parts = text.split("<tool_call>")
    return Said(thought, tokenizer.decode(ids[:thought]), content.strip(), tuple(map(_call, parts)), request)


def _call(text: str) -> tuple[str, dict[str, str]]:
    """The name and arguments of a call; ("", {}) if it is none."""
    if not re.fullmatch(r"\w+(<arg_key>[^<]*</arg_key><arg_value>[^<]*</arg_value>)*</tool_call>\s*", text):
        return "", {}
    return text.split("<")[0], dict(re.findall("<arg_key>([^<]*)</arg_key><arg_value>([^<]*)</arg_value>", text))


# ------------------------------------------------------------------------------- effort
@dataclass(frozen=True)
class EffortRow:
    """One arm. thinking: mean tokens with its standard error; right of asked, with Wilson's 95 % interval."""

    arm: str
    temperature: float
    thinking: float
    error: float
    right: int
    asked: int
    low: float
    high: float


def effort(model: Model, problems: int, temperature: float = 0.0, top_p: float = 1.0) -> list[EffortRow]:
    """Held-out problems at each level, and at none: the prompt of Max with the effort line cut out of its ids."""
    template, line = ChatTemplate(), model.tokenizer.encode(EFFORT_LINE)
    rng = np.random.default_rng(SEED)
    asked = [problem(rng, held_out=True) for _ in range(problems)]
    questions = [arithmetic(rng, "off", given)[0] for given in asked]
    rows = []
    for arm in [*LEVELS, "no line"]:
        switches = SWITCHES[arm if arm in SWITCHES else "max"]
        prompts = [
            template.encode(model.tokenizer, [question], add_generation_prompt=True, **switches)
            for question in questions
        ]
        if arm not in SWITCHES:
            prompts = [without(prompt, line) for prompt in prompts]
        found = answers(model, prompts, arm != "off", temperature, top_p)
        thought = np.array([each.thought for each in found])
        right = sum(last_number(each.content) == given.answer for each, given in zip(found, asked, strict=True))
        low, high = wilson(right, problems)
        error = float(thought.std(ddof=1)) / problems**0.5
        rows.append(EffortRow(arm, temperature, float(thought.mean()), error, right, problems, low, high))
    return rows


def without(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """``ids`` less the run ``part`` where it first stands. Raises ValueError if it stands nowhere."""
    for at in range(len(ids)):
        if list(ids[at : at + len(part)]) == list(part):
            return [*ids[:at], *ids[at + len(part) :]]
    raise ValueError("ids lack the part; expected them to hold it")


def last_number(text: str) -> int | None:
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


# ------------------------------------------------------------------------------- tools
@dataclass(frozen=True)
class Counted:
    """How many of how many succeeded."""

    name: str
    right: int
    asked: int
    low: float
    high: float

    @classmethod
    def of(cls, name: str, right: int, asked: int) -> Counted:
        return cls(name, right, asked, *wilson(right, asked))


def tool_loops(model: Model, loops: int, steps: int, level: Level) -> Counted:
    """Tasks of so many dependent calls, played to the end: what the model calls is calculated and given back to it.
    Right are those in which every call was the expected one and the answer is the result."""
    template, rng = ChatTemplate(), np.random.default_rng((SEED, steps))
    tasks = []
    for _ in range(loops):
        others = [name for name in ("get_weather", "get_time") if rng.random() < 0.5]
        offered = [tool(str(name), rng) for name in rng.permutation(["calculator", *others])]
        tasks.append((offered, calculated(rng, level, offered, steps)))
    spoken = [[messages[0]] for _, messages in tasks]
    going = list(range(loops))
    for turn in range(steps + 1):
        prompts = [
            template.encode(model.tokenizer, spoken[i], tasks[i][0], add_generation_prompt=True, **SWITCHES[level])
            for i in going
        ]
        kept = []
        for i, each in zip(going, answers(model, prompts, level != "off"), strict=True):
            expected = tasks[i][1][1 + 2 * turn]
            if turn == steps:
                if each.content == expected["content"] and not each.calls:
                    kept.append(i)
                continue
            wanted = expected["tool_calls"][0]["function"]
            if each.calls == ((wanted["name"], wanted["arguments"]),):
                spoken[i] += [expected | {"reasoning_content": each.thinking}, tasks[i][1][2 + 2 * turn]]
                kept.append(i)
        going = kept
    return Counted.of(f"{steps} calls, {level}", len(going), loops)


# ------------------------------------------------------------------------------- lookups
def lookups(model: Model, texts: int, size: int, level: Level = "off") -> Counted:
    """One question for one fact in each text of about ``size`` bytes. Right are answers with the fact's last word."""
    template, rng = ChatTemplate(), np.random.default_rng((SEED, size))
    asked = [lookup(rng, level, size, 1) for _ in range(texts)]
    prompts = [
        template.encode(model.tokenizer, messages[:-1], add_generation_prompt=True, **SWITCHES[level])
        for messages in asked
    ]
    found = answers(model, prompts, level != "off")
    right = sum(
        value_of(each.content) == value_of(messages[-1]["content"]) for each, messages in zip(found, asked, strict=True)
    )
    return Counted.of(f"{size} bytes, {level}", right, texts)


def value_of(sentence: str) -> str:
    """What a fact's sentence says of its name: all behind the last " is " or " in "."""
    return re.split(" is | in ", sentence)[-1].rstrip(".")


# ------------------------------------------------------------------------------- drafts
def tokens_a_step(model: Model, conversations: int, drafts: int) -> float:
    """Tokens that a verification of so many drafts yields, greedy, over answers to conversations of every kind."""
    template, rng, prompts = ChatTemplate(), np.random.default_rng((SEED, drafts)), []
    for _ in range(conversations):
        drawn = conversation(rng, 2048)
        switches = {name: drawn[name] for name in ("enable_thinking", "reasoning_effort") if name in drawn}
        last = max(i for i, message in enumerate(drawn["messages"]) if message["role"] == "user")
        messages = drawn["messages"][: last + 1]
        prompts.append(
            template.encode(model.tokenizer, messages, drawn.get("tools"), add_generation_prompt=True, **switches)
        )
    requests = [each.request for each in answers(model, prompts, True, drafts=drafts)]
    chains = sum(request.drafted[0] for request in requests if request.drafted)
    return 1 + sum(sum(request.accepted) for request in requests) / chains


def report(model: Model, problems: int = 500, others: int = 200) -> dict[str, Any]:
    """All of the above, as plain values."""
    served = {"temperature": 1.0, "top_p": 0.95}  # GLM-5.2's generation_config
    return {
        "effort": [asdict(row) for row in effort(model, problems) + effort(model, problems, **served)],
        "tools": [asdict(tool_loops(model, others, steps, level)) for level in ("off", "max") for steps in (1, 3)],
        "lookups": [asdict(lookups(model, others, size)) for size in (200, 500, 1000, 1800)],
        "tokens a step": {drafts: tokens_a_step(model, others, drafts) for drafts in (1, 3)},
    }
