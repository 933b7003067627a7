"""Conversations for a small assistant, drawn without end: arithmetic with thinking effort, tool calls, lookups in long
texts, small talk.

How much is thought follows the effort. Off: the answer at once. High: one running total a step. Max: every step digit
by digit, with carries, which a model of some layers can do surely where it guesses a total. Nothing else tells the
levels apart, so what effort buys is what was learnt.

A conversation is a dict as ``sft.samples`` reads it, so training sees the ids that serving sees (serving spec 2).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch

from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.train.data import Sample
from nanoglm.train.sft import Document, samples
from nanoglm.train.words import (
    ABILITIES,
    ADJECTIVES,
    CITIES,
    FACTS,
    MONTHS,
    NAMES,
    NO_TOOL,
    NOUNS,
    SYLLABLES,
    SYSTEM,
    TALK,
    TOOLS,
    UNKNOWN,
    filler,
)  # fmt: skip

Level = Literal["off", "high", "max"]
Kind = Literal["arithmetic", "tools", "lookup", "talk"]
Messages = list[dict[str, Any]]
LEVELS: tuple[Level, ...] = ("off", "high", "max")
LARGEST = 1999  # of a running total that is thought
SIGNS = {"+": "plus", "-": "minus", "*": "times"}


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def reply(level: Level, content: str, high: str, most: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The assistant's message, with the thinking of this level."""
    thinking = {"off": {}, "high": {"reasoning_content": high}, "max": {"reasoning_content": most}}[level]
    return {"role": "assistant", "content": content, **thinking} | ({"tool_calls": list(calls)} if calls else {})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# ------------------------------------------------------------------------------- arithmetic
@dataclass(frozen=True)
class Problem:
    """``numbers`` with ``signs`` between them, products first."""

    numbers: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def expression(self) -> str:
        return "".join(f"{n}{sign}" for n, sign in zip(self.numbers, [*self.signs, ""], strict=True))

    @property
    def steps(self) -> list[tuple[int, str, int, int]]:
        """Each operation with its result: products, then from the left."""
        numbers, signs, found = list(self.numbers), list(self.signs), []
        while signs:
            i = signs.index("*") if "*" in signs else 0
            a, sign, b = numbers[i], signs.pop(i), numbers.pop(i + 1)
            numbers[i] = a + b if sign == "+" else a - b if sign == "-" else a * b
            found.append((a, sign, b, numbers[i]))
        return found

    @property
    def answer(self) -> int:
        return self.steps[-1][3]

    def thinking(self, level: Level) -> str:
        """What is thought: nothing, the steps, or the steps with their columns."""
        if level == "off":
            return ""
        if level == "high":
            return "\n".join(f"{a}{sign}{b}={result}" for a, sign, b, result in self.steps)
        lines = [f"{a}{sign}{b}: {columns(a, sign, b)} ={result}" for a, sign, b, result in self.steps]
        return "\n".join([self.expression, *lines])


def columns(a: int, sign: str, b: int) -> str:
    """The written way, from the ones on: ``7+8=15 4+2+1=7``. A carry is the last term, a borrow is in the first."""
    if sign == "*":
        a, b = (b, a) if a < 10 <= b else (a, b)
    first, second = str(a)[::-1], str(b)[::-1]
    found, carry = [], 0
    for i in range(max(len(first), len(second)) if sign != "*" else len(first)):
        x, y = int(first[i : i + 1] or 0), int((second if sign == "*" else second[i : i + 1]) or 0)
        tail = "" if not carry else f"{'-' if sign == '-' else '+'}{carry}"
        if sign == "-":
            x += 10 * (x - y - carry < 0)
            value, carry = x - y - carry, int(x > 9)
        else:
            value = (x * y if sign == "*" else x + y) + carry
            carry = value // 10
        found.append(f"{x}{sign}{y}{tail}={value}")
    return " ".join(found)


def problem(rng: np.random.Generator, terms: int | None = None, held_out: bool = False) -> Problem:
    """Two to five terms of one to three digits; no total is negative or above ``LARGEST``.

    Args:
        held_out: one of the sixteenth, by a checksum of the expression, that training never draws.
    """
    while True:
        count = terms or int(rng.choice([2, 3, 4, 5], p=[0.35, 0.3, 0.2, 0.15]))
        numbers = [_number(rng, int(rng.choice([1, 2, 3], p=[0.2, 0.6, 0.2]))) for _ in range(count)]
        signs = [str(sign) for sign in rng.choice(["+", "-"], count - 1, p=[0.55, 0.45])]
        if rng.random() < 0.25:
            i = int(rng.integers(count - 1))
            signs[i], factors = "*", [int(rng.integers(2, 20)), int(rng.integers(2, 10))]
            numbers[i], numbers[i + 1] = factors if rng.random() < 0.5 else factors[::-1]
        found = Problem(tuple(numbers), tuple(signs))
        kept = crc32(found.expression.encode()) % 16 == 0
        if kept == held_out and all(0 <= result <= LARGEST for *_, result in found.steps):
            return found


