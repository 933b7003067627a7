"""GLM-5.2's chat template in plain Python, to be read beside serving spec 2.

It prints what ``glm-5.2.jinja`` prints, byte for byte; that file is for other engines, and for :class:`ChatTemplate`,
which runs any template. This one also knows whose each piece of text is: :func:`segments` yields ``(text, is_markup)``,
markup being the template's own words. What comes from messages and tools is not, whatever it spells, so :func:`encode`
makes ids in which only the template speaks as control tokens.

Source: serving spec 2.1 to 2.4.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from nanoglm.chat.template import normalise
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.errors import InputError

Segment = tuple[str, bool]  # text, is_markup

TOOLS_BEGIN = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_END = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
REMINDER = (
    "<reminder>You are unable to process this {} because you don't have multi-modal input ability. "
    "Try different methods.</reminder>"
)
IMAGES = ("image", "image_url")
OTHER_MEDIA = ("audio", "audio_url", "input_audio", "video", "video_url", "input_video")
FOR_SERVERS = ("defer_loading", "strict")  # keys of a tool that the model does not see


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    **switches: Any,
) -> str:
    """The text of a conversation, as ``ChatTemplate().render`` gives it. Arguments and errors: :func:`segments`."""
    found = segments(messages, tools, add_generation_prompt=add_generation_prompt, **switches)
    return "".join(text for text, _ in found)


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> list[int]:
    """Ids of a conversation, normalised, as ``ChatTemplate().encode`` gives them.

    Args:
        options: as of :func:`segments`.

    Raises:
        InputError: as :func:`normalise`, :func:`segments` and ``tokenizer.encode`` raise it.
    """
    ids, plain = list[int](), ""  # plain text waits for what follows it: a BPE merges across borders of segments
    for is_markup, group in groupby(segments(normalise(messages), tools, **options), key=itemgetter(1)):
        text, begin = "".join(piece for piece, _ in group), 0
        for match in tokenizer.markup.finditer(text) if is_markup else ():
            ids += tokenizer.encode_plain(plain + text[begin : match.start()])
            ids += tokenizer.encode(match.group())
            plain, begin = "", match.end()
        plain += text[begin:]
    return ids + tokenizer.encode_plain(plain)


# ------------------------------------------------------------------------------- the template
def segments(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    **switches: Any,
) -> Iterator[Segment]:
    """The pieces of a conversation's text, each with whether it is the template's own.

    Args:
        messages, tools, add_generation_prompt: as of :meth:`ChatTemplate.render`; null content prints ``None``.
        switches: ``enable_thinking``, ``reasoning_effort`` and ``clear_thinking``; others change nothing. Absent is
            not the same as None, which counts as false.

    Raises:
        InputError: a call's arguments are no object, a tool or its result has a form that cannot be printed.
    """
    thinking = bool(switches.get("enable_thinking", True))
    preserved = not switches.get("clear_thinking", True)
    yield "[gMASK]<sop>", True
    if thinking:
        yield "<|system|>Reasoning Effort: " + ("High" if switches.get("reasoning_effort") == "high" else "Max"), True
    if tools:
        yield TOOLS_BEGIN, True
        for tool in tools:
            if not (_get(tool, "defer_loading") or _get(_function(tool), "defer_loading")):
                yield _declaration(tool), False
        yield TOOLS_END, True
    roles = [_get(message, "role") for message in messages]
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    for i, message in enumerate(messages):
        content = _get(message, "content", "")
        if roles[i] in ("system", "user"):
            yield f"<|{roles[i]}|>", True
            yield from _visible(content)
        elif roles[i] == "tool":
            if i == 0 or roles[i - 1] != "tool":
                yield "<|observation|>", True
            yield from _responses(content, tools or ())
        elif roles[i] == "assistant":
            yield from _answer(list(_visible(content)), _get(message, "reasoning_content"), preserved or i > last_user)
            for call in _get(message, "tool_calls") or ():
                yield from _call(_function(call))
    if add_generation_prompt:
        yield "<|assistant|><think>" if thinking else "<|assistant|><think></think>", True


def _visible(content: Any) -> Iterator[Segment]:
    """Text of a message: a string, or a list of parts; anything else as Python prints it."""
    if isinstance(content, str | Mapping) or not isinstance(content, Iterable):
        yield str(content), False
        return
    for part in content:
        kind = _get(part, "type")
        if isinstance(part, str):
            yield part, False
        elif kind == "text":
            yield str(_get(part, "text", "")), False
        elif kind in IMAGES:
            yield IMAGE, True
        elif kind in OTHER_MEDIA:
            yield REMINDER.format("audio" if "audio" in kind else "video"), True


def _answer(content: list[Segment], given: Any, replayed: bool) -> Iterator[Segment]:
    """The assistant's reasoning, if it is replayed, and its stripped text (spec 2.3).

    Args:
        given: the reasoning if it is text; else it lies within the content, if that closes it.
    """
    text, begin = "".join(piece for piece, _ in content), 0
    reasoning: Iterable[Segment] = [(given, False)] if isinstance(given, str) else ()
    if not isinstance(given, str) and "</think>" in text:
        before = text.partition("</think>")[0]  # of the first; the content begins behind the last
        reasoning = _cut(content, len(before) - len(before.rpartition("<think>")[2]), len(before))
        begin = len(text) - len(text.rpartition("</think>")[2])
    yield "<|assistant|><think>", True
    if replayed:
        yield from reasoning
    yield "</think>", True
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    yield from _cut(content, begin, begin + len(text[begin:].rstrip()))


def _cut(pieces: Iterable[Segment], begin: int, end: int) -> Iterator[Segment]:
    """What lies between two places of the joined text."""
    at = 0
    for text, is_markup in pieces:
        yield text[max(begin - at, 0) : max(end - at, 0)], is_markup
        at += len(text)


def _call(function: Any) -> Iterator[Segment]:
    arguments = _get(function, "arguments") or {}
    if not isinstance(arguments, Mapping):
        raise InputError(f"tool call has arguments {arguments!r}; expected an object")
    yield "<tool_call>", True
    yield str(_get(function, "name", "")), False
    for key, value in arguments.items():
        yield "<arg_key>", True
        yield str(key), False
        yield "</arg_key><arg_value>", True
        yield _text_or_json(value), False
        yield "</arg_value>", True
    yield "</tool_call>", True


def _responses(content: Any, tools: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
    """What a tool returned: text, tools that a search found, or several outputs; the first item says which."""
    if not isinstance(content, str | Sequence | None):
        raise InputError(f"tool message has content {content!r}; expected text or a list")
    items = () if content is None or isinstance(content, str) else content
    first = items[0] if items else None
    if _get(first, "type") == "tool_reference":
        yield "<tool_response><tools>\n", True
        for reference in items:
            for tool in tools:
                if _get(_function(tool), "name") == _get(reference, "name"):
                    yield _declaration(tool), False
        yield "</tools></tool_response>", True
    elif isinstance(first, Mapping) and "output" in first:
        for item in items:
            if not isinstance(item, Mapping) or "output" not in item:
                raise InputError(f"tool message has {item!r} among outputs; expected an object with output")
            yield "<tool_response>", True
            yield _text_or_json(item["output"]), False
            yield "</tool_response>", True
    else:
        yield "<tool_response>", True
        yield from _visible(content)
        yield "</tool_response>", True


def _declaration(tool: Any) -> str:
    """A tool on a line of JSON: the function without its wrapper and without what only servers read (spec 2.4)."""
    function = _function(tool)
    if not isinstance(function, Mapping):
        raise InputError(f"tools holds {function!r}; expected an object")
    return _json({key: value for key, value in function.items() if key not in FOR_SERVERS}) + "\n"


def _function(item: Any) -> Any:
    """Of a tool or a call: what OpenAI's wrapper holds, or itself."""
    return _get(item, "function") or item


def _get(item: Any, key: str, default: Any = None) -> Any:
    """Messages come from outside: what is no object has no fields."""
    return item.get(key, default) if isinstance(item, Mapping) else default


def _text_or_json(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"messages hold a value that is no JSON: {error}") from None
