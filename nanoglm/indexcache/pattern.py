"""Schedules as strings: F for a layer that runs its indexer, S for one that takes the Selection of the F before it.

Source: indexcache spec 3.1, 3.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from itertools import combinations

from nanoglm.config import FULL, types_from_rule
from nanoglm.errors import InputError

# What "every r-th" means: the offset of types_from_rule. The paper begins FSSSF, its patches FFSSSF, GLM-5.2 FFFSSSF.
UNIFORM = {"paper": 1, "patch": 2, "glm": 3}


def sources(pattern: str) -> list[int]:
    """By layer the one whose Selection it uses, itself if Full."""
    found: list[int] = []
    for layer, letter in enumerate(pattern):
        found.append(layer if letter == "F" else found[-1])
    return found


def flipped(pattern: str, layer: int) -> str:
    """The same with one layer of the other kind."""
    return pattern[:layer] + ("S" if pattern[layer] == "F" else "F") + pattern[layer + 1 :]


def uniform(layers: int, every: int, rule: str = "paper") -> str:
    """One Full layer in ``every``, by one of the three definitions in use."""
    if rule not in UNIFORM:
        raise InputError(f"rule is {rule!r}; expected one of {', '.join(UNIFORM)}")
    types = types_from_rule(layers, every, UNIFORM[rule])
    return "".join("F" if kind == FULL else "S" for kind in types)


def count_of(keep: str, layers: int) -> int:
    """How many indexers ``keep`` is, a share such as 1/4 of all layers or a number; at least 1.

    Raises:
        InputError: none of these, or more than there are layers.
    """
    try:
        share = Fraction(keep)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"keep is {keep!r}; expected a share such as 1/4, or a number of indexers") from None
    count = max(1, round(share * layers)) if share < 1 or "/" in keep or "." in keep else share
    if share <= 0 or count > layers or int(count) != count:
        raise InputError(f"keep is {keep!r}; expected a share such as 1/4, or 1 to {layers} indexers")
    return int(count)


def subsets(pattern: str, full: int) -> list[str]:
    """All patterns with ``full`` F, among those that ``pattern`` has; the first layer's always stays.

    Raises:
        InputError: it has fewer.
    """
    free = [layer for layer, letter in enumerate(pattern) if letter == "F" and layer]
    if not 1 <= full <= len(free) + 1:
        raise InputError(f"{full} indexers are asked for; expected 1 to {len(free) + 1}, what {pattern} has")
    return [with_full(layers, len(pattern)) for layers in combinations(free, full - 1)]


def with_full(layers: Iterable[int], count: int) -> str:
    """The pattern of so many layers in which the first one and these are Full."""
    full = {0, *(int(layer) for layer in layers)}
    return "".join("F" if layer in full else "S" for layer in range(count))
