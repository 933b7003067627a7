"""Arithmetic problems with the ways to think about them.

How much is thought follows the effort. Off: the answer at once. High: one running total a step. Max: every step digit
by digit, with carries, which a model of some layers can do surely where it guesses a total. Nothing else tells the
levels apart, so what effort buys is what was learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import numpy as np

Level = Literal["off", "high", "max"]
LEVELS: tuple[Level, ...] = ("off", "high", "max")
LARGEST = 1999  # of a running total that is thought


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
        numbers = [number(rng, int(rng.choice([1, 2, 3], p=[0.25, 0.65, 0.1]))) for _ in range(count)]
        signs = [str(sign) for sign in rng.choice(["+", "-"], count - 1, p=[0.55, 0.45])]
        if rng.random() < 0.25:
            i = int(rng.integers(count - 1))
            signs[i], factors = "*", [int(rng.integers(2, 20)), int(rng.integers(2, 10))]
            numbers[i], numbers[i + 1] = factors if rng.random() < 0.5 else factors[::-1]
        found = Problem(tuple(numbers), tuple(signs))
        kept = crc32(found.expression.encode()) % 16 == 0
        if kept == held_out and all(0 <= result <= LARGEST for *_, result in found.steps):
            return found


def number(rng: np.random.Generator, digits: int) -> int:
    return int(rng.integers(10 ** (digits - 1), 10**digits))
