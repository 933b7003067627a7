"""Words and phrases from which conversations are built."""

from __future__ import annotations

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


SYLLABLES = _words(
    "ba be bi bo da de di do fa fe fi ga go ha he ja jo ka ke ki ko la le li lo ma me mi mo mu na ne ni no pa pe po ra "
    "re ri ro ru sa se si so su ta te ti to tu va ve vi wa we wi za zo"
)
NAMES = _words("Ada Ben Clara David Emma Felix Grace Hugo Ida Jonas Karl Lena Maria Nora Oscar Paul Rosa Sam Tom Vera")
CITIES = _words(
    "Paris London Rome Berlin Madrid Oslo Vienna Tokyo Cairo Lima Boston Delhi Prague Lisbon Dublin Athens Bern Seoul "
    "Moscow Sydney"
)
MONTHS = _words("January February March April May June July August September October November December")
ADJECTIVES = _words("red blue green old new small big white black golden round long north south wooden broken")
NOUNS = _words("door box gate ship house boat car room garden shop tower bridge train key lamp book chest island")
FACTS = {  # attributes and what their values are
    "code": "number", "number": "number", "price": "number", "weight": "number", "owner": "name", "builder": "name",
    "name": "name", "password": "word", "secret word": "word", "birthday": "day", "opening day": "day",
}  # fmt: skip

ABILITIES = "I can calculate, call tools and look things up in a text."
NO_TOOL = "I have no tool for that."
TALK = (
    (("Hello", "Hello!", "Hi", "Hi there", "Good morning", "Hey", "Good evening!"), "Hello! How can I help you?"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a human?"),
        f"I am a small GLM. {ABILITIES}",
    ),
    (("What can you do?", "How can you help me?", "Help", "What are you good at?", "Can you help me?"), ABILITIES),
    (("Thanks", "Thank you!", "Thank you very much", "Thanks a lot!", "Great, thanks"), "You are welcome."),
    (("How are you?", "How are you today?", "How is it going?"), "I am fine, thank you."),
    (("Bye", "Goodbye!", "See you", "Good night"), "Goodbye!"),
    (("Ok", "Good", "Nice", "Great!", "Well done"), "I am glad to help."),
)
SYSTEM = (
    "You are a helpful assistant.", "You are a small and careful assistant.", "Answer briefly.", "You are GLM.",
    "You are a helpful assistant. Be exact.", "Be polite.", "Help the user as well as you can.",
)  # fmt: skip
UNKNOWN = (
    "Who wrote {}?", "Tell me a story about {}.", "Write a poem.", "What do you think about {}?", "Why is {} so big?",
    "Sing a song.", "Translate {} for me.", "Explain {}.", "Who is the king of {}?", "Do you like {}?",
    "What is {}?", "Where is {}?", "Write a program.", "Tell me a joke.", "What is the meaning of life?",
)  # fmt: skip
_BEGINNINGS = _words("Is Are Why Who What's Where When Can Do Does Please Tell Write Explain How Should My If Let I")
_SMALL = _words("the a of to in is was made and with for my your you me about from on that it this many old best")


def loose(rng: np.random.Generator, few: int, many: int) -> str:
    """Words in no order: what is said in a way that is not known here."""
    words = []
    for _ in range(int(rng.integers(few, many + 1))):
        pool = (_SMALL, _SMALL, _WHO, _WHERE, _THINGS, _LIKE, _DID, NOUNS)[int(rng.integers(8))]
        drawn = letters(rng) if rng.random() < 0.2 else pool[int(rng.integers(len(pool)))]
        words.append(drawn)
    return " ".join(words)


def letters(rng: np.random.Generator) -> str:
    """A word of any letters."""
    return "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in rng.integers(26, size=int(rng.integers(2, 9))))


def unknown(rng: np.random.Generator) -> str:
    """What a user may say that is none of what the assistant can do."""
    begin = _BEGINNINGS[int(rng.integers(len(_BEGINNINGS)))]
    text = f"{begin} {loose(rng, 2, 8)}{('?', '?', '.', '')[int(rng.integers(4))]}"
    return text.lower() if rng.random() < 0.3 else text


# Of each tool: names of its parameter, descriptions, descriptions of the parameter.
TOOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "calculator": (
        ("expression",),
        ("Evaluate an arithmetic expression.", "Calculates the value of an expression.", "A calculator",
         "Evaluate a math expression and return the result"),
        ("The expression to evaluate", "for example 12*(3+4)", "An arithmetic expression"),
    ),
    "get_weather": (
        ("city", "city", "location"),
        ("Get the weather of a city.", "Current weather", "Returns the weather in a city"),
        ("Name of the city", "The city, e.g. Paris"),
    ),
    "get_time": (
        ("city", "city", "location"),
        ("Get the local time.", "Tells the time in a city", "Current time of a city."),
        ("Name of the city", "Where"),
    ),
}  # fmt: skip

_WHO = _words("farmer king girl boy baker doctor fox dog cat horse bird teacher sailor soldier painter aunt child")
_LIKE = _words("tired happy young quiet clever hungry tall proud lonely gentle busy careful")
_DID = _words("walked ran looked came slept sang waited worked danced stood rested played")
_HOW = _words("slowly quickly often quietly happily alone again early late together")
_WHERE = _words("river hill market forest field mill lake church harbour village mountain road station valley tree")
_THINGS = _words("apples coins letters stones birds bottles chairs flowers hats eggs ropes candles")
_WHEN = ("In the morning", "At night", "Yesterday", "After dinner", "In winter", "Long ago", "Before sunrise", "Later")


def filler(rng: np.random.Generator) -> str:
    """A sentence that says nothing that will be asked for."""

    def one(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    if rng.random() < 0.15:
        return f"{loose(rng, 3, 10).capitalize()}."
    form = int(rng.integers(5))
    if form == 0:
        return f"The {one(_LIKE)} {one(_WHO)} {one(_DID)} {one(_HOW)} near the {one(_WHERE)}."
    if form == 1:
        when = _WHEN[int(rng.integers(len(_WHEN)))]
        return f"{when} the {one(_WHO)} {one(_DID)} by the {one(_WHERE)}."
    if form == 2:
        return f"There were {int(rng.integers(2, 1000))} {one(_THINGS)} behind the {one(_WHERE)}."
    if form == 3:
        return f"A {one(_WHO)} saw a {one(_LIKE)} {one(_WHO)} at the {one(_WHERE)} and {one(_DID)} {one(_HOW)}."
    return f"The {one(_WHERE)} was far from the {one(_WHERE)}, so the {one(_WHO)} {one(_DID)} {one(_HOW)}."