def _number(rng: np.random.Generator, digits: int) -> int:
    return int(rng.integers(10 ** (digits - 1), 10**digits))


def spoken(expression: Problem, rng: np.random.Generator) -> str:
    """The expression as a user may write it."""
    space = pick(rng, ["", " ", " "])
    signs = {sign: f"{space}{sign}{space}" for sign in SIGNS}
    if rng.random() < 0.2:
        signs["*"] = f"{space}x{space}"
    if rng.random() < 0.3:
        signs = {sign: f" {word} " for sign, word in SIGNS.items()}
    ends = [signs[sign] for sign in expression.signs] + [""]
    return "".join(f"{n}{end}" for n, end in zip(expression.numbers, ends, strict=True))


def arithmetic(rng: np.random.Generator, level: Level, given: Problem | None = None) -> Messages:
    """A question and its answer."""
    found = given or problem(rng)
    forms = ["What is {}?", "what is {}", "{}", "{} = ?", "Calculate {}.", "Compute {}", "How much is {}?", "{}?"]
    text = pick(rng, forms).format(spoken(found, rng))
    thinking = {name: found.thinking(name) for name in LEVELS}
    return [user(text), reply(level, f"The answer is {found.answer}.", thinking["high"], thinking["max"])]


# ------------------------------------------------------------------------------- tools
def tool(name: str, rng: np.random.Generator) -> dict[str, Any]:
    """A declaration as requests carry it."""
    names, descriptions, hints = TOOLS[name]
    parameter: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.4:
        parameter["description"] = pick(rng, hints)
    key = pick(rng, names)
    schema: dict[str, Any] = {"type": "object", "properties": {key: parameter}, "required": [key]}
    if rng.random() < 0.2:
        schema = {"type": "object", "required": [key], "properties": {key: parameter}}
    function = {"name": name, "description": pick(rng, descriptions), "parameters": schema}
    return {"type": "function", "function": function}


def call(offered: Sequence[dict[str, Any]], name: str, value: str) -> dict[str, Any]:
    """A call of the offered tool of that name."""
    function = next(each["function"] for each in offered if each["function"]["name"] == name)
    (key,) = function["parameters"]["properties"]
    return {"type": "function", "function": {"name": name, "arguments": {key: value}}}


def chain(rng: np.random.Generator, steps: int) -> tuple[str, list[str], list[int]]:
    """A task of dependent steps: its text, each step's expression and each result."""
    while True:
        a, b = (_number(rng, int(rng.integers(2, 5))) for _ in range(2))
        sign = pick(rng, ["+", "-", "*"])
        opening = pick(rng, ["Compute {}", "Calculate {}", "First compute {}"]).format(
            f" {sign} ".join([str(a), str(b)]) if rng.random() < 0.7 else f"{a}{sign}{b}"
        )
        expressions, texts = [f"{a}{sign}{b}"], [opening]
        results = [Problem((a, b), (sign,)).answer]
        for _ in range(steps - 1):
            sign = pick(rng, ["+", "-", "*"])
            n = _number(rng, int(rng.integers(1, 4)))
            texts.append({"+": f"add {n}", "-": f"subtract {n}", "*": f"multiply by {n}"}[sign])
            expressions.append(f"{results[-1]}{sign}{n}")
            results.append(Problem((results[-1], n), (sign,)).answer)
        if all(0 <= result < 10**9 for result in results):
            return ", then ".join(texts) + ".", expressions, results


def calculated(rng: np.random.Generator, level: Level, offered: Sequence[dict[str, Any]], steps: int) -> Messages:
    """A calculation by calls, each of which waits for the one before."""
    if steps == 1:
        count = int(rng.choice([2, 3], p=[0.7, 0.3]))
        numbers = tuple(_number(rng, int(rng.integers(2, 7))) for _ in range(count))
        one = Problem(numbers, tuple(str(sign) for sign in rng.choice(["+", "-", "*"], count - 1)))
        text = pick(rng, ["What is {}?", "what is {}", "Calculate {}.", "Compute {}", "How much is {}?", "{}"])
        text, expressions, results = text.format(spoken(one, rng)), [one.expression], [one.answer]
    else:
        text, expressions, results = chain(rng, steps)
    found, as_json = [user(text)], rng.random() < 0.3
    for i, (expression, result) in enumerate(zip(expressions, results, strict=True)):
        step = [call(offered, "calculator", expression)]
        found.append(reply(level, "", "I call it." if i else "I call calculator.", f"I calculate {expression}.", step))
        found.append({"role": "tool", "content": json.dumps({"result": result}) if as_json else str(result)})
    found.append(reply(level, f"The answer is {results[-1]}.", "Done.", f"It is {results[-1]}. Done."))
    return found


