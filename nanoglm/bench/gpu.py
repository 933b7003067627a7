"""``nanoglm bench gpu``: each op on a GPU as a share of the card's limit; models are in ``gpu_models``.

Also ``python -m nanoglm.bench.gpu FILE``, which needs no command line's libraries. A limit is the longer of the time
that an op's operations take at the rate of a large bf16 product and the time its bytes take at the rate of a large
copy, both measured beside it. Bytes of a gather count every selected row, cached or not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm import ops
from nanoglm.bench.device import Run, free, timed
from nanoglm.bench.gpu_models import curve, million, stack, training
from nanoglm.bench.ops import FLOPS, difference
from nanoglm.bench.result import Result, Row
from nanoglm.bench.timing import Progress, Sample, check_rounds
from nanoglm.cache import PAGE
from nanoglm.errors import InputError
from nanoglm.ops import Batch, torch_tiled

LENGTH = 131_072  # keys that the ops see


class Op(NamedTuple):
    """Something to time. flops, bytes: what it must do at least. peer: the same by other means; peer_waits: for the
    device, so that it cannot be captured. calls: of the op in one run; all figures are of one."""

    name: str
    run: Run
    flops: float
    bytes: float
    peer: Run | None = None
    peer_name: str = ""
    peer_waits: bool = False
    calls: int = 1


def bench_gpu(
    rounds: int = 5, shrink: int = 1, progress: Progress = lambda what, share: None, device: str = "cuda"
) -> Result:  # fmt: skip
    """All of it on the first GPU, in under ten minutes on an H100.

    Args:
        rounds: at least 3. shrink: divides lengths; figures are then of no use but come fast. device: "cpu" runs the
            CPU's ops, to see that all of it runs.

    Raises:
        InputError: no GPU, no Triton, or too few rounds.
    """
    check_rounds(rounds)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU is to be seen; expected one that PyTorch can use")
    if find_spec("triton") is None:
        raise InputError("triton is not installed; expected pip install triton, which comes with PyTorch for a GPU")
    torch.manual_seed(0)
    result = Result("gpu", rounds)
    if device == "cuda":
        result.machine |= {"gpu": torch.cuda.get_device_name(), "runtime": torch.version.cuda or torch.version.hip}
    length = LENGTH // shrink
    with torch.device(device), torch.no_grad():
        ceilings, limits = measure_ceilings(rounds, shrink)
        result.rows["ceilings"] = ceilings
        rows = result.rows["ops"] = []
        for part in (indexers, attentions, experts, gradients):
            try:
                for op in part(length, shrink):
                    progress(op.name, 0.0)
                    try:
                        rows.append(row_of(op, rounds, limits))
                    except torch.OutOfMemoryError:
                        result.notes.append(f"{op.name}: more memory than the card has")
                    del op  # its inputs would count as what the next takes
                    free()
            except torch.OutOfMemoryError:
                result.notes.append(f"{part.__name__}, at some point: more memory than the card has")
                free()
    for table, run in (("prefill", stack), ("run", million), ("step", training), ("curve", curve)):
        progress(run.__name__, 0.5)
        try:
            result.rows[table] = run(rounds, shrink, device)
        except torch.OutOfMemoryError:
            result.notes.append(f"{run.__name__}: more memory than the card has")
        free()
    return result


# ------------------------------------------------------------------------------- limits
def measure_ceilings(rounds: int, shrink: int) -> tuple[list[Row], dict[str, float]]:
    """Rows of the table, and operations and bytes a second: of a bf16 product and of a copy, on random numbers."""
    side = 8192 // shrink
    a, b = (torch.randn(side, side).bfloat16() for _ in range(2))
    source = torch.randn((1 << 29) // shrink)
    target = torch.empty_like(source)
    found: dict[str, float] = {}
    rows: list[Row] = []
    for kind, name, run, amount in (
        ("flops", f"bf16 mm {side}x{side}x{side}", lambda: torch.mm(a, b), 2.0 * side**3),
        ("bytes", f"copy of {source.nbytes >> 20:,} MiB", lambda: target.copy_(source), 2.0 * source.nbytes),
    ):
        sample = timed(run, rounds, graph=False)  # a graph copies with other engines, which are slower
        found[kind] = amount / sample.median
        unit = FLOPS if kind == "flops" else "GB/s"
        rows.append(_times(sample) | {"name": name, "rate": found[kind] / 1e9, "unit": unit})
    return rows, found


def row_of(op: Op, rounds: int, limits: dict[str, float]) -> Row:
    """The op beside the limit that binds it, and beside its peer."""
    sample = Sample(*(seconds / op.calls for seconds in timed(op.run, rounds)))
    seconds = {kind: getattr(op, kind) / limits[kind] for kind in ("flops", "bytes")}
    kind = max(seconds, key=lambda name: seconds[name])
    row = _times(sample) | {
        "name": op.name, "rate": getattr(op, kind) / sample.median / 1e9, "unit": FLOPS if kind == "flops" else "GB/s",
        "limit_rate": limits[kind] / 1e9, "limit": "product" if kind == "flops" else "copy",
        "share": seconds[kind] / sample.median,
    }  # fmt: skip
    if op.peer is not None:
        peer = timed(op.peer, max(3, rounds // 2), graph=not op.peer_waits).median
        row |= {"peer_ms": peer * 1e3, "times": peer / sample.median, "peer": op.peer_name}
        ours, theirs = op.run(), op.peer()
        if isinstance(ours, Tensor) and ours.shape == theirs.shape:
            row["differs"] = difference(ours, theirs)
    return row


def _times(sample: Sample) -> Row:
    ms, low, high = (seconds * 1e3 for seconds in sample)
    return {"ms": ms, "low": low, "high": high}


# ------------------------------------------------------------------------------- ops
def paged(rows: int, length: int, requests: int = 1) -> Batch:
    """The last ``rows`` rows of each request, whose pages lie in drawn order."""
    pages = torch.randperm(length // PAGE * requests, dtype=torch.int32).view(requests, -1)
    return Batch.build([rows] * requests, [length] * requests, pages, PAGE)


def drawn_selection(batch: Batch, k: int) -> Tensor:
    """k drawn positions, ascending, of those that the first row of a request sees already."""
    rows, seen = len(batch.positions), int(batch.positions.min())
    parts = [torch.rand(64, seen).topk(k).indices.sort().values for _ in range(-(-rows // 64))]
    return torch.cat(parts)[:rows].int()


def indexers(length: int, shrink: int) -> Iterator[Op]:
    """Scoring with top-k of the last rows of a prompt, scoring alone, and one row a request."""
    for heads, dim, k, many in ((32, 128, 2048, 4096), (4, 64, 512, 8192)):
        for rows in (many // shrink, 256 // shrink):
            batch = paged(rows, length)
            q, weights = torch.randn(rows, heads, dim).bfloat16(), torch.randn(rows, heads)
            keys = torch.randn(length // PAGE, PAGE, dim).bfloat16()
            flops, read = 2.0 * heads * dim * float((batch.positions + 1).sum()), keys.nbytes + q.nbytes
            name = f"{rows:,} rows, {heads}x{dim}, {length:,} keys"
            op = Op(f"select top {k:,}, {name}", partial(ops.select, q, weights, keys, batch, k), flops, read)
            if rows < many // shrink:
                flat = keys.flatten(0, 1)
                plain = partial(
                    torch_tiled.select, q, weights, flat, batch.table, PAGE, batch.borders, batch.lengths, k
                )
                yield op._replace(peer=plain, peer_name="tiled PyTorch", peer_waits=True)
            else:
                yield op
                with _scoring_alone():
                    yield op._replace(name=f"scores alone, {name}")
                if keys.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9):
                    pool = ops.index_pool(length // PAGE, PAGE, dim, torch.float8_e4m3fn, "cuda")
                    ops.index_append(pool, keys.flatten(0, 1), torch.arange(length))
                    run = partial(ops.select, q, weights, pool, batch, k)
                    yield op._replace(name=f"select top {k:,} of FP8 keys, {name}", run=run)
    for requests in (1, 32):
        batch = paged(1, length, requests)
        q, weights = torch.randn(requests, 32, 128).bfloat16(), torch.randn(requests, 32)
        keys = torch.randn(requests * length // PAGE, PAGE, 128).bfloat16()
        yield Op(
            f"select top 2,048, decoding {requests}, 32x128, {length:,} keys",
            partial(ops.select, q, weights, keys, batch, 2048), 2.0 * 32 * 128 * requests * length, keys.nbytes,
        )  # fmt: skip


class _Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


@contextmanager
def _scoring_alone() -> Iterator[None]:
    from nanoglm.ops.triton import select

    with patch.object(select, "_choose", _Nothing()):
        yield


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def attention_inputs(rows: int, stored: int) -> Inputs:
    """At GLM-5.2's shape: queries [T, 64, 512] and [T, 64, 64]; latents and ropes in one row, as a cache has them."""
    q_latent, q_rope = torch.randn(rows, 64, 512).bfloat16(), torch.randn(rows, 64, 64).bfloat16()
    latent, rope = torch.randn(stored, 576).bfloat16().split([512, 64], 1)
    return q_latent, q_rope, latent, rope


