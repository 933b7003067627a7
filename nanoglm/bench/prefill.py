"""``nanoglm bench prefill``: all-Full and IndexShare in turns over lengths, and one very long prompt whole."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from statistics import median

import torch

from nanoglm.bench.cost import Point, fit, predict, work
from nanoglm.bench.ops import INDEXER, SQUARE, Case, attending, gemm_name, pairs, products, scoring
from nanoglm.bench.result import Result, Row
from nanoglm.bench.shapes import PATTERNS, Subject, bench_nano, make, random_ids
from nanoglm.bench.timing import Parts, Progress, Sample, check_lengths, check_rounds, interleave, parts_of
from nanoglm.config import GLMConfig
from nanoglm.engine.generate import PREFILL_CHUNK
from nanoglm.memory import peak_memory


def prefill(
    lengths: tuple[int, ...], rounds: int = 5, dtype: str = "bf16", index_dtype: str | None = None,
    progress: Progress = lambda what, share: None,
) -> Result:  # fmt: skip
    """Whole prompts of each length, both patterns in turns; the speed-up beside the cost model's prediction.

    Args:
        dtype: fp32 or bf16. index_dtype: of index keys; int8 too.

    Raises:
        InputError: too few rounds, a length or dtype out of range.
    """
    check_rounds(rounds)
    check_lengths(lengths)
    config, lengths = bench_nano(), tuple(sorted(set(lengths)))
    subjects = make(config, max(lengths), dtype, index_dtype)
    result = Result("prefill", rounds, shape(config, dtype, index_dtype))
    table: list[Row] = []
    points: list[Point] = []
    for at, length in enumerate(lengths):
        ids = random_ids(config, length)
        for subject in subjects.values():
            _run(subject, ids[:PREFILL_CHUNK])  # warm
        runs: dict[str, list[Parts]] = {pattern: [] for pattern in PATTERNS}
        for turn in range(rounds):
            progress(f"{length:,} tokens", (at + turn / rounds) / len(lengths))
            for pattern in PATTERNS[:: -1 if turn % 2 else 1]:
                runs[pattern].append(_run(subjects[pattern], ids))
        table += rows(length, runs)
        points += [
            Point(subjects[p].config, length, row["seconds"]) for p, row in zip(PATTERNS, table[-2:], strict=True)
        ]
        before, after = table[-2:]
        scored = {p: work(subjects[p].config, length)[1] for p in PATTERNS}
        after["limit"] = scored["all-Full"] / scored["IndexShare"]
        after["scoring"] = before["seconds"] / (before["seconds"] - before["indexer"] * (1 - 1 / after["limit"]))
    for row in table[1::2]:
        others = [point for point in points if point.length != row["length"]]
        for terms, predicted, off in ((2, "predicted", "off"), (3, "predicted_3", "off_3")):
            if len(others) >= terms:
                constants = fit(others, terms)
                full, share = (predict(constants, subjects[p].config, row["length"]) for p in PATTERNS)
                row |= {predicted: full / share, off: full / share / row["speed_up"] - 1}
    result.rows["prefill"] = table
    if len(lengths) > 1:
        constants = fit(points)
        for row, point in zip(table, points, strict=True):
            row["model"] = predict(constants, point.config, point.length)
        result.fit = dict(zip(("us_per_token_and_layer", "ns_per_pair"), scaled(constants), strict=True))
        names = (f"{name}_of_3" for name in (*result.fit, "us_per_token_and_indexer"))
        result.fit |= dict(zip(names, scaled(fit(points, 3)), strict=True))
    return result


def scaled(constants: tuple[float, ...]) -> list[float]:
    """In µs, ns and µs."""
    return [c * unit for c, unit in zip(constants, (1e6, 1e9, 1e6), strict=False)]


def _run(subject: Subject, ids: list[int]) -> Parts:
    subject.reset()
    return parts_of(lambda: subject.feed(ids))


def rows(length: int, runs: dict[str, list[Parts]]) -> list[Row]:
    """One row a pattern: medians over the rounds."""
    table = []
    for pattern, timed in runs.items():
        total = Sample.of([parts.total for parts in timed])
        indexer, attention, rest = (
            median(getattr(p, name) for p in timed) for name in ("indexer", "attention", "rest")
        )
        table.append({
            "length": length, "pattern": pattern, "seconds": total.median, "low": total.low, "high": total.high,
            "indexer": indexer, "attention": attention, "rest": rest,
            "ratio": median(p.indexer / (p.total - p.indexer) for p in timed),
        })  # fmt: skip
    both = zip(*(runs[pattern] for pattern in PATTERNS), strict=True)
    table[1]["speed_up"] = median(full.total / share.total for full, share in both)
    return table


def shape(config: GLMConfig, dtype: str, index_dtype: str | None) -> dict[str, object]:
    """What a Result says of its model."""
    kept = {name: value for name, value in asdict(config).items() if isinstance(value, int) and name != "extra"}
    return kept | {"dtype": dtype, "index_dtype": index_dtype or dtype}


# ------------------------------------------------------------------------------- one prompt, whole
def whole(
    length: int, new_tokens: int = 64, rounds: int = 5, dtype: str = "bf16", index_dtype: str | None = None,
    progress: Progress = lambda what, share: None,
) -> Result:  # fmt: skip
    """One single IndexShare prefill of ``length`` tokens, then ``new_tokens`` more, beside what its parts allow.

    The limit of scoring and of attention is their work at the rate that the op alone reaches on the last chunk; the
    rest's is what a prompt of a single chunk takes for it, chunk for chunk. ``rounds`` are those of the limits.

    Raises:
        InputError: too few rounds, a length or dtype out of range.
    """
    check_rounds(rounds)
    check_lengths((length,), 2 * PREFILL_CHUNK)
    check_lengths((new_tokens,))
    subject = make(bench_nano(), length + new_tokens, dtype, index_dtype, PATTERNS[1:])[PATTERNS[1]]
    config, done = subject.config, 0
    ids = random_ids(config, length)
    _run(subject, ids[:PREFILL_CHUNK])
    subject.reset()
    timed = Parts(0.0, 0.0, 0.0)
    while done < length:  # a few chunks at a time, to tell how far it is
        part = ids[done : (done := done + 16 * PREFILL_CHUNK)]
        now = parts_of(partial(subject.feed, part))
        timed = Parts(*(a + b for a, b in zip(timed, now, strict=True)))
        progress(f"{min(done, length):,} tokens, {timed.total:,.0f} s", min(done, length) ** 2 / length**2)
    began = time.perf_counter()
    for token in ids[:new_tokens]:
        subject.feed([token])
    decode_seconds, peak = time.perf_counter() - began, peak_memory()

    result = Result("whole", rounds, shape(config, dtype, index_dtype))
    limits, bounds = _limits(subject, length, rounds, dtype, index_dtype or dtype, result, progress)
    measured = {"indexer": timed.indexer, "attention": timed.attention, "rest": timed.rest, "total": timed.total}
    limits["total"], bounds["total"] = sum(limits.values()), sum(bounds.values())
    result.rows["whole"] = [
        {"part": part, "seconds": seconds, "limit": limits[part], "share": limits[part] / seconds}
        for part, seconds in measured.items()
    ]
    for row in result.rows["whole"]:
        if math.isfinite(bound := bounds[row["part"]]):  # nan where this torch has no product of the dtype
            row |= {"gemm": bound, "gemm_share": bound / row["seconds"]}
    result.rows["run"] = [{
        "length": length, "seconds": timed.total, "rate": length / timed.total, "decoded": new_tokens,
        "decode_seconds": decode_seconds, "decode_rate": new_tokens / decode_seconds, "peak_gb": peak,
    }]  # fmt: skip
    return result


def amount(config: GLMConfig, length: int) -> tuple[int, int]:
    """Pairs scored and rows attended by all layers but the last, which works at one token."""
    layers, k = config.num_hidden_layers - 1, min(config.index_topk, length)
    indexers = sum(i < layers for i in config.full_layers)
    return indexers * pairs(length, length), layers * (k * length - k * (k - 1) // 2)


def _limits(
    subject: Subject, length: int, rounds: int, dtype: str, index_dtype: str, result: Result,
    progress: Progress,
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Seconds by part: at the ops' own rates, and at the rate of matrix products. The cache is full still."""
    config = subject.config
    scored, attended = amount(config, length)
    subject.reset(length)
    queries, heads, kind = PREFILL_CHUNK, config.index_n_heads, subject.dtype
    q, weights = torch.randn(queries, heads, config.index_head_dim).to(kind), torch.randn(queries, heads)
    k = min(config.index_topk, length - queries)
    attend, _ = attending(config.num_attention_heads, *subject.cache.latent(0), queries, length, k)
    cases = {case.name: case for case in products(1, result.notes)}
    runs = {name: case.run for name, case in cases.items()}
    runs["indexer"] = scoring(q, weights, subject.cache.index_keys(0), length, config.index_topk)
    runs["attention"] = attend
    with torch.no_grad():
        seconds = {name: sample.median for name, sample in interleave(runs, rounds, progress).items()}
    rest = median(_run(subject, random_ids(config, queries)).rest for _ in range(rounds))
    limits = {
        "indexer": scored * seconds["indexer"] / pairs(queries, length),
        "attention": attended * seconds["attention"] / (queries * k),
        "rest": rest * length / queries,
    }

    rates = {kind: product_rate(kind, cases, seconds) for kind in (dtype, index_dtype)}
    return limits, gemm_bounds(subject, length, rates[dtype], rates[index_dtype])


def product_rate(dtype: str, cases: dict[str, Case], seconds: dict[str, float]) -> float:
    """Operations a second of the fastest plain product of a dtype; nan where this torch has none."""
    names = [gemm_name(dtype, s) for s in (SQUARE, *INDEXER.values()) if gemm_name(dtype, s) in cases]
    return max((cases[name].work / seconds[name] for name in names), default=float("nan"))


def gemm_bounds(subject: Subject, length: int, rate: float, index_rate: float) -> dict[str, float]:
    """Seconds by part if every operation of a prefill ran at the rate of plain products, and nothing else took time."""
    config = subject.config
    scored, attended = amount(config, length)
    row = 2.0 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return {
        "indexer": scored * 2.0 * config.index_n_heads * config.index_head_dim / index_rate,
        "attention": attended * row / rate,
        # Without the last layer, which works at one token.
        "rest": 2.0 * subject.active_parameters() * (1 - 1 / config.num_hidden_layers) * length / rate,
    }