def asked(rng: np.random.Generator, level: Level, offered: Sequence[dict[str, Any]]) -> Messages:
    """A question for weather or time, answered by the tool if it is there."""
    name, city = pick(rng, ["get_weather", "get_time"]), place(rng)
    if name == "get_weather":
        text = pick(rng, ["What is the weather in {}?", "How is the weather in {}?", "weather in {}"]).format(city)
        state = pick(rng, ["sunny", "rainy", "cloudy", "windy", "snowy", "foggy"])
        result = f"{state}, {int(rng.integers(-9, 40))} degrees"
        answer = f"The weather in {city}: {result}."
    else:
        text = pick(rng, ["What time is it in {}?", "What is the time in {}?", "time in {}"]).format(city)
        result = f"{int(rng.integers(24)):02}:{int(rng.integers(60)):02}"
        answer = f"The time in {city}: {result}."
    if name not in [each["function"]["name"] for each in offered]:
        return [user(text), reply(level, NO_TOOL, "No tool.", "I have no tool for this.")]
    return [
        user(text), reply(level, "", f"I call {name}.", f"I call {name} for {city}.", [call(offered, name, city)]),
        {"role": "tool", "content": result}, reply(level, answer, "Done.", f"It is {result}. Done."),
    ]  # fmt: skip


def tools(rng: np.random.Generator, level: Level, offered: Sequence[dict[str, Any]]) -> Messages:
    """A turn for which tools are offered."""
    kind = rng.random()
    if kind < 0.75 and "calculator" in [each["function"]["name"] for each in offered]:
        return calculated(rng, level, offered, int(rng.choice([1, 2, 3], p=[0.5, 0.25, 0.25])))
    return asked(rng, level, offered) if kind < 0.92 else talk(rng, level)


# ------------------------------------------------------------------------------- lookups
def word(rng: np.random.Generator) -> str:
    """One that no text holds."""
    return "".join(pick(rng, SYLLABLES) for _ in range(int(rng.integers(2, 4))))


def place(rng: np.random.Generator) -> str:
    return str(pick(rng, CITIES) if rng.random() < 0.5 else word(rng).title())


def value(rng: np.random.Generator, kind: str) -> str:
    if kind == "number":
        return str(_number(rng, int(rng.integers(2, 6))))
    if kind == "day":
        return f"{int(rng.integers(1, 29))} {pick(rng, MONTHS)}"
    return word(rng).title() if kind == "name" else word(rng)


def fact(rng: np.random.Generator) -> tuple[str, str, str]:
    """What is known by a text: its name, the sentence, the question."""
    if rng.random() < 0.25:
        who, verb = pick(rng, NAMES), pick(rng, ["lives", "was born"])
        ask = f"Where does {who} live?" if verb == "lives" else f"Where was {who} born?"
        return f"{who} {verb}", f"{who} {verb} in {place(rng)}.", ask
    attribute = pick(rng, list(FACTS))
    name = f"the {attribute} of the {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)}"
    ask = pick(rng, ["What is {}?", "what is {}", "Tell me {}.", "Please look up {}."]).format(name)
    return name, f"The{name[3:]} is {value(rng, FACTS[attribute])}.", ask


def passage(rng: np.random.Generator, size: int, facts: int) -> tuple[str, list[tuple[str, str]]]:
    """A text of about ``size`` bytes that hides facts: it, and for each its question and its sentence."""
    known: dict[str, tuple[str, str, str]] = {}
    while len(known) < facts:
        known.setdefault((drawn := fact(rng))[0], drawn)
    sentences, held = [], sum(len(sentence) + 1 for _, sentence, _ in known.values())
    while held < size:
        sentences.append(filler(rng))
        held += len(sentences[-1]) + 1
    for _, sentence, _ in known.values():
        sentences.insert(int(rng.integers(len(sentences) + 1)), sentence)
    return " ".join(sentences), [(question, sentence) for _, sentence, question in known.values()]


def lookup(rng: np.random.Generator, level: Level, size: int, questions: int) -> Messages:
    """A text with questions about it. The last may stand in one message with the text or each in its own."""
    text, known = passage(rng, size, int(rng.integers(max(2, questions), max(2, questions) + 4)))
    chosen = [known[int(i)] for i in rng.permutation(len(known))[:questions]]
    found: Messages = []
    opening = pick(rng, ["", "", "Read this text: ", "Text: "])
    for i, (question, sentence) in enumerate(chosen):
        found.append(user(f"{opening}{text}\n\n{question}" if i == 0 else question))
        found.append(reply(level, sentence, "I look it up.", f"I look it up. The text says: {sentence}"))
    if rng.random() < 0.1:
        found[0]["content"] = chosen[0][0]
        found.insert(0, {"role": "system", "content": text})
    return found