def gathered(rows: int, k: int) -> tuple[float, float]:
    """Operations and bytes of sparse attention at that shape."""
    return 2.0 * rows * 64 * k * (576 + 512), rows * (k * 576 * 2.0 + 64 * (576 + 512) * 2)


def attending(queries: tuple[Tensor, Tensor], pools: Sequence[tuple[Tensor, Tensor]], chosen: Tensor, of: Batch) -> Run:
    """Sparse attention to each of the pools under one Selection, as layers that share it. Batches remember where its
    rows lie, so each run has its own."""

    def run() -> Tensor:
        batch = replace(of)
        return [ops.sparse_attention(*queries, *pool, chosen, batch, 0.0625) for pool in pools][-1]

    return run


def attentions(length: int, shrink: int) -> Iterator[Op]:
    """Sparse attention of a prompt's last rows; of some, beside tiled PyTorch and dense attention; of one a request,
    in one layer and in four."""
    k = 2048 // shrink
    for rows in (4096 // shrink, 256):
        batch, inputs = paged(rows, length), attention_inputs(rows, length)
        selection = drawn_selection(batch, k)
        run = attending(inputs[:2], [inputs[2:]], selection, batch)
        op = Op(f"sparse attention, {rows:,} rows", run, *gathered(rows, k))
        if rows > 256:
            yield op
    plain = partial(torch_tiled.sparse_attention, *inputs, selection, batch.requests, batch.table, PAGE, 0.0625)
    yield op._replace(peer=plain, peer_name="tiled PyTorch")
    q, keys, values = (torch.randn(1, 64, n, 256).bfloat16() for n in (256, length, length))
    dense = partial(F.scaled_dot_product_attention, q, keys, values)
    yield op._replace(name=f"{op.name}, again", peer=dense, peer_name=f"dense SDPA, expanded, {length:,} keys")
    for requests in (1, 32, 128, 256):
        stored = length // 4
        batch, inputs = paged(1, stored, requests), attention_inputs(requests, requests * stored)
        selection = drawn_selection(batch, k)
        run = attending(inputs[:2], [inputs[2:]], selection, batch)
        op = Op(f"sparse attention, decoding {requests}", run, *gathered(requests, k))
        yield op
        # Four pools of many requests would be more than smaller cards have; what those read is more than caches hold.
        more = [attention_inputs(1, requests * stored)[2:] if requests <= 32 else inputs[2:] for _ in range(3)]
        run = attending(inputs[:2], [inputs[2:], *more], selection, batch)
        yield op._replace(name=f"{op.name}, a fourth of four layers under one Selection", run=run, calls=4)


def experts(length: int, shrink: int) -> Iterator[Op]:
    """Routed experts at GLM-5.2's widths; 64 of its 256, as one card of four would hold."""
    from nanoglm.ops.triton.experts import experts_by_grouped_mm

    count, hidden, width, k = 64, 6144 // shrink, 2048 // shrink, 8
    gate_up = (torch.randn(count, 2 * width, hidden) * hidden**-0.5).bfloat16()
    down = (torch.randn(count, hidden, width) * width**-0.5).bfloat16()
    for rows in (8192 // shrink, 64, 8, 1):
        x, ids, weights = torch.randn(rows, hidden).bfloat16(), _routes(rows, count, k), torch.rand(rows, k)
        arguments = x, ids, weights, gate_up, down
        flops = 6.0 * rows * k * width * hidden
        read = len(ids.unique()) * 3 * width * hidden * 2.0 + 2 * x.nbytes
        op = Op(f"experts, {rows:,} rows", partial(ops.experts, *arguments), flops, read)
        yield op._replace(
            peer=partial(torch_tiled.experts, *arguments), peer_name="a loop over experts", peer_waits=True
        )
        grouped = partial(experts_by_grouped_mm, *arguments)
        if x.is_cuda:
            yield op._replace(name=f"{op.name}, again", peer=grouped, peer_name="torch's grouped_mm")


def _routes(rows: int, count: int, k: int) -> Tensor:
    return torch.rand(rows, count).topk(k).indices


def gradients(length: int, shrink: int) -> Iterator[Op]:
    """Backward passes. Sparse attention: 5 products to the forward's 2; experts: 6 to 3, and 2 once more."""
    rows, k, stored = 2048 // shrink, 2048 // shrink, 16_384 // shrink
    batch, _ = Batch.contiguous([stored], torch.get_default_device()).tail([rows])
    inputs = attention_inputs(rows, stored)
    places = drawn_selection(batch, k), batch.requests, batch.table, 1, 0.0625
    flops, read = gathered(rows, k)
    op = Op(
        f"sparse attention backward, {rows:,} rows",
        partial(torch.ops.nanoglm.sparse_attention_backward.default, torch.randn_like(inputs[0]), *inputs, *places),
        2.5 * flops, 2 * read,
    )  # fmt: skip
    yield op
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield op._replace(name=f"{op.name}, deterministic")
    torch.use_deterministic_algorithms(False)
    count, hidden, width, rows = 32, 2048 // shrink, 1024 // shrink, 8192 // shrink
    gate_up = (torch.randn(count, 2 * width, hidden) * hidden**-0.5).bfloat16()
    down = (torch.randn(count, hidden, width) * width**-0.5).bfloat16()
    x, grad = torch.randn(rows, hidden).bfloat16(), torch.randn(rows, hidden).bfloat16()
    arguments = grad, x, _routes(rows, count, 8), torch.rand(rows, 8), gate_up, down
    yield Op(
        f"experts backward, {rows:,} rows, {hidden:,} wide",
        partial(torch.ops.nanoglm.experts_backward.default, *arguments), 8 / 3 * 6.0 * rows * 8 * width * hidden, 0.0,
        partial(torch_tiled.experts_backward, *arguments), "a loop over experts", True,
    )  # fmt: skip


if __name__ == "__main__":
    rounds, shrink = (int(sys.argv[i]) if len(sys.argv) > i else usual for i, usual in ((2, 5), (3, 1)))
    measured = bench_gpu(rounds, shrink, lambda what, share: print(what, file=sys.stderr, flush=True))
    measured.command = " ".join(["python -m nanoglm.bench.gpu", *sys.argv[1:]])
    measured.save(Path(sys.argv[1]))
    print(json.dumps(measured.rows, indent=None))
