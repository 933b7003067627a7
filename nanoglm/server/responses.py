"""OpenAI's Responses: items in, items out; the last responses are kept, to be gone on from.

Source: serving spec 5.2.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from nanoglm.errors import InputError
from nanoglm.server.blocks import Block, changes
from nanoglm.server.http import JSON, STREAMED, Event, Objects, Route, answer, stream
from nanoglm.server.openai import call_id, schema_of
from nanoglm.server.service import NotFound, Piece, Reply, Service, Usage

KEPT = 256


class ResponsesRequest(BaseModel):
    """``POST /v1/responses``."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    input: str | Objects
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None


# ------------------------------------------------------------------------------- in
def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages: reasoning, text and calls of the assistant that follow each other are one of them.

    Raises:
        InputError: an item that is none.
    """
    found: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []})
        return found[-1]

    for i, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input[{i}]"
        if kind == "message":
            text = _text(item.get("content"), where)
            if item.get("role") == "assistant":
                assistant()["content"] += text
            else:
                found.append({"role": item.get("role"), "content": text})
        elif kind == "reasoning":
            assistant()["reasoning_content"] += _text(item.get("content") or item.get("summary") or "", where)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            assistant()["tool_calls"].append({"type": "function", "function": function})
        elif kind == "function_call_output":
            found.append({"role": "tool", "content": _text(item.get("output"), where)})
        else:
            known = "message, reasoning, function_call or function_call_output"
            raise InputError(f"{where} has type {kind!r}; expected {known}")
    return found


def _text(content: Any, where: str) -> str:
    parts = [{"text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts):
        raise InputError(f"{where} has content {content!r}; expected text or a list of text parts")
    return "".join(part["text"] for part in parts)


# ------------------------------------------------------------------------------- out
class Run:
    """One response: pieces to events, or to the whole."""

    def __init__(self, service: Service, asked: ResponsesRequest, kept: Kept) -> None:
        self.service, self.asked, self.kept = service, asked, kept
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        service.check_name(asked.model)
        given = asked.input if isinstance(asked.input, list) else [{"role": "user", "content": asked.input}]
        before = [] if asked.previous_response_id is None else kept.get(asked.previous_response_id)[1]
        self.items: list[Mapping[str, Any]] = [*before, *given]
        messages = messages_of(self.items)
        if asked.instructions:  # of this turn only: not among the items that are kept
            messages.insert(0, {"role": "system", "content": asked.instructions})
        form, effort = (asked.text or {}).get("format"), (asked.reasoning or {}).get("effort")
        self.job = service.chat(
            messages, _functions(asked.tools), tool_choice=asked.tool_choice,
            several=asked.parallel_tool_calls is not False, schema=schema_of(form), effort=effort,
            max_tokens=asked.max_output_tokens, clamp=True,
            sampling={"temperature": asked.temperature, "top_p": asked.top_p, "seed": uuid.uuid4().int % 2**64},
        )  # fmt: skip
        self.replies: list[Reply] = []
        self.output: list[dict[str, Any]] = []

    def start(self) -> AsyncGenerator[Piece, None]:
        self.replies = self.service.start(self.job)
        return self.service.pieces(self.replies)

    def response(self, status: str) -> dict[str, Any]:
        """The object, as far as it has come."""
        asked, job, done = self.asked, self.job, status in ("completed", "incomplete")
        usage = Usage.of(self.replies)
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "model": self.service.names[0], "output": list(self.output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id, "reasoning": asked.reasoning or {},
            "store": asked.store is not False, "temperature": job.params.temperature, "text": asked.text or {},
            "tool_choice": asked.tool_choice or "auto", "tools": asked.tools or [], "top_p": job.params.top_p,
            "truncation": "disabled", "metadata": asked.metadata or {},
            "usage": None if not done else {
                "input_tokens": usage.prompt, "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion, "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
        }  # fmt: skip

    def end(self) -> dict[str, Any]:
        """The whole, kept unless the request says otherwise."""
        (reply,) = self.replies
        found = self.response("incomplete" if reply.finish == "length" else "completed")
        if self.asked.store is not False:
            self.kept.keep(self.id, found, [*self.items, *self.output])
        return found

    async def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Event, None]:
        number = -1

        def event(kind: str, **fields: Any) -> Event:
            nonlocal number
            number += 1
            return kind, {"type": kind, "sequence_number": number, **fields}

        yield event("response.created", response=self.response("in_progress"))
        yield event("response.in_progress", response=self.response("in_progress"))
        async with aclosing(changes(pieces)) as found:
            async for what, block, text in found:
                if what == "open":
                    self.output.append(_item(block, "in_progress"))
                item = self.output[-1]
                at = {"item_id": item["id"], "output_index": block.number}
                part = at | {"content_index": 0}
                if what == "open":
                    shown = item | ({"content": []} if block.kind != "call" else {})
                    yield event("response.output_item.added", output_index=block.number, item=shown)
                    if block.kind != "call":
                        yield event("response.content_part.added", **part, part=item["content"][0])
                elif what == "more":
                    where = at if block.kind == "call" else part
                    more: dict[str, Any] = {"logprobs": []} if block.kind == "content" else {}
                    yield event(f"response.{NAMES[block.kind]}.delta", **where, delta=text, **more)
                else:
                    item |= self._filled(block)
                    if block.kind == "call":
                        done = {"name": block.name, "arguments": item["arguments"]}
                        yield event("response.function_call_arguments.done", **at, **done)
                    else:
                        more = {"logprobs": []} if block.kind == "content" else {}
                        yield event(f"response.{NAMES[block.kind]}.done", **part, text=block.text, **more)
                        yield event("response.content_part.done", **part, part=item["content"][0])
                    yield event("response.output_item.done", output_index=block.number, item=item)
        ended = self.end()
        yield event(f"response.{ended['status']}", response=ended)

    async def whole(self) -> dict[str, Any]:
        async with aclosing(changes(self.start())) as found:
            async for change in found:
                if change.what == "close":
                    self.output.append(_item(change.block, "completed") | self._filled(change.block))
        return self.end()

    def _filled(self, block: Block) -> dict[str, Any]:
        status = "incomplete" if block.last and self.replies[0].finish == "length" else "completed"
        if block.kind == "call":
            return {"status": status, "arguments": block.text or "{}"}
        return {"status": status, "content": [_item(block, "")["content"][0] | {"text": block.text}]}


NAMES = {"reasoning": "reasoning_text", "content": "output_text", "call": "function_call_arguments"}


def _item(block: Block, status: str) -> dict[str, Any]:
    name = uuid.uuid4().hex
    if block.kind == "call":
        return {
            "id": f"fc_{name}", "type": "function_call", "status": status, "call_id": call_id(), "name": block.name,
            "arguments": "",
        }  # fmt: skip
    if block.kind == "reasoning":
        content = [{"type": "reasoning_text", "text": ""}]
        return {"id": f"rs_{name}", "type": "reasoning", "status": status, "summary": [], "content": content}
    said: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"id": f"msg_{name}", "type": "message", "status": status, "role": "assistant", "content": [said]}


def _functions(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Flat declarations with OpenAI's wrapper around; tools that OpenAI's own servers run are none of ours."""
    kept = ("name", "description", "parameters", "strict")
    return [
        {"type": "function", "function": {name: tool[name] for name in kept if tool.get(name) is not None}}
        for tool in tools or ()
        if tool.get("type") == "function"
    ]