# ------------------------------------------------------------------------------- small talk
def talk(rng: np.random.Generator, level: Level) -> Messages:
    """Greetings, who it is, repeating, a name to remember, and what it cannot do."""
    kind = rng.random()
    if kind < 0.5:
        says, answer = pick(rng, TALK)
        return [user(_case(pick(rng, says), rng)), reply(level, answer, "Small talk.", "This is small talk.")]
    if kind < 0.75:
        text = " ".join(word(rng) if rng.random() < 0.6 else str(_number(rng, 3)) for _ in range(rng.integers(1, 5)))
        ask = pick(rng, ["Repeat: {}", "Say: {}", "Repeat {}"]).format(text)
        return [user(ask), reply(level, text, "I repeat it.", "I am to repeat it.")]
    if kind < 0.85:
        name = pick(rng, NAMES) if rng.random() < 0.5 else word(rng).title()
        tell, hello = user(pick(rng, ["My name is {}.", "I am {}.", "Hi, I am {}"]).format(name)), f"Hello {name}."
        ask, answer = user(pick(rng, ["What is my name?", "Who am I?"])), f"Your name is {name}."
        thoughts = ("A name.", "I keep the name."), ("The name.", "The name was told before.")
        return [tell, reply(level, hello, *thoughts[0]), ask, reply(level, answer, *thoughts[1])]
    text = pick(rng, UNKNOWN).format(word(rng)) if rng.random() < 0.6 else filler(rng)
    return [user(text), reply(level, ABILITIES, "I cannot do this.", "This is none of what I can do.")]


def _case(text: str, rng: np.random.Generator) -> str:
    return text.lower() if rng.random() < 0.4 else text


# ------------------------------------------------------------------------------- conversations
SHARES: dict[Kind, float] = {"arithmetic": 0.5, "tools": 0.2, "lookup": 0.2, "talk": 0.1}
TOOLS_FIT = 900  # tokens that the tool block and a call take


def conversation(rng: np.random.Generator, length: int = 2048, kind: Kind | None = None) -> dict[str, Any]:
    """One conversation of about ``length`` tokens at most; what its kind cannot say in so many is not drawn."""
    kinds: list[Kind] = [name for name in SHARES if name != "tools" or length >= TOOLS_FIT]
    shares = np.array([SHARES[name] for name in kinds])
    kind = kind or kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    level: Level = LEVELS[int(rng.choice(3, p=[0.3, 0.35, 0.35] if kind == "arithmetic" else [0.5, 0.25, 0.25]))]
    turns = int(rng.integers(1, 5)) if level == "off" else int(rng.choice([1, 2], p=[0.85, 0.15]))
    found: dict[str, Any] = {"messages": [], "enable_thinking": level != "off"}
    if level == "high":
        found["reasoning_effort"] = "high"
    messages: Messages = found["messages"]
    if kind == "tools":
        others = [name for name in TOOLS if name != "calculator" and rng.random() < 0.35]
        names = others if others and rng.random() < 0.15 else ["calculator", *others]
        found["tools"] = [tool(str(name), rng) for name in rng.permutation(names)]
        for _ in range(turns):
            messages += tools(rng, level, found["tools"])
    elif kind == "lookup":
        least, most = 60, max(80, min(1900, length - 150 - 90 * turns))
        short = rng.random() < 0.5  # as many of each order of magnitude; else as many of each length
        size = np.exp(rng.uniform(np.log(least), np.log(most))) if short else rng.integers(least, most)
        messages += lookup(rng, level, int(size), turns)
    else:
        for _ in range(turns):
            messages += arithmetic(rng, level) if (rng.random() < 0.8) == (kind == "arithmetic") else talk(rng, level)
    if rng.random() < 0.1 and messages[0]["role"] == "user":
        messages.insert(0, {"role": "system", "content": pick(rng, SYSTEM)})
    return found


class Assistant:
    """A source of conversations; its state is how many samples it drew."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer, self.seed, self.drawn, self.template = tokenizer, seed, 0, ChatTemplate()

    def take(self, length: int, count: int) -> Sample:
        """Documents of at most ``length`` tokens, about ``length * count`` together: no document is turned away for its
        length but one that is too long, so the last one may reach beyond."""
        rng = np.random.default_rng((self.seed, self.drawn))
        self.drawn += 1
        found = list[Document]()
        while sum(len(d.ids) for d in found) < length * (count - 0.4):
            drawn = samples(conversation(rng, length), self.tokenizer, self.template)
            found += [d for d in drawn if len(d.ids) - 1 <= length]
        ids, targets = np.concatenate([d.ids[:-1] for d in found]), np.concatenate([d.labels[1:] for d in found])
        return Sample(torch.from_numpy(ids), torch.from_numpy(targets), tuple(len(d.ids) - 1 for d in found))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
