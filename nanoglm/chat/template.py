"""Messages in, a prompt out: GLM-5.2's chat template, or the one that a checkpoint brings.

A template is Jinja text, run as transformers runs it; ours is ``glm-5.2.jinja`` beside this file. Two ways lead to ids:

- Text, then ids: ``tokenizer.encode(template.render(...))``, as engines serve GLM. Whatever spells an added token
  becomes one: a user who writes ``<|assistant|>`` speaks for the model (serving spec 1.1, rule 4).
- :meth:`ChatTemplate.encode`: only what the template itself writes becomes markup, all that comes from messages and
  tools stays text. Without such a spelling both give the same ids; with one, ours decode to the same text.

Source: serving spec 2.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.errors import CheckpointError, InputError

FILE = "chat_template.jinja"  # as transformers names it
ROLES = ("system", "developer", "user", "assistant", "tool")
# Half a surrogate pair: no text holds it. Behind a character from outside, that begins no added token any more.
GUARD = "\ud800"


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text; GLM-5.2's if left out. It comes with a checkpoint from a stranger, so it runs in a sandbox.

    Raises:
        CheckpointError: the text is no Jinja template.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = (
            Path(__file__).with_name("glm-5.2.jinja").read_text(encoding="utf-8") if source is None else source
        )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson  # Jinja's own sorts keys and escapes for HTML
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template line {error.lineno} is no Jinja: {error.message}") from None

    @classmethod
    def from_directory(cls, directory: str | Path) -> ChatTemplate:
        """A checkpoint's ``chat_template.jinja``, or GLM-5.2's if there is none.

        Raises:
            CheckpointError: the file cannot be read, or is no Jinja template.
        """
        try:
            return cls((Path(directory) / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"chat template {Path(directory) / FILE} cannot be read: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        **switches: Any,
    ) -> str:
        """The text of a conversation, as the template prints it: null content too, see :func:`normalise` for that.

        Args:
            messages: ``role`` (system, user, assistant, tool; others are left out), ``content`` (text or parts),
                ``reasoning_content`` and ``tool_calls`` (arguments as an object) of the assistant.
            tools: function declarations, with or without OpenAI's wrapper.
            add_generation_prompt: end with what the assistant's turn begins with.
            switches: variables of the template; absent is not the same as None. GLM-5.2's are ``enable_thinking``
                (true), ``reasoning_effort`` ("high"; all else is the maximum) and ``clear_thinking`` (true: earlier
                turns without their reasoning).

        Raises:
            InputError: the template cannot render these messages, or refuses them.
        """
        variables = dict(switches, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        try:
            return self._template.render(variables)
        except Exception as error:  # a template can fail in any way
            raise InputError(f"messages cannot be rendered by the chat template: {error}") from None

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """Ids of a conversation, normalised: the template's markup as control tokens, everything else as plain text.

        A template that searches contents for markup finds none; reasoning is taken out of them before.

        Args:
            options: as of :meth:`render`.

        Raises:
            InputError: as :func:`normalise`, :meth:`render` and ``tokenizer.encode`` raise it.
        """
        first = re.compile("|".join(re.escape(c) for c in sorted({name[0] for name in tokenizer.added})) or r"(?!)")
        text = self.render(_guarded(normalise(messages), first), _guarded(tools, first), **_guarded(options, first))
        ids, begin = list[int](), 0
        for match in tokenizer.markup.finditer(text):
            ids += tokenizer.encode_plain(text[begin : match.start()].replace(GUARD, ""))
            ids += tokenizer.encode(match.group())
            begin = match.end()
        return ids + tokenizer.encode_plain(text[begin:].replace(GUARD, ""))


def _guarded(value: Any, first: re.Pattern[str]) -> Any:
    """The same value, in its strings a guard behind every character that an added token begins with."""
    if isinstance(value, str):
        if GUARD in value:
            raise InputError("text holds the lone surrogate U+D800; expected Unicode text")
        return first.sub(lambda match: match.group() + GUARD, value)
    if isinstance(value, Mapping):
        return {_guarded(key, first): _guarded(item, first) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_guarded(item, first) for item in value]
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# ------------------------------------------------------------------------------- messages
def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as clients send them, mended where the template would print or drop the wrong thing.

    Content null becomes empty (it would print ``None``), a call's arguments an object where they are JSON text,
    ``developer`` becomes ``system`` (it would vanish), ``reasoning`` becomes ``reasoning_content``; reasoning inside an
    assistant's text is taken out of it by the template's rule (serving spec 2.3, 2.4, 5.1).

    Raises:
        InputError: a message, its role, content or a tool call is none that the template knows.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise InputError(f"messages is {messages!r}; expected a list of objects")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {message!r}; expected an object")
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{where} has role {role!r}; expected one of {', '.join(ROLES)}")
    result = dict(message) | {
        "role": "system" if role == "developer" else role,
        "content": _content(message.get("content"), where),
    }
    if role == "assistant":
        _take_reasoning(result, where)
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise InputError(f"{where} has tool_calls {calls!r}; expected a list")
        result["tool_calls"] = [_call(call, where) for call in calls]
    return result


def _content(content: Any, where: str) -> Any:
    if content is None:
        return ""
    if not isinstance(content, str | list):
        raise InputError(f"{where} has content {content!r}; expected text or a list of parts")
    for part in () if isinstance(content, str) else content:
        if not isinstance(part, str) and not _is_part(part):
            raise InputError(f"{where} has content part {part!r}; expected text or an object with a type")
    return content


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    return "output" in part or (isinstance(part.get("type"), str) and isinstance(part.get("text", ""), str))


def _take_reasoning(message: dict[str, Any], where: str) -> None:
    content, alias = message["content"], message.pop("reasoning", None)
    reasoning = alias if message.get("reasoning_content") is None else message["reasoning_content"]
    if not isinstance(reasoning, str | None):
        raise InputError(f"{where} has reasoning_content {reasoning!r}; expected text")
    if isinstance(content, list) and all(isinstance(part, str) or part.get("type") == "text" for part in content):
        content = "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    if reasoning is None and isinstance(content, str) and "</think>" in content:
        reasoning = content.partition("</think>")[0].rpartition("<think>")[2]
        content = content.rpartition("</think>")[2]
    message |= {"content": content, "reasoning_content": reasoning or ""}


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has tool call {call!r}; expected an object with a function's name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # refused below, as what it is
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where} calls {function['name']} with arguments {arguments!r}; expected a JSON object")
    return {**call, "function": {"name": function["name"], "arguments": arguments}}
