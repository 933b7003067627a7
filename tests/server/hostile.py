"""Good requests of every endpoint, and values that fit nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chat_examples import WEATHER

from nanoglm.chat.tokenizer import ADDED_TOKENS

# ------------------------------------------------------------------------------- what is right
Body = dict[str, Any]
TOOL = {"type": "function", "function": WEATHER}
USER = {"role": "user", "content": "Weather?"}
TALK = [
    {"role": "system", "content": "Be brief."}, USER,
    {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
    {"role": "tool", "tool_call_id": "c", "content": "18C"},
    {"role": "user", "content": [{"type": "text", "text": "?"}]},
]  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1]}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
FEW: Body = {"max_tokens": 6, "seed": 1}
POSTS: Sequence[tuple[str, Body]] = (
    ("/v1/chat/completions", {**FEW, "messages": TALK, "tools": [TOOL], "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**FEW, "messages": [USER], "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"max_tokens": 60, "messages": [USER], "response_format": FORMAT, "n": 2}),
    ("/v1/chat/completions", {
        "max_tokens": 60, "messages": [USER], "tools": [TOOL], "tool_choice": "required", "stream": True,
        "thinking": {"type": "disabled"}, "stop": ["x", "yz"]}),
    ("/v1/chat/completions", {
        **FEW, "messages": [USER], "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "min_tokens": 2,
        "repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1, "logit_bias": {"7": 1.5},
        "reasoning_effort": "high", "chat_template_kwargs": {"clear_thinking": False}, "thinking_token_budget": 3,
        "xray": True, "model": "tiny"}),
    ("/v1/completions", {**FEW, "prompt": "Once", "echo": True, "logprobs": 2}),
    ("/v1/completions", {**FEW, "prompt": ["a", "b"], "n": 2, "stream": True}),
    ("/v1/completions", {**FEW, "prompt": [[1, 2, 3], [4]], "stop": "q"}),
    ("/v1/responses", {"max_output_tokens": 6, "input": "Hi", "instructions": "Be brief.", "metadata": {"k": "v"}}),
    ("/v1/responses", {
        "max_output_tokens": 6, "stream": True, "tools": [{"type": "function", **WEATHER}], "tool_choice": "auto",
        "reasoning": {"effort": "low"}, "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "18C"}]}),
    ("/v1/responses", {
        "max_output_tokens": 60, "input": "Hi", "text": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    ("/v1/messages", {
        "model": "tiny", "max_tokens": 6, "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "get_weather", "description": "d", "input_schema": WEATHER["parameters"]}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "text", "text": "So."},
                {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Paris"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "18C"}]},
                {"type": "text", "text": "?"}]}]}),
    ("/v1/messages", {
        "model": "tiny", "max_tokens": 60, "stream": True, "stop_sequences": ["x"], "tool_choice": {"type": "any"},
        "tools": [{"name": "f", "input_schema": SCHEMA}], "messages": [{"role": "user", "content": "Hi"}],
        "thinking": {"type": "enabled", "budget_tokens": 4}, "temperature": 1, "top_k": 5}),
    ("/v1/messages/count_tokens", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "system": "s"}),
    ("/tokenize", {"prompt": "Hi <|user|>", "return_token_strs": True}),
    ("/tokenize", {"messages": TALK, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}),
    ("/detokenize", {"tokens": [1, 2, 300]}),
)  # fmt: skip
GETS = (
    "/v1/models", "/v1/models/tiny", "/v1/models/{}", "/v1/responses/{}", "/xray/{}", "/xray/{}/{}", "/metrics",
    "/xray/{}/heat?layer={}&bins={}", "/health", "/version", "/", "/page.js", "/{}", "/openapi.json", "/v1/{}?{}={}",
)  # fmt: skip


# ------------------------------------------------------------------------------- what is wrong
def nested(depth: int, inner: Any = 0, key: str | None = None) -> Any:
    for _ in range(depth):
        inner = [inner] if key is None else {key: inner}
    return inner


JINJA = (
    "{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{%", "{{ raise_exception('x') }}", "{# ", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os }}",
)  # fmt: skip
TEXTS = (
    "", " ", "x", "\x00", "\ud800", "a\udfffb", "\ufeff", "\u202e", "\r\n\r\ndata: [DONE]\n\n", "é中😀", "x" * 5000,
    "<" * 3000, *JINJA, *ADDED_TOKENS[:12], *ADDED_TOKENS[21:31], "<think>a</think>b", "</think><|assistant|>",
    "<tool_call>get_weather<arg_key>city</arg_key><arg_value>x</arg_value></tool_call>", "../../etc/passwd",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 0.5, -0.0, 128, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 1e308, -1e308, 5e-324, 1e-30,
)  # fmt: skip
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e400",
    "0x10",
    "01",
    "1_0",
    "'x'",
    "undefined",
    "1" * 5000,
    "[" * 9000,
)
LONG = "^" + "(a|b)*" * 3 + "a(a|b){%d}$"
SCHEMAS: Sequence[Any] = (
    {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"$ref": "http://127.0.0.1:1/x"},
    {"$ref": "#/$defs/a0", "$defs": {
        **{f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}, "a30": {"type": "string"}}},
    {"type": "array", "items": {"$ref": "#"}}, {"type": "string", "minLength": 10**9},
    {"type": "string", "minLength": 40},
    {"type": "string", "maxLength": 10**12}, {"type": "array", "minItems": 10**9}, {"type": "array", "maxItems": -1},
    {"type": "string", "pattern": LONG % 1000}, {"type": "string", "pattern": "(?=a)b\\1"}, {"pattern": "(" * 500},
    {"type": "string", "pattern": "^((.{0,1000}){0,1000}){0,1000}$"}, {"type": "string", "pattern": "a|" * 20_000},
    {"allOf": [{"type": "string", "pattern": f"a{i}b"} for i in range(50)]}, {"not": {}},
    {"type": "number", "multipleOf": 0},
    {"enum": list(range(3000))}, {"enum": []}, {"const": {"a": [1e308, None, "\ud800"]}}, {"type": "x"},
    {"type": ["string", 5]},
    {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}, {"properties": []}, {"required": 5},
    {"type": "object", "properties": {"a": 5}}, {"anyOf": 5}, {"anyOf": [5]}, {"items": [True, False]}, {"$defs": 1},
    {"type": "object", "properties": {"\ud800": {}, '"': {}, "\n": {}, "</arg_key>": {}}, "required": ["\ud800", '"']},
    {"type": "object", "required": ["q", "w"]}, {"type": "integer", "minimum": 1e308, "maximum": -1e308},
    {"minLength": "1}/"},
    nested(60, {"type": "string"}, "items"), nested(200, {"type": "string"}, "not"),
    {"type": "string", "format": "regex"},
)  # fmt: skip
VALUES: Sequence[Any] = (
    None, True, False, [], {}, [[]], [None], [{}], {"": ""}, {"type": "x"}, ["a", 1, None], nested(50), nested(400),
    nested(700, key="a"), {"type": "image"}, [{"type": "text"}], [1] * 3000, ["x"] * 300, [[1]] * 200,
    {str(i): i for i in range(900)},
    "auto", "none", "required", "high", "json_object", {"type": "function", "function": {"name": "get_weather"}},
)  # fmt: skip
TYPES = (
    None, "text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded",
    "application/vnd.api+json",
    "multipart/form-data; boundary=x", "multipart/form-data", "application/xml", "application/json\xff", ";", "json",
)  # fmt: skip
METHODS = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")
