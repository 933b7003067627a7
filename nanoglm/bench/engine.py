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

import torch

from nanoglm.api import Model
from nanoglm.bench.result import Result, Row
from nanoglm.bench.timing import Progress, Sample, check_lengths, check_rounds, seconds_of
from nanoglm.cache import PAGE, PagedCache
from nanoglm.engine import Engine, SamplingParams, generate
from nanoglm.engine.engine import MOST_DRAFTS
from nanoglm.engine.request import accepted_length
from nanoglm.errors import InputError
from nanoglm.model.step import Pass

BEGINNING = "It was a dark evening in November, and"
TRIES = 9  # of a step, each after one without drafts
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
    ids = own_text(model, max(requests) * prompt // 4 + prompt)
    prompts = [ids[begin : begin + prompt] for begin in range(0, len(ids) - prompt + 1, max(1, prompt // 4))]
    ways = {name: drafts for name, drafts in WAYS.items() if not drafts or model.config.num_nextn_predict_layers}
    result = Result("engine", rounds, {"prompt": prompt, "tokens": tokens, "temperature": temperature})
    found: dict[tuple[int, str], list[Row]] = {}
    for turn in range(rounds + 1):  # the first is to warm up
        for at, n in enumerate(requests):
            costs = Costs(model, prompts[0], tokens // 2) if n == 1 else None
            params = [SamplingParams(tokens, temperature, seed=i) for i in range(n)]
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                progress(f"{n} requests, {name}", (turn + at / len(requests)) / (rounds + 1))
                drafts, asked = ways[name], prompts[:n]
                row = _plain(model, asked, params) if drafts is None else _engine(model, asked, params, drafts)
                if costs is not None and isinstance(drafts, int) and drafts:
                    row["ideal"] = row["accepted"] / costs.of(drafts, round(row["accepted"]))
                if turn:
                    found.setdefault((n, name), []).append(row)
    result.rows["engine"] = [_row(found, n, name) for n in requests for name in ways]
    return result


def own_text(model: Model, tokens: int) -> list[int]:
    """So many at least, drawn behind BEGINNING."""
    ids = model.tokenizer.encode(BEGINNING)
    drafts: Literal["auto", 0] = "auto" if model.config.num_nextn_predict_layers else 0
    engine = Engine(model.module, pages=-(-(len(ids) + tokens) // PAGE), drafts=drafts, prefix=False)
    return [*ids, *engine.generate(ids, SamplingParams(tokens, 0.8))]


def bench_prefix(
    model: Model, shared: int = 16_384, rounds: int = 3, progress: Progress = lambda what, share: None
) -> Result:
    """A second request that begins like the first: time to its first token, with and without the prefix cache.

    Raises:
        InputError: too few rounds, or a length that the model's positions do not hold.
    """
    check_rounds(rounds)
    check_lengths((shared,), PAGE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (shared + 2 * PAGE,), generator=generator).tolist()
    prompts, drafts = (ids[: shared + PAGE], ids[:shared] + ids[-PAGE:]), int(model.config.num_nextn_predict_layers > 0)
    seconds, hits = {"yes": list[list[float]](), "no": list[list[float]]()}, dict[str, int]()
    for turn in range(rounds):
        for i, (kept, found) in enumerate(list(seconds.items())[:: -1 if turn % 2 else 1]):
            progress(f"prefix cache: {kept}", (turn + i / 2) / rounds)
            pages = shared // PAGE + 8
            engine = Engine(model.module, pages=pages, drafts=drafts, prefix=kept == "yes")
            found.append([])
            for prompt in prompts:
                began, request = time.perf_counter(), engine.add(prompt, SamplingParams(1))
                while engine.busy:
                    engine.step()
                found[-1].append(time.perf_counter() - began)
            hits[kept] = request.hit
    result = Result("prefix", rounds, {"parameters": sum(p.numel() for p in model.module.parameters())})
    for kept, found in seconds.items():
        first, second = (1e3 * median(pair[i] for pair in found) for i in range(2))
        share = median(b / a for a, b in found)
        row = {"kept": kept, "shared": shared, "hit": hits[kept], "first": first, "second": second, "share": share}
        result.rows.setdefault("prefix", []).append(row)
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


class Costs:
    """What a step with drafts costs of one without, by the model's passes alone: c_verify + k c_draft."""

    def __init__(self, model: Model, prompt: list[int], more: int) -> None:
        self.model, weight = model.module, model.module.lm_head.weight
        self.ids = torch.tensor([*prompt, *prompt * (more // len(prompt) + 1)][: len(prompt) + more])
        self.cache = PagedCache(model.config, -(-(len(self.ids) + MOST_DRAFTS + 1) // PAGE), dtype=weight.dtype)
        self.handle = self.cache.open()
        output = self.model(self.ids, self.cache.extend([self.handle], [len(self.ids)]), self.cache)
        self.model.draft(self.ids, output.hidden, output.step)

    @torch.no_grad()
    def of(self, drafts: int, accepted: int) -> float:
        """Of a chain of ``drafts``, behind a verification that gave ``accepted`` tokens."""

        def step() -> None:
            self._main(drafts + 1)
            self._chain(accepted, drafts)

        seconds = [(seconds_of(step), seconds_of(lambda: self._main(1))) for _ in range(TRIES)]
        return median(drafting / plain for drafting, plain in seconds)

    def _main(self, rows: int) -> None:
        """The main model's pass over ``rows`` tokens, which are taken back."""
        batch = self.cache.extend([self.handle], [rows])
        self.model.logits(self.model(self.ids[:rows], batch, self.cache).hidden)
        self.cache.rollback(self.handle, rows)

    def _chain(self, rows: int, drafts: int) -> None:
        """The MTP layer's: entries of the last ``rows`` tokens, then draft by draft from the last one."""
        batch = self.cache.last([self.handle], [rows])
        step = Pass(batch, self.model.rotary(batch.positions), self.cache)
        hidden = self.model.model.embed_tokens(self.ids[:rows])
        hidden, selection = self.model.draft(self.ids[:rows], hidden, step)
        step, last = step.tail([1])
        hidden, selection = hidden[last], None if selection is None else selection[last]
        for place in range(drafts):
            if place:
                hidden, selection = self.model.draft(self.ids[:1], hidden, step, depth=place, selection=selection)
            self.model.logits(hidden)


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
    decoding = [a["between"] / b["between"] for a, b in zip(found[n, "engine"], runs, strict=True)]
    ideal = [gain / row["ideal"] for gain, row in zip(decoding, runs, strict=True) if "ideal" in row]
    return {
        "requests": n, "way": name, "rate": rate.median, "low": rate.low, "high": rate.high,
        "first": 1e3 * median(row["first"] for row in runs), "between": 1e3 * median(row["between"] for row in runs),
        "accepted": median(accepted) if accepted else None, "gain": over["engine"], "plain": over["plain loop"],
        "ideal": median(ideal) if ideal else None,
    }  # fmt: skip
