"""OpenAI's Chat Completions, Completions and Models, with vLLM's and the vendor's fields beside them.

Source: serving spec 5.1.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.engine.request import Logprobs
from nanoglm.errors import InputError
from nanoglm.server.http import JSON, STREAMED, Event, Ids, Objects, Route, Texts, answer, collect, stream
from nanoglm.server.service import Job, Piece, Reply, Service, Usage
from nanoglm.server.xray import XRays

MOST_STOPS = 16


class Sampling(BaseModel):
    """What both kinds of completion take. Unknown fields are passed over, as vLLM does."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(fail_fast=True)] | None = None
    seed: int | None = None
    stop: str | Texts | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    def sampling(self) -> dict[str, Any]:
        """As ``SamplingParams`` has it."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "min_tokens", "repetition_penalty", "frequency_penalty",
            "presence_penalty",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        # OpenAI's seed may be negative; without one every request draws its own.
        found["seed"] = (uuid.uuid4().int if self.seed is None else self.seed) % 2**64
        if self.logit_bias:
            found["logit_bias"] = {_token_id(name): value for name, value in self.logit_bias.items()}
        return found

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > MOST_STOPS:
            raise InputError(f"stop has {len(found)} texts; expected at most {MOST_STOPS}")
        return found

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Objects
    max_completion_tokens: int | None = Field(None, ge=0)
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning_effort: str | None = None
    thinking: dict[str, Any] | None = None  # the vendor's
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's, and the next
    thinking_token_budget: int | None = None
    do_sample: bool | None = None  # the vendor's; tool_stream too, which needs no reading: arguments always stream
    xray: bool | None = None  # ours: keep what is selected, for GET /xray/{id}


class CompletionRequest(Sampling):
    """``POST /v1/completions``: the prompt as it is; who wants [gMASK]<sop> writes it."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=100)


