"""``nanoglm bench ops``: each op as a share of the fastest library routine of its kind, on the same threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoglm import ops
from nanoglm.bench.prototype import Prototype
from nanoglm.bench.result import Result, Row
from nanoglm.bench.timing import Progress, Sample, check_rounds, interleave
from nanoglm.cache import PAGE
from nanoglm.errors import InputError
from nanoglm.ops import Batch, cpu

FLOPS, BYTES = "GFLOP/s", "GB/s"
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


class Case(NamedTuple):
    """Something to time. ``work``: operations or bytes of one call. ``limits``: names of ceilings."""

    name: str
    run: Callable[[], Tensor]
    work: float
    unit: str = FLOPS
    limits: tuple[str, ...] = ()
    peer: Callable[[], Tensor] | None = None


def bench_ops(
    rounds: int = 5, prototype: Path | None = None, shrink: int = 1, progress: Progress = lambda what, share: None
) -> Result:
    """Ceilings and ops, all in turns.

    Args:
        rounds: at least 3. prototype: a folder with a rival's dsa_cpu.cpp. shrink: divides lengths (the dims stay);
            figures are then of no use but come fast.

    Raises:
        InputError: too few rounds, or a prototype that cannot be built.
    """
    check_rounds(rounds)
    if not 1 <= shrink <= 32:
        raise InputError(f"shrink is {shrink}; expected 1 to 32")
    torch.manual_seed(0)
    result = Result("ops", rounds)
    if shrink > 1:
        result.notes.append(f"anything of use: sizes are divided by {shrink}")
    rival = None if prototype is None else Prototype(prototype)
    gemms, read = list(products(shrink, result.notes)), reading((1 << 30) // shrink)
    limits = [*gemms, read]
    cases = [
        *indexers(shrink, rival, result.notes), *instruction_sets(shrink), *attentions(shrink, rival), *experts(shrink)
    ]  # fmt: skip
    # The memory is timed next to the last case, which it binds: its speed drifts from second to second.
    runs = {case.name: case.run for case in (*gemms, *cases, read)}
    runs |= {f"peer: {case.name}": case.peer for case in cases if case.peer is not None}
    with torch.no_grad():
        samples = interleave(runs, rounds, progress)
    rates = {case.name: case.work / samples[case.name].median / 1e9 for case in limits}
    result.rows["ceilings"] = [_row(case, samples[case.name]) for case in limits]
    result.rows["ops"] = [_row(case, samples[case.name]) for case in cases]
    for case, row in zip(cases, result.rows["ops"], strict=True):
        at_hand = [name for name in case.limits if name in rates]
        if at_hand:
            best = max(at_hand, key=lambda name: rates[name])
            row |= {"limit": best, "limit_rate": rates[best], "share": row["rate"] / rates[best]}
        if case.peer is not None:
            peer = samples[f"peer: {case.name}"].median
            row |= {"peer_ms": peer * 1e3, "times": peer * 1e3 / row["ms"]}
            row["differs"] = difference(case.run(), case.peer())
    return result


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Of Selections the share of positions that the other lacks, else the norm of the difference, relative."""
    if ours.dtype.is_floating_point:
        return float((ours.float() - theirs.float()).norm() / ours.float().norm())
    both = torch.cat([ours, theirs], 1).sort(1).values  # a row holds no position twice, so equal neighbours are shared
    chosen = both >= 0
    shared = (both.diff(dim=1) == 0) & chosen[:, 1:]
    return 1 - 2 * int(shared.sum()) / int(chosen.sum())


def _row(case: Case, sample: Sample) -> Row:
    ms, low, high = (seconds * 1e3 for seconds in sample)
    return {"name": case.name, "ms": ms, "low": low, "high": high, "rate": case.work / ms / 1e6, "unit": case.unit}


# ------------------------------------------------------------------------------- ceilings
SQUARE, READ = (2048, 2048, 2048), "read bandwidth"
INDEXER = {64: (512, 4096, 64), 128: (512, 4096, 128)}  # by dim: 128 queries of 4 heads against 4,096 keys


def gemm_name(kind: str, shape: tuple[int, int, int]) -> str:
    return f"{kind} mm {'x'.join(map(str, shape))}"


