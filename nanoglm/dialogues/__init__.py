"""Conversations for a small assistant, drawn without end: arithmetic with thinking effort, tool calls, lookups in long
texts, small talk; alone or mixed over several turns.

A conversation is a dict of ``messages``, ``tools`` and the template's switches, so training sees the ids that serving
sees (serving spec 2). Models learn from them (``train/assistant.py``) and are asked with them (``eval/assistant.py``).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from nanoglm.dialogues.arithmetic import LEVELS, Level, Problem, problem
from nanoglm.dialogues.turns import Messages, arithmetic, calculated, lookup, pick, talk, tool, tools
from nanoglm.dialogues.words import SYSTEM, TOOLS

__all__ = ["LEVELS", "Level", "Problem", "arithmetic", "calculated", "conversation", "lookup", "problem", "tool"]

Kind = Literal["arithmetic", "tools", "lookup", "talk"]
SHARES: dict[Kind, float] = {"arithmetic": 0.64, "tools": 0.15, "lookup": 0.14, "talk": 0.07}
TOOLS_FIT = 900  # tokens that the tool block and a call take


def conversation(rng: np.random.Generator, length: int = 2048, kind: Kind | None = None) -> dict[str, Any]:
    """One conversation of about ``length`` tokens at most; what its kind cannot say in so many is not drawn."""
    kinds: list[Kind] = [name for name in SHARES if name != "tools" or length >= TOOLS_FIT]
    shares = np.array([SHARES[name] for name in kinds])
    kind = kind or kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    level: Level = LEVELS[int(rng.choice(3, p=[0.15, 0.35, 0.5] if kind == "arithmetic" else [0.5, 0.25, 0.25]))]
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
