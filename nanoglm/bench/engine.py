"""``nanoglm bench engine``: tokens a second, waiting times and acceptance, by how many requests come at once.

Each way of running, the plain loop included, answers the same requests in turns within one process. Prompts are
stretches of what the model itself says after ``BEGINNING``, so that drafts meet what they would meet in use, and no
file is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Literal

from nanoglm.api import Model
from nanoglm.bench.result import Result, Row
from nanoglm.bench.timing import Progress, Sample, check_rounds
from nanoglm.cache import PAGE
from nanoglm.engine import Engine, SamplingParams, generate
from nanoglm.engine.request import accepted_length
from nanoglm.errors import InputError

BEGINNING = "It was a dark evening in November, and"
WAYS: dict[str, int | Literal["auto"] | None] = {
    "plain loop": None, "engine": 0, "1 draft": 1, "3 drafts": 3, "5 drafts": 5, "auto": "auto",
}  # fmt: skip


def bench_engine(
    model: Model, requests: tuple[int, ...] = (1, 2, 4, 8), prompt: int = 64, tokens: int = 64,
    temperature: float = 0.0, rounds: int = 7, progress: Progress = lambda what, share: None,
) -> Result:  # fmt: skip
    """Rows by number of requests and way.

    Raises:
        InputError: too few rounds, a number out of range, or requests that the model's positions do not hold.
    """
    check_rounds(rounds)
    for name, value in (("requests", min(requests, default=0)), ("prompt", prompt), ("tokens", tokens)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    ids = model.tokenizer.encode(BEGINNING)
    own = max(requests) * prompt // 4 + prompt
    ids += generate(model.module, ids, SamplingParams(own, 0.8))
    prompts = [ids[begin : begin + prompt] for begin in range(0, len(ids) - prompt + 1, max(1, prompt // 4))]
    ways = {name: drafts for name, drafts in WAYS.items() if not drafts or model.config.num_nextn_predict_layers}
    result = Result("engine", rounds, {"prompt": prompt, "tokens": tokens, "temperature": temperature})
    found: dict[tuple[int, str], list[Row]] = {}
    for turn in range(rounds + 1):  # the first is to warm up
        for at, n in enumerate(requests):
            params = [SamplingParams(tokens, temperature, seed=i) for i in range(n)]
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                progress(f"{n} requests, {name}", (turn + at / len(requests)) / (rounds + 1))
                drafts, asked = ways[name], prompts[:n]
                row = _plain(model, asked, params) if drafts is None else _engine(model, asked, params, drafts)
                if turn:
                    found.setdefault((n, name), []).append(row)
    result.rows["engine"] = [_row(found, n, name) for n in requests for name in ways]
    return result


def _plain(model: Model, prompts: list[list[int]], params: list[SamplingParams]) -> Row:
    """One request after another."""

    def run(tell: Callable[[int], None]) -> None:
        for which, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            for _ in generate(model.module, prompt, each):
                tell(which)

    return _timed(run)


def _engine(model: Model, prompts: list[list[int]], params: list[SamplingParams], drafts: int | Literal["auto"]) -> Row:
    pages = sum(-(-(len(p) + s.max_tokens) // PAGE) for p, s in zip(prompts, params, strict=True))
    engine = Engine(model.module, pages=pages, drafts=drafts, prefix=False)
    requests = [engine.add(p, s) for p, s in zip(prompts, params, strict=True)]
    where = {request: i for i, request in enumerate(requests)}

    def run(tell: Callable[[int], None]) -> None:
        while engine.busy:
            for request, tokens in engine.step():
                for _ in tokens:
                    tell(where[request])

    return _timed(run) | {"accepted": accepted_length(requests) if drafts else None}


def _timed(run: Callable[[Callable[[int], None]], None]) -> Row:
    """Seconds in all, to each request's first token, and between two of its tokens."""
    began, came = time.perf_counter(), dict[int, list[float]]()
    run(lambda which: came.setdefault(which, []).append(time.perf_counter() - began))
    firsts = [times[0] for times in came.values()]
    between = [(times[-1] - times[0]) / (len(times) - 1) for times in came.values() if len(times) > 1]
    seconds = time.perf_counter() - began
    count = sum(map(len, came.values()))
    return {"seconds": seconds, "count": count, "first": median(firsts), "between": median(between or [0.0])}


def _row(found: dict[tuple[int, str], list[Row]], n: int, name: str) -> Row:
    runs = found[n, name]
    rates = {way: [row["count"] / row["seconds"] for row in found[n, way]] for way in (name, "engine", "plain loop")}
    over = {way: median(a / b for a, b in zip(rates[name], rates[way], strict=True)) for way in rates}
    rate, accepted = Sample.of(rates[name]), [row["accepted"] for row in runs if row.get("accepted")]
    return {
        "requests": n, "way": name, "rate": rate.median, "low": rate.low, "high": rate.high,
        "first": 1e3 * median(row["first"] for row in runs), "between": 1e3 * median(row["between"] for row in runs),
        "accepted": median(accepted) if accepted else None, "gain": over["engine"], "plain": over["plain loop"],
    }  # fmt: skip