def schema_of(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema that a reply is to have, in either place where clients put it."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise InputError(f"response format is {response_format!r}; expected an object with a type")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise InputError(f"response_format.type is {kind!r}; expected text, json_object or json_schema")
    inner = response_format.get("json_schema", response_format)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InputError(f"response_format.json_schema.schema is {schema!r}; expected a JSON schema")
    return schema


def usage_of(usage: Usage) -> dict[str, Any]:
    """OpenAI's object; predictions are the drafts of the MTP layer."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.rejected,
        },
    }


def failed(status: int, message: str) -> Event:
    """A stream's last event where it goes wrong."""
    return None, {"error": {"message": message, "type": "api_error" if status >= 500 else "invalid_request_error"}}


# ------------------------------------------------------------------------------- chat
class Chat:
    """One chat completion: pieces to chunks, or to the whole."""

    def __init__(self, service: Service, asked: ChatRequest, xrays: XRays) -> None:
        self.service, self.asked, self.xrays = service, asked, xrays
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        service.check_name(asked.model)
        self.job = self._job()
        self.replies: list[Reply] = []

    def _job(self) -> Job:
        asked, sampling = self.asked, self.asked.sampling()
        if asked.do_sample is False:
            sampling |= {"temperature": 0.0, "top_p": None}
        if asked.logprobs:
            sampling["logprobs"] = asked.top_logprobs or 0
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        return self.service.chat(
            asked.messages, asked.tools, tool_choice=asked.tool_choice, several=asked.parallel_tool_calls is not False,
            schema=schema_of(asked.response_format), effort=asked.reasoning_effort, thinking=asked.thinking,
            switches=asked.chat_template_kwargs, budget=asked.thinking_token_budget, max_tokens=most, sampling=sampling,
            stop=asked.stops(), n=1 if asked.n is None else asked.n, xray=bool(asked.xray),
        )  # fmt: skip

    def start(self) -> AsyncGenerator[Piece, None]:
        self.replies = self.service.start(self.job)
        return self.service.pieces(self.replies)

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.names[0]}

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Event, None]:
        base = self._base("chat.completion.chunk")
        more = {"usage": None} if self.asked.include_usage else {}
        for reply in self.replies:
            choice = {"index": reply.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield None, {**base, "choices": [choice], **more}
        async for piece in pieces:
            logprobs = self._logprobs(piece.logprobs)
            deltas = [_delta(delta.kind, delta.text, delta.index) for delta in piece.deltas]
            for place, delta in enumerate(deltas or ([{}] if logprobs else [])):
                choice = {"index": piece.index, "delta": delta, "finish_reason": None}
                if logprobs is not None:
                    choice["logprobs"] = logprobs if not place else None
                yield None, {**base, "choices": [choice], **more}
            if piece.finish is not None:
                self._keep(piece.index)
                choice = {"index": piece.index, "delta": {}, "finish_reason": piece.finish}
                choice["stop_reason"] = self.replies[piece.index].stopped_by
                yield None, {**base, "choices": [choice], **more}
        if self.asked.include_usage:
            yield None, {**base, "choices": [], "usage": usage_of(Usage.of(self.replies))}
        yield None, "[DONE]"

    async def whole(self) -> dict[str, Any]:
        self.replies = self.service.start(self.job)
        choices = []
        for index, pieces in enumerate(await collect(self.service, self.replies)):
            self._keep(index)
            message, calls = message_of(pieces), [logprob for piece in pieces for logprob in piece.logprobs]
            choices.append({
                "index": index, "message": message, "finish_reason": pieces[-1].finish,
                "logprobs": self._logprobs(calls), "stop_reason": self.replies[index].stopped_by,
            })  # fmt: skip
        return {**self._base("chat.completion"), "choices": choices, "usage": usage_of(Usage.of(self.replies))}

    def _keep(self, index: int) -> None:
        if index == 0:
            self.xrays.keep(self.id, self.service, self.replies[0])

    def _logprobs(self, found: Sequence[Logprobs]) -> dict[str, Any] | None:
        if not self.asked.logprobs or not found:
            return None
        return {"content": [self._logprob(each) for each in found], "refusal": None}

    def _logprob(self, found: Logprobs) -> dict[str, Any]:
        top = [self._spelled(token, logprob) for token, logprob in found.top.items()]
        return {**self._spelled(found.token, found.logprob), "top_logprobs": top}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.service.tokenizer.token_bytes(token, skip_special=False)
        return {"token": text.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(text)}


def _delta(kind: str, text: str, index: int) -> dict[str, Any]:
    """A delta in OpenAI's form; every call gets an id of its own."""
    if kind == "reasoning":
        return {"reasoning_content": text, "reasoning": text}
    if kind == "content":
        return {"content": text}
    if kind == "call":
        function = {"name": text, "arguments": ""}
        return {"tool_calls": [{"index": index, "id": call_id(), "type": "function", "function": function}]}
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def call_id() -> str:
    """A new call's id."""
    return f"call_{uuid.uuid4().hex[:24]}"


def message_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The assistant's message. Reasoning under both names in use."""
    texts, calls = {"reasoning": "", "content": ""}, list[dict[str, Any]]()
    for delta in (delta for piece in pieces for delta in piece.deltas):
        if delta.kind in ("reasoning", "content"):
            texts[delta.kind] += delta.text
        elif delta.kind == "call":
            calls.append({"id": call_id(), "type": "function", "function": {"name": delta.text, "arguments": ""}})
        else:
            calls[delta.index]["function"]["arguments"] += delta.text
    reasoning = texts["reasoning"] or None
    message = {"role": "assistant", "content": texts["content"] or (None if calls or reasoning else "")}
    message |= {"reasoning_content": reasoning, "reasoning": reasoning, "refusal": None}
    return message | ({"tool_calls": calls} if calls else {})


# ------------------------------------------------------------------------------- completions
class Completion:
    """One legacy completion, of one prompt or several."""

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self.service, self.asked = service, asked
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        service.check_name(asked.model)
        given: Any = asked.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or len(given) > 128:
            raise InputError(f"prompt has {len(given)} prompts; expected 1 to 128")
        self.prompts = [service.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in given]
        self.replies: list[Reply] = []
        self.jobs = [self._job(prompt) for prompt in self.prompts]

    def _job(self, prompt: Sequence[int]) -> Job:
        asked = self.asked
        # A test harness asks for 0 new tokens where it wants the prompt's logprobs; one is drawn and not shown.
        most = 16 if asked.max_tokens is None else max(1, asked.max_tokens)
        sampling = asked.sampling() | {"logprobs": asked.logprobs}
        if asked.echo and asked.logprobs is not None:
            sampling["prompt_logprobs"] = asked.logprobs
        params = self.service.params(len(prompt), most, sampling)
        return Job(tuple(prompt), params, raw=True, stop=asked.stops(), n=1 if asked.n is None else asked.n)

    def start(self) -> AsyncGenerator[Piece, None]:
        self.replies = self.service.start_all(self.jobs)
        return self.service.pieces(self.replies)

    def _base(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.service.names[0]}

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Event, None]:
        base, begun = self._base(), dict[int, _Offsets]()
        async for piece in pieces:
            index, reply = piece.index, self.replies[piece.index]
            if index not in begun:  # its prompt has been read
                before, logprobs, begun[index] = self._echo(reply)
                if before:
                    yield None, {**base, "choices": [self._choice(index, before, None, logprobs)]}
            text, logprobs = self._said([piece], begun[index])
            if text or logprobs or piece.finish:
                yield None, {**base, "choices": [self._choice(index, text, piece.finish, logprobs)]}
        if self.asked.include_usage:
            yield None, {**base, "choices": [], "usage": self._usage()}
        yield None, "[DONE]"

    async def whole(self) -> dict[str, Any]:
        self.replies = self.service.start_all(self.jobs)
        choices = []
        for reply, pieces in zip(self.replies, await collect(self.service, self.replies), strict=True):
            before, given, offsets = self._echo(reply)
            text, logprobs = self._said(pieces, offsets)
            choices.append(self._choice(reply.index, before + text, pieces[-1].finish, _joined(given, logprobs)))
        return {**self._base(), "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        usage = Usage.of(self.replies)
        return usage_of(usage if self.asked.max_tokens != 0 else replace(usage, completion=0))

    def _choice(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _echo(self, reply: Reply) -> tuple[str, dict[str, Any] | None, _Offsets]:
        """The prompt's text and log-probabilities, of which the first token has none; and where the reply begins."""
        tokenizer, prompt = self.service.tokenizer, reply.job.prompt
        if not self.asked.echo:
            return "", None, _Offsets(tokenizer)
        offsets, logprobs = _Offsets(tokenizer), None
        if self.asked.logprobs is not None:
            head = {"tokens": [self._text(prompt[0])], "token_logprobs": [None], "top_logprobs": [None]}
            offsets.push(prompt[0])
            rest = self._logprobs(reply.request.prompt_logprobs, offsets)
            logprobs = _joined({**head, "text_offset": [0]}, rest)
        text = tokenizer.decode(prompt)
        return text, logprobs, _Offsets(tokenizer, len(text))

    def _said(self, pieces: Sequence[Piece], offsets: _Offsets) -> tuple[str, dict[str, Any] | None]:
        """The text and log-probabilities of pieces; nothing if nothing was asked for."""
        if self.asked.max_tokens == 0:
            return "", None
        text = "".join(delta.text for piece in pieces for delta in piece.deltas)
        return text, self._logprobs([each for piece in pieces for each in piece.logprobs], offsets)

    def _logprobs(self, found: Sequence[Logprobs], offsets: _Offsets) -> dict[str, Any] | None:
        if self.asked.logprobs is None or not found:
            return None
        # The token itself is always among them, as OpenAI has it.
        tops = [{self._text(i): p for i, p in {**each.top, each.token: each.logprob}.items()} for each in found]
        return {
            "tokens": [self._text(each.token) for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": tops,
            "text_offset": [offsets.push(each.token) for each in found],
        }

    def _text(self, token: int) -> str:
        found = self.service.tokenizer.token_bytes(token, skip_special=False)
        try:
            return found.decode()
        except UnicodeDecodeError:  # as OpenAI writes parts of characters; U+FFFD for all would be one key
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class _Offsets:
    """Where in a text the characters begin that each token makes complete."""

    def __init__(self, tokenizer: Tokenizer, begin: int = 0) -> None:
        self._stream, self._at = tokenizer.stream(), begin

    def push(self, token: int) -> int:
        at = self._at
        self._at += len(self._stream.push(token))
        return at


def _joined(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    return a if b is None else b if a is None else {name: a[name] + b[name] for name in a}


def _token_id(name: str) -> int:
    if not name.isdecimal() or len(name) > 18:
        raise InputError(f"logit_bias names {name!r}; expected a token's id")
    return int(name)


# ------------------------------------------------------------------------------- routes
def router(service: Service, xrays: XRays) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(tags=["openai"], route_class=Route)

    @routes.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """A chat completion, whole or as a stream."""
        chat = await asyncio.to_thread(Chat, service, asked, xrays)
        if asked.stream:
            return await stream(request, chat.start(), chat.chunks, failed)
        return JSON(await answer(request, chat.whole()))

    @routes.post("/v1/completions", responses=STREAMED)
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """A completion of raw text or token ids."""
        completion = await asyncio.to_thread(Completion, service, asked)
        if asked.stream:
            return await stream(request, completion.start(), completion.chunks, failed)
        return JSON(await answer(request, completion.whole()))

    @routes.get("/v1/models")
    async def models() -> Response:
        """The models that are served."""
        return JSON({"object": "list", "data": [_model(service, name) for name in service.names]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them."""
        service.check_name(name)
        return JSON(_model(service, name))

    return routes


def _model(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields, and those by which Anthropic's clients know a model."""
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "nanoglm", "root": service.names[0],
        "max_model_len": service.context, "type": "model", "display_name": name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.created)),
    }  # fmt: skip
