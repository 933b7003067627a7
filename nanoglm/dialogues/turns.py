"""Turns of a conversation, each a user's message with all that follows it: arithmetic, tools, lookups, small talk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoglm.dialogues.arithmetic import LEVELS, Level, Problem, number, problem
from nanoglm.dialogues.words import (
    ABILITIES,
    ADJECTIVES,
    CITIES,
    FACTS,
    MONTHS,
    NAMES,
    NO_TOOL,
    NOUNS,
    SYLLABLES,
    TALK,
    TOOLS,
    UNKNOWN,
    filler,
    letters,
    unknown,
)  # fmt: skip

Messages = list[dict[str, Any]]
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
    forms += ["What's {}?", "{}="]
    text = pick(rng, forms).format(spoken(found, rng))
    if found.signs == ("+",) and rng.random() < 0.2:
        text = pick(rng, ["Add {} and {}", "add {} and {}.", "What is the sum of {} and {}?"]).format(*found.numbers)
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
        a, b = (number(rng, int(rng.integers(2, 5))) for _ in range(2))
        sign = pick(rng, ["+", "-", "*"])
        opening = pick(rng, ["Compute {}", "Calculate {}", "First compute {}"]).format(
            f" {sign} ".join([str(a), str(b)]) if rng.random() < 0.7 else f"{a}{sign}{b}"
        )
        expressions, texts = [f"{a}{sign}{b}"], [opening]
        results = [Problem((a, b), (sign,)).answer]
        for _ in range(steps - 1):
            sign = pick(rng, ["+", "-", "*"])
            n = number(rng, int(rng.integers(1, 4)))
            texts.append({"+": f"add {n}", "-": f"subtract {n}", "*": f"multiply by {n}"}[sign])
            expressions.append(f"{results[-1]}{sign}{n}")
            results.append(Problem((results[-1], n), (sign,)).answer)
        if all(0 <= result < 10**9 for result in results):
            return ", then ".join(texts) + ".", expressions, results


def calculated(rng: np.random.Generator, level: Level, offered: Sequence[dict[str, Any]], steps: int) -> Messages:
    """A calculation by calls, each of which waits for the one before."""
    if steps == 1:
        count = int(rng.choice([2, 3], p=[0.7, 0.3]))
        numbers = tuple(number(rng, int(rng.integers(2, 7))) for _ in range(count))
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
    if rng.random() < 0.2:
        return letters(rng)
    return "".join(pick(rng, SYLLABLES) for _ in range(int(rng.integers(2, 4))))


def place(rng: np.random.Generator) -> str:
    return str(pick(rng, CITIES) if rng.random() < 0.5 else word(rng).title())


def value(rng: np.random.Generator, kind: str) -> str:
    if kind == "number":
        return str(number(rng, int(rng.integers(2, 6))))
    if kind == "day":
        return f"{int(rng.integers(1, 29))} {pick(rng, MONTHS)}"
    if kind == "name":
        return str(pick(rng, NAMES) if rng.random() < 0.3 else word(rng).title())
    return word(rng)


def fact(rng: np.random.Generator) -> tuple[str, str, str]:
    """What is known by a text: its name, the sentence, the question."""
    if rng.random() < 0.25:
        who, verb = pick(rng, NAMES), pick(rng, ["lives", "was born"])
        ask = f"Where does {who} live?" if verb == "lives" else f"Where was {who} born?"
        return f"{who} {verb}", f"{who} {verb} in {place(rng)}.", ask
    attribute = pick(rng, list(FACTS))
    name = f"the {attribute} of the {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)}"
    asks = ["What is {}?", "what is {}", "Tell me {}.", "Please look up {}.", "What's {}?"]
    ask = pick(rng, asks if attribute not in ("owner", "builder") else [*asks, *["Who is {}?"] * 5]).format(name)
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
    if kind < 0.4:
        says, answer = pick(rng, TALK)
        return [user(_case(pick(rng, says), rng)), reply(level, answer, "Small talk.", "This is small talk.")]
    if kind < 0.62:
        text = " ".join(word(rng) if rng.random() < 0.6 else str(number(rng, 3)) for _ in range(rng.integers(1, 5)))
        ask = pick(rng, ["Repeat: {}", "Say: {}", "Repeat {}"]).format(text)
        return [user(ask), reply(level, text, "I repeat it.", "I am to repeat it.")]
    if kind < 0.7:
        name = pick(rng, NAMES) if rng.random() < 0.5 else word(rng).title()
        tell, hello = user(pick(rng, ["My name is {}.", "I am {}.", "Hi, I am {}"]).format(name)), f"Hello {name}."
        ask, answer = user(pick(rng, ["What is my name?", "Who am I?"])), f"Your name is {name}."
        thoughts = ("A name.", "I keep the name."), ("The name.", "The name was told before.")
        return [tell, reply(level, hello, *thoughts[0]), ask, reply(level, answer, *thoughts[1])]
    other = pick(rng, UNKNOWN).format(word(rng)) if rng.random() < 0.5 else filler(rng)
    text = unknown(rng) if rng.random() < 0.6 else other
    return [user(text), reply(level, ABILITIES, "I cannot do this.", "This is none of what I can do.")]


def _case(text: str, rng: np.random.Generator) -> str:
    return text.lower() if rng.random() < 0.4 else text
