"""Anthropic's Messages: their blocks become messages as the template knows them, and back.

Thinking is off unless a request asks for it or for an effort, as Anthropic has it: a client that asks for neither has
no place for thought and gives it no tokens.

Source: serving spec 5.3, 5.4.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from nanoglm.errors import InputError
from nanoglm.server.blocks import Block, changes
from nanoglm.server.http import JSON, KINDS, STREAMED, Event, Objects, Route, Texts, answer, stream
from nanoglm.server.service import Piece, Reply, Service, Usage

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
SIGNATURE = "nanoglm"  # thought comes back as it was; nobody checks it


class CountRequest(BaseModel):
    """``POST /v1/messages/count_tokens``."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: Objects
    system: str | Objects | None = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Texts | None = None
    stream: bool | None = None


# ------------------------------------------------------------------------------- in
def messages_of(asked: CountRequest) -> list[dict[str, Any]]:
    """The conversation, tool results before the text that comes with them.

    Raises:
        InputError: a message or a block that is none.
    """
    found: list[dict[str, Any]] = []
    if asked.system:
        found.append({"role": "system", "content": _text(asked.system, "system")})
    for i, message in enumerate(asked.messages):
        role, content, where = message.get("role"), message.get("content"), f"messages[{i}]"
        if role not in ("user", "assistant", "system"):
            raise InputError(f"{where} has role {role!r}; expected user, assistant or system")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
            raise InputError(f"{where} has content {content!r}; expected text or a list of blocks")
        found += [_assistant(blocks, where)] if role == "assistant" else _user(role, blocks, where)
    return found


