"""Many streams at once over every interface, some of whose clients leave; and what must hold afterwards.

python tests/server/load.py URL --seconds 300 --streams 64 --leave 0.2 [--pid SERVER]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

TOOL = {"name": "calculator", "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}, "required": ["n", "s"]}


@dataclass
class Seen:
    """What clients saw.

    Attributes:
        ended: streams by how they ended. tokens: that usage said of finished ones, by interface. wrong: what must not
            be. replies: that were asked for. memory: of the server, in MB, with seconds.
    """

    ended: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    replies: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)


def drawn(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body that streams."""
    text = "What is " + "+".join(str(draw.randrange(100)) for _ in range(draw.randrange(2, 30))) + "?"
    most, messages = draw.randrange(8, 120), [{"role": "user", "content": text}]
    common = {"stream": True, "temperature": draw.choice([0.0, 1.0])}
    kind = draw.randrange(6)
    if kind == 0:
        return "/v1/completions", common | {
            "prompt": text, "max_tokens": most, "stream_options": {"include_usage": True}, "n": draw.choice([1, 2]),
        }  # fmt: skip
    if kind == 1:
        return "/v1/messages", common | {
            "model": "", "max_tokens": most, "messages": messages,
            "tools": [TOOL | {"input_schema": TOOL["parameters"]}],
            "thinking": {"type": "enabled", "budget_tokens": draw.randrange(40)},
        }  # fmt: skip
    if kind == 2:
        return "/v1/responses", common | {"input": text, "max_output_tokens": most}
    chat = common | {"messages": messages, "max_tokens": most, "stream_options": {"include_usage": True}}
    more: list[dict[str, Any]] = [
        {"n": 2, "reasoning_effort": draw.choice(["none", "high", "max"])},
        {"tools": [{"type": "function", "function": TOOL}], "tool_choice": draw.choice(["auto", "required"])},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ]
    return "/v1/chat/completions", chat | more[kind - 3] | {"max_tokens": max(most, 80)}


def data_of(text: str) -> list[Any]:
    """A stream's events. Raises ValueError where one is no JSON, or not whole."""
    if not text.endswith("\n\n"):
        raise ValueError("ends within an event")
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def tokens_of(path: str, events: list[Any]) -> int:
    """Tokens by the usage of a finished stream. Raises ValueError if it is no whole stream of its interface."""
    if path == "/v1/messages":
        kinds = [event["type"] for event in events]
        starts, stops = kinds.count("content_block_start"), kinds.count("content_block_stop")
        if kinds[0] != "message_start" or kinds[-2:] != ["message_delta", "message_stop"] or starts != stops:
            raise ValueError(f"order of events: {kinds[:3]} ... {kinds[-3:]}")
        return int(events[-2]["usage"]["output_tokens"])
    if path == "/v1/responses":
        if events[-1]["type"] not in ("response.completed", "response.incomplete"):
            raise ValueError(f"ends with {events[-1]}")
        if [event["sequence_number"] for event in events] != list(range(len(events))):
            raise ValueError("events are not numbered through")
        return int(events[-1]["response"]["usage"]["output_tokens"])
    if events[-1] != "[DONE]" or events[-2]["choices"]:
        raise ValueError(f"ends with {events[-2:]}")
    return int(events[-2]["usage"]["completion_tokens"])


async def stream(client: httpx.AsyncClient, name: str, draw: random.Random, leave: bool, seen: Seen) -> None:
    """One request, to its end or until its client leaves."""
    path, body = drawn(draw)
    if "model" in body:
        body["model"] = name
    seen.replies += body.get("n", 1)
    after, text = draw.randrange(1, 4000) if leave else None, ""
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                seen.wrong.append(f"{path} {answer.status_code}: {(await answer.aread())[:300]!r}")
                return
            async for piece in answer.aiter_text():
                text += piece
                if after is not None and len(text) >= after:
                    seen.ended["left"] += body.get("n", 1)
                    return
        seen.tokens[path] += tokens_of(path, data_of(text))
        seen.ended["finished"] += body.get("n", 1)
    except (ValueError, KeyError, IndexError, httpx.HTTPError) as error:
        seen.wrong.append(f"{path} {body}: {error!r}; ... {text[-300:]!r}")


async def load(
    url: str, *, seconds: float, streams: int = 64, leave: float = 0.2, seed: int = 0, pid: int | None = None
) -> Seen:  # fmt: skip
    """Keeps so many streams going for so long."""
    seen, began = Seen(), time.monotonic()

    async def client_of(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() - began < seconds:
            await stream(client, name, draw, draw.random() < leave, seen)

    async def watch() -> None:
        while pid is not None:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            seen.memory.append((time.monotonic() - began, pages * 4096 / 1e6))
            await asyncio.sleep(0.5)

    limits = httpx.Limits(max_connections=streams + 8)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client_of(number) for number in range(streams)))
        watching.cancel()
    return seen


def metrics(url: str) -> dict[str, float]:
    """The server's figures by name and labels but the model's, summed over the reasons that requests ended for."""
    found: Counter[str] = Counter()
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if matched := re.fullmatch(r"vllm:(\w+)\{(.*)\} (\S+)", line):
            reason = re.search(r'finished_reason="(\w+)"', matched[2])
            found[matched[1] + (f" {reason[1]}" if reason else "")] += float(matched[3])
    return dict(found)


def growth(seen: Seen) -> float:
    """The last third's median memory against that of the second: the first warms up."""
    end = seen.memory[-1][0]
    thirds = [[mb for at, mb in seen.memory if end * i / 3 <= at <= end * (i + 1) / 3] for i in (1, 2)]
    return statistics.median(thirds[1]) / statistics.median(thirds[0]) - 1


def check(url: str, seen: Seen, before: dict[str, float]) -> list[str]:
    """What does not hold, in sentences; the server is idle or soon will be."""
    for _ in range(100):
        now = metrics(url)
        if now["num_requests_running"] == now["num_requests_waiting"] == 0:
            break
        time.sleep(0.1)
    gained = {name: value - before.get(name, 0) for name, value in now.items()}
    ended = {name.split()[1]: n for name, n in gained.items() if name.startswith("request_success_total ") and n}
    wrong = list(seen.wrong)
    if now["num_requests_running"] or now["num_requests_waiting"]:
        wrong.append(f"{now['num_requests_running']} requests run though nobody listens")
    if sum(ended.values()) != seen.replies:
        wrong.append(f"{ended} requests ended; expected {seen.replies}")
    if not ended.get("abort", 0) <= seen.ended["left"]:
        wrong.append(f"{ended} were aborted; expected at most {seen.ended['left']}, whose clients left")
    if gained["generation_tokens_total"] < sum(seen.tokens.values()):
        wrong.append(
            f"{gained['generation_tokens_total']} tokens counted; expected {sum(seen.tokens.values())} and more"
        )
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--leave", type=float, default=0.2)
    parser.add_argument("--pid", type=int)
    asked = parser.parse_args()
    first = metrics(asked.url)
    result = asyncio.run(
        load(asked.url, seconds=asked.seconds, streams=asked.streams, leave=asked.leave, pid=asked.pid)
    )
    bad = check(asked.url, result, first)
    print(dict(result.ended), dict(result.tokens), f"{len(bad)} wrong")
    if result.memory:
        print(
            f"memory {growth(result):+.1%} from the second third to the last, {result.memory[-1][1]:.0f} MB at the end"
        )
    print("\n".join(bad[:20]))
    raise SystemExit(bool(bad))