class Kept:
    """The last responses, with all the items before and in them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[dict[str, Any], list[Mapping[str, Any]]]] = OrderedDict()

    def keep(self, name: str, response: dict[str, Any], items: list[Mapping[str, Any]]) -> None:
        """Keeps one, and lets the oldest go."""
        self._kept[name] = response, items
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def get(self, name: str) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
        """Raises NotFound if it is not there."""
        if name not in self._kept:
            raise NotFound(f"no response {name!r}; expected one of the last {KEPT}")
        return self._kept[name]


def failed(status: int, message: str) -> Event:
    """A stream's last event where it goes wrong."""
    return "error", {"type": "error", "code": str(status), "message": message, "param": None, "sequence_number": 0}


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes, kept = APIRouter(tags=["openai"], route_class=Route), Kept()

    @routes.post("/v1/responses", responses=STREAMED)
    async def responses(request: Request, asked: ResponsesRequest) -> Response:
        """A response, whole or as a stream."""
        run = await asyncio.to_thread(Run, service, asked, kept)
        if asked.stream:
            return await stream(request, run.start(), run.events, failed)
        return JSON(await answer(request, run.whole()))

    @routes.get("/v1/responses/{name}")
    async def response(name: str) -> Response:
        """One that was kept."""
        return JSON(kept.get(name)[0])

    return routes