def _user(role: str, blocks: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    results = [
        {"role": "tool", "content": _result(block, where), "tool_call_id": block.get("tool_use_id")}
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    rest = [_part(block, where) for block in blocks if block.get("type") != "tool_result"]
    return [*results, *([{"role": role, "content": rest}] if rest or not results else [])]


def _part(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind, source = block.get("type"), block.get("source")
    if kind == "text":
        return {"type": "text", "text": _string(block.get("text"), where)}
    if kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return {"type": "text", "text": _string(source.get("data"), where)}
    if kind in ("image", "document"):
        return {"type": "image"}  # the template says that there was one; the model is text only
    raise InputError(f"{where} holds a block of type {kind!r}; expected text, image, document or tool_result")


def _result(block: Mapping[str, Any], where: str) -> Any:
    """A tool's result: text, or references to tools that a search found, which the template prints."""
    content = block.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise InputError(f"{where} has a tool_result with content {content!r}; expected text or a list of blocks")
    if content and content[0].get("type") == "tool_reference":
        names = [part.get("name", part.get("tool_name")) for part in content]
        return [{"type": "tool_reference", "name": _string(name, where)} for name in names]
    return [_part(part, where) for part in content]


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            message["content"] += _string(block.get("text"), where)
        elif kind == "thinking":
            message["reasoning_content"] += _string(block.get("thinking"), where)
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            message["tool_calls"].append({"type": "function", "function": function})
        elif kind != "redacted_thinking":  # another model's, and closed
            raise InputError(f"{where} holds a block of type {kind!r}; expected text, thinking or tool_use")
    return message


def _text(value: str | Sequence[Mapping[str, Any]], where: str) -> str:
    return value if isinstance(value, str) else "".join(_string(block.get("text"), where) for block in value)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} holds {value!r} where text belongs")
    return value


def tools_of(asked: CountRequest) -> list[dict[str, Any]]:
    """The tools in OpenAI's form. Those that Anthropic's own servers run have no schema; nothing here can run them."""
    found = []
    for tool in asked.tools or ():
        if "input_schema" not in tool and "type" in tool and tool["type"] != "custom":
            continue
        names = {"name": "name", "description": "description", "parameters": "input_schema"}
        function = {name: tool[theirs] for name, theirs in names.items() if theirs in tool}
        function |= {"defer_loading": True} if tool.get("defer_loading") else {}
        found.append({"type": "function", "function": function})
    return found


def choice_of(asked: CountRequest) -> Any:
    """``tool_choice`` in OpenAI's words."""
    choice = asked.tool_choice or {"type": "auto"}
    kind = choice.get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise InputError(f"tool_choice.type is {kind!r}; expected auto, any, tool or none")
    return {"name": choice.get("name")} if kind == "tool" else "required" if kind == "any" else kind


def effort_of(asked: CountRequest) -> dict[str, Any]:
    """Arguments of ``Service.chat`` and ``Service.prompt`` about thinking."""
    effort = (asked.output_config or {}).get("effort")
    thinking = asked.thinking or ({"type": "disabled"} if effort is None else None)
    return {"effort": effort, "thinking": thinking}


def schema_of(asked: CountRequest) -> Mapping[str, Any] | None:
    """The schema of ``output_config.format``."""
    form = (asked.output_config or {}).get("format")
    if form is None:
        return None
    schema = form.get("schema") if isinstance(form, Mapping) else None
    if not isinstance(schema, Mapping) or form.get("type") != "json_schema":
        raise InputError(f"output_config.format is {form!r}; expected a json_schema with its schema")
    return schema


# ------------------------------------------------------------------------------- out
class Messages:
    """One message: pieces to events, or to the whole."""

    def __init__(self, service: Service, asked: MessagesRequest) -> None:
        self.service, self.id = service, f"msg_{uuid.uuid4().hex}"
        service.check_name(asked.model)
        sampling = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
        self.job = service.chat(
            messages_of(asked), tools_of(asked), tool_choice=choice_of(asked),
            several=not (asked.tool_choice or {}).get("disable_parallel_tool_use"), schema=schema_of(asked),
            max_tokens=asked.max_tokens, clamp=True, sampling=sampling | {"seed": uuid.uuid4().int % 2**64},
            stop=tuple(asked.stop_sequences or ()), **effort_of(asked),
        )  # fmt: skip
        self.replies: list[Reply] = []

    def start(self) -> AsyncGenerator[Piece, None]:
        self.replies = self.service.start(self.job)
        return self.service.pieces(self.replies)

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.service.names[0], "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": self._usage(),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        usage = Usage.of(self.replies)
        return {
            "input_tokens": usage.prompt - usage.cached, "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": 0, "output_tokens": usage.completion,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }  # fmt: skip

    def _end(self) -> dict[str, Any]:
        (reply,) = self.replies
        assert reply.finish is not None
        stopped = reply.stopped_by is not None and reply.finish == "stop"
        reason = "stop_sequence" if stopped else REASONS[reply.finish]
        return {"stop_reason": reason, "stop_sequence": reply.stopped_by if stopped else None}

    async def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Event, None]:
        def event(kind: str, **fields: Any) -> Event:
            return kind, {"type": kind, **fields}

        yield event("message_start", message=self._message())
        async with aclosing(changes(pieces)) as found:
            async for what, block, text in found:
                if what == "open":
                    yield event("content_block_start", index=block.number, content_block=_opened(block))
                elif what == "more":
                    yield event("content_block_delta", index=block.number, delta=_delta(block, text))
                else:
                    if block.kind == "reasoning":
                        delta = {"type": "signature_delta", "signature": SIGNATURE}
                        yield event("content_block_delta", index=block.number, delta=delta)
                    yield event("content_block_stop", index=block.number)
        yield event("message_delta", delta=self._end(), usage=self._usage())
        yield event("message_stop")

    async def whole(self) -> dict[str, Any]:
        async with aclosing(changes(self.start())) as found:
            content = [_closed(change.block) async for change in found if change.what == "close"]
        return self._message() | {"content": content} | self._end()


def _opened(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.kind == "content":
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": block.name, "input": {}}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text} if block.kind == "content" else {
        "type": "input_json_delta", "partial_json": text,
    }  # fmt: skip


def _closed(block: Block) -> dict[str, Any]:
    found = _opened(block)
    if block.kind == "reasoning":
        return found | {"thinking": block.text, "signature": SIGNATURE}
    return found | ({"text": block.text} if block.kind == "content" else {"input": json.loads(block.text or "{}")})


def failed(status: int, message: str) -> Event:
    """A stream's last event where it goes wrong."""
    return "error", {"type": "error", "error": {"type": KINDS.get(status, "api_error"), "message": message}}


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(tags=["anthropic"], route_class=Route)

    @routes.post("/v1/messages", responses=STREAMED)
    async def messages(request: Request, asked: MessagesRequest) -> Response:
        """A message, whole or as a stream."""
        made = await asyncio.to_thread(Messages, service, asked)
        if asked.stream:
            return await stream(request, made.start(), made.events, failed)
        return JSON(await answer(request, made.whole()))

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(asked: CountRequest) -> Response:
        """How many tokens the prompt has."""
        service.check_name(asked.model)
        tools = tools_of(asked) if choice_of(asked) != "none" else []
        ids = await asyncio.to_thread(service.prompt, messages_of(asked), tools, **effort_of(asked))
        return JSON({"input_tokens": len(ids)})

    return routes