def products(shrink: int, notes: list[str]) -> Iterator[Case]:
    """Matrix products of each dtype. The int8 product is of u8 by s8, as processors have it."""
    for shape in (SQUARE, *INDEXER.values()):
        rows, columns, depth = shape[0] // min(shrink, 16), shape[1] // min(shrink, 16), shape[2]
        for kind, make in (("fp32", _mm), ("bf16", _mm), ("int8", _mm_int8)):
            try:
                run = make(kind, rows, columns, depth)
            except RuntimeError as error:
                notes.append(f"no ceiling {gemm_name(kind, shape)}: {str(error).splitlines()[0]}")
            else:
                yield Case(gemm_name(kind, shape), run, 2.0 * rows * columns * depth)


def reading(size: int) -> Case:
    """The sum of ``size`` bytes."""
    values = torch.ones(size // 8, dtype=torch.int64)
    return Case(READ, values.sum, values.nbytes, BYTES)


def _mm(kind: str, rows: int, columns: int, depth: int) -> Callable[[], Tensor]:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype).t()
    out = torch.empty(rows, columns, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def _mm_int8(kind: str, rows: int, columns: int, depth: int) -> Callable[[], Tensor]:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to drop these types, not the product
            weight = torch.quantize_per_tensor(torch.randn(columns, depth), 0.05, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(weight, None)
            x = torch.quantize_per_tensor(torch.randn(rows, depth), 0.05, 64, torch.quint8)
    finally:
        torch.backends.quantized.engine = engine
    return lambda: torch.ops.quantized.linear(x, packed, 1.0, 64)


# ------------------------------------------------------------------------------- ops
class IndexerShape(NamedTuple):
    heads: int
    dim: int
    k: int
    queries: int
    keys: int


def indexers(shrink: int, rival: Prototype | None, notes: list[str]) -> Iterator[Case]:
    """Scoring and top-k of a prompt's last queries: the small shape, and GLM-5.2's own."""
    fp32, bf16, int8 = KINDS
    for shape, dtypes in (
        (IndexerShape(4, 64, 512, 2048, 131_072), (fp32, bf16, int8)),
        (IndexerShape(32, 128, 2048, 512, 16_384), (bf16, int8)),
    ):
        queries, keys = max(16, shape.queries // shrink), max(256, shape.keys // shrink // PAGE * PAGE)
        shape = shape._replace(queries=queries, keys=keys)
        q, weights = torch.randn(queries, shape.heads, shape.dim), torch.randn(queries, shape.heads)
        values = torch.randn(keys, shape.dim)
        for dtype in dtypes:
            kind = KINDS[dtype]
            name = f"indexer {shape.heads}x{shape.dim}, top {shape.k}, {queries} of {keys}, {kind}"
            try:
                pool = ops.index_pool(keys // PAGE, PAGE, shape.dim, dtype)
            except (InputError, RuntimeError) as error:
                notes.append(f"no row {name}: {error}")
                continue
            ops.index_append(pool, values, torch.arange(keys))
            run = scoring(q if dtype is fp32 else q.to(bf16), weights, pool, keys, shape.k)
            limits = gemm_name(kind, SQUARE), gemm_name(kind, INDEXER[shape.dim])
            peer = (
                rival.indexer(q.to(bf16).float(), weights, values, shape.k, kind)
                if rival and dtype is not fp32
                else None
            )
            yield Case(name, run, 2.0 * shape.heads * shape.dim * pairs(queries, keys), FLOPS, limits, peer)


def pairs(queries: int, keys: int) -> int:
    """Visible pairs of the last ``queries`` of ``keys`` tokens."""
    return queries * keys - queries * (queries - 1) // 2


def last_rows(queries: int, keys: int) -> Batch:
    """The last ``queries`` of one request of ``keys`` tokens, its pages in order."""
    return Batch.build([queries], [keys], torch.arange(-(-keys // PAGE), dtype=torch.int32)[None], PAGE)


def scoring(q: Tensor, weights: Tensor, pool: Tensor, keys: int, k: int) -> Callable[[], Tensor]:
    batch = last_rows(q.shape[0], keys)
    return lambda: ops.select(q, weights, pool, batch, k)


def instruction_sets(shrink: int) -> Iterator[Case]:
    """The other libraries built here, on fp32 scoring: slower processors get one of them."""
    queries, length = max(16, 512 // shrink), max(512, 131_072 // shrink)
    q, weights, keys = torch.randn(queries, 4, 64), torch.randn(queries, 4), torch.randn(length, 64)
    batch, packed, best = last_rows(queries, length), cpu.pack(keys), cpu.best()

    def run(lib: cpu.Library) -> Callable[[], Tensor]:
        return lambda: lib.select(q, weights, packed, batch.table, batch.borders, batch.lengths, 512)

    for lib in map(cpu.library, cpu.SETS):
        if isinstance(lib, cpu.Library) and lib != best:
            name, work = f"indexer 4x64, top 512, {queries} of {length}, fp32, {lib.name}", 2.0 * 4 * 64
            yield Case(name, run(lib), work * pairs(queries, length), FLOPS, (gemm_name("fp32", SQUARE),))


def random_selection(queries: int, rows: int, k: int) -> Tensor:
    """int32 [queries, k], ascending: one row drawn from each of k equal stretches, so none comes twice."""
    stretch = (rows - queries) // k
    return (torch.arange(k) * stretch + torch.randint(stretch, (queries, k))).int()


def attending(
    heads: int, latent: Tensor, rope: Tensor, queries: int, rows: int, k: int
) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """Sparse attention of the last queries to rows drawn at random; and its inputs."""
    c, r = latent.shape[1], rope.shape[1]
    given = {
        "q_latent": torch.randn(queries, heads, c).to(latent.dtype),
        "q_rope": torch.randn(queries, heads, r).to(latent.dtype),
        "latent": latent, "rope": rope, "selection": random_selection(queries, rows, k),
        "batch": last_rows(queries, rows), "scale": (c + r) ** -0.5,
    }  # fmt: skip
    return lambda: ops.sparse_attention(*given.values()), given


def attentions(shrink: int, rival: Prototype | None) -> Iterator[Case]:
    """bench-nano's shape and GLM-5.2's, bf16."""
    for heads, c, r, k, queries, rows in ((8, 64, 32, 512, 2048, 65_536), (64, 512, 64, 2048, 256, 16_384)):
        queries, rows, k = max(8, queries // shrink), rows // shrink, max(8, k // shrink)
        latent, rope = torch.randn(rows, c + r).bfloat16().split([c, r], 1)  # as a cache keeps them
        run, given = attending(heads, latent, rope, queries, rows, k)
        yield Case(
            f"attention {heads} heads, {c}+{r}, k {k}, {queries} of {rows}, bf16", run,
            2.0 * queries * k * heads * (2 * c + r), FLOPS, (gemm_name("bf16", SQUARE),),
            rival.attention(given) if rival else None,
        )  # fmt: skip


def experts(shrink: int) -> Iterator[Case]:
    """Prefill of 2,048 tokens at two widths against the product, decoding one token against the memory."""
    limit = (gemm_name("bf16", SQUARE),)
    for dim, width in ((512, 256), (2048, 1024)):
        tokens, dim, width = max(16, 2048 // shrink), max(32, dim // shrink), max(32, width // shrink)
        x, weights, gate_up, down = _experts(tokens, 8, dim, width, 2)
        ids = torch.rand(tokens, 8).argsort()[:, :2]
        yield Case(
            f"experts {dim}x{width}, top 2 of 8, {tokens} tokens, bf16",
            partial(ops.experts, x, ids, weights, gate_up, down),
            6.0 * tokens * 2 * dim * width, FLOPS, limit,
        )  # fmt: skip
    dim, width = max(32, 2048 // shrink), max(32, 1024 // shrink)
    x, weights, gate_up, down = _experts(1, 64, dim, width, 8)
    turns, groups = count(), torch.randperm(64).view(8, 1, 8)  # 805 MB in turns: no cache holds the next call's
    yield Case(
        f"experts {dim}x{width}, top 8 of 64, 1 token, bf16",
        lambda: ops.experts(x, groups[next(turns) % 8], weights, gate_up, down),
        8 * 3 * dim * width * 2.0, BYTES, (READ,),
    )  # fmt: skip


def _experts(tokens: int, number: int, dim: int, width: int, k: int) -> tuple[Tensor, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    return draw(tokens, dim), torch.full((tokens, k), 1 / k), draw(number, 2 * width, dim), draw(number, dim, width)
