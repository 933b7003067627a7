"""How hard to think: what requests say about it, in the vendor's, OpenAI's and Anthropic's words, as template switches.

The template knows three states: the maximum, ``High``, and no thinking. Its own reading of a level is a trap: anything
but "high" is the maximum, "low" and "none" too. Levels are therefore translated by the vendor's table before they reach
it; only ``chat_template_kwargs`` speak to the template directly.

Source: serving spec 2.7, 5.1, 5.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoglm.errors import InputError

OFF, HIGH, DEFAULT = {"enable_thinking": False}, {"reasoning_effort": "high"}, dict[str, Any]()
LEVELS: Mapping[str, Mapping[str, Any]] = {
    "none": OFF, "minimal": OFF, "low": HIGH, "medium": HIGH, "high": HIGH, "xhigh": DEFAULT, "max": DEFAULT,
}  # fmt: skip
KINDS = ("enabled", "disabled", "adaptive", "between_tools")
# Given by the server itself: arguments of ChatTemplate.render and encode.
RESERVED = ("messages", "tools", "add_generation_prompt", "tokenizer", "self")


def effort_switches(
    reasoning_effort: str | None = None,
    thinking: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The template's switches for a request, to be given to :meth:`ChatTemplate.encode` as they are.

    Args:
        reasoning_effort: one of LEVELS (Anthropic's ``output_config.effort`` too); None leaves the default.
        thinking: the vendor's or Anthropic's object, of which ``type`` and ``clear_thinking`` are read; a ``type``
            "disabled" turns thinking off whatever the level, and none turns on what the level turned off.
        chat_template_kwargs: switches by name, as they are; they win over all else.

    Raises:
        InputError: a level or type that nobody knows, a value of a wrong kind, a switch that cannot be given.
    """
    if reasoning_effort is not None and (not isinstance(reasoning_effort, str) or reasoning_effort not in LEVELS):
        raise InputError(f"reasoning_effort is {reasoning_effort!r}; expected one of {', '.join(LEVELS)}")
    switches = {} if reasoning_effort is None else dict(LEVELS[reasoning_effort])
    kind, clear = _field(thinking, "type"), _field(thinking, "clear_thinking")
    if kind is not None and kind not in KINDS:
        raise InputError(f"thinking.type is {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "disabled":
        switches |= OFF
    if clear is not None:
        if not isinstance(clear, bool):
            raise InputError(f"thinking.clear_thinking is {clear!r}; expected true or false")
        switches["clear_thinking"] = clear
    given = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(given, Mapping):
        raise InputError(f"chat_template_kwargs is {given!r}; expected an object")
    for name in given:
        if name in RESERVED:
            raise InputError(f"chat_template_kwargs holds {name!r}, which the server sets; expected other switches")
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(f"chat_template_kwargs holds {name!r}; expected names that a template can use")
    return switches | dict(given)


def thinking_budget(thinking: Mapping[str, Any] | None = None, thinking_token_budget: int | None = None) -> int | None:
    """How many tokens the reasoning may have, None if nothing limits it; the template does not know of it.

    Args:
        thinking: as of :func:`effort_switches`, of which Anthropic's ``budget_tokens`` is read.
        thinking_token_budget: vLLM's field; of two limits the smaller counts.

    Raises:
        InputError: a limit is no number from 0 on, or ``thinking`` no object.
    """
    found = {
        "thinking.budget_tokens": _field(thinking, "budget_tokens"), "thinking_token_budget": thinking_token_budget,
    }  # fmt: skip
    for name, value in found.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InputError(f"{name} is {value!r}; expected a whole number of tokens, 0 or more")
    return min((value for value in found.values() if value is not None), default=None)


def _field(thinking: Mapping[str, Any] | None, name: str) -> Any:
    if thinking is not None and not isinstance(thinking, Mapping):
        raise InputError(f"thinking is {thinking!r}; expected an object such as {{'type': 'disabled'}}")
    return None if thinking is None else thinking.get(name)
