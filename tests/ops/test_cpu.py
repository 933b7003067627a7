"""The C++ kernels equal the references on drawn cases, on every instruction set that was built and runs here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.drawing import batches, draw_keys, equal_but_at_the_boundary
from torch import Tensor

from nanoglm import ops
from nanoglm.cache import PAGE
from nanoglm.ops import Batch, count_work, cpu, kl, reference, torch_tiled

BUILT = [name for name in cpu.SETS if isinstance(cpu.library(name), cpu.Library)]
pytestmark = pytest.mark.skipif(not BUILT, reason="no C++ kernels: there was no compiler at installation")
# An emulator runs fewer.
drawn = settings(deadline=None, max_examples=int(os.environ.get("DRAWN_CASES", "200")), derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(params=BUILT, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library = cpu.library(request.param)
    with patch.object(cpu, "best", lambda: library):
        yield request.param


@drawn
@given(
    batches(400), st.integers(1, 24), st.integers(1, 36), st.integers(1, 120), DTYPES,
    st.sampled_from(["random", "ties", "equal", "rising"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_select_equals_reference(isa: str, batch_rows, heads, dim, k, dtype, kind, packed, seed) -> None:
    batch, storage = batch_rows
    torch.manual_seed(seed)
    q, weights, keys = draw_keys(kind, batch.borders[-1], heads, dim, batch, storage)
    q, keys = q.to(dtype), keys.to(dtype)
    given_keys = written(keys, batch, dtype, storage) if packed and batch.page_size == PAGE else keys
    found = ops.select(q, weights, given_keys, batch, k)
    expected = reference.select(q, weights, keys, batch, k)
    if kind == "random":
        equal_but_at_the_boundary(found, expected, q.float(), weights, keys.float(), batch)
    else:
        assert torch.equal(found, expected)


@drawn
@given(
    st.integers(1, 3000), st.integers(1, 12), st.integers(1, 600), DTYPES, st.floats(0, 1), st.floats(0, 1),
    st.sampled_from([1, 8, 100]), st.integers(0, 99),
)  # fmt: skip
def test_select_among_scores_of_both_signs_and_zeros(isa, length, rows, k, dtype, zeros, negative, most, seed):
    """So many keys that some are let go on the way; thresholds below, at and above a crowd of zeros."""
    torch.manual_seed(seed)
    rows = min(rows, length)
    score = torch.randint(1, most + 1, (length,)) * torch.where(torch.rand(length) < negative, -1, 1)
    score = torch.where(torch.rand(length) < zeros, 0, score).to(dtype)
    keys = torch.stack([score.relu(), (-score).relu()], 1)  # by a head of weight 1 and one of weight -1
    q, weights = torch.eye(2, dtype=dtype).expand(rows, 2, 2), torch.tensor([1.0, -1.0]).expand(rows, 2)
    batch = Batch.build([rows], [length], torch.arange(-(-length // PAGE)).int()[None], PAGE)
    pool = written(keys, batch, dtype, PAGE * batch.table.shape[1])
    storage = torch.cat([keys, torch.zeros(PAGE * batch.table.shape[1] - length, 2, dtype=dtype)])
    assert torch.equal(ops.select(q, weights, pool, batch, k), reference.select(q, weights, storage, batch, k))


@drawn
@given(
    batches(400), st.integers(1, 24), st.integers(1, 36), st.integers(1, 120), DTYPES,
    st.sampled_from(["random", "ties", "equal", "rising"]), st.integers(0, 99),
)  # fmt: skip
def test_int8_select_equals_reference_of_what_int8_stands_for(isa, batch_rows, heads, dim, k, dtype, kind, seed):
    batch, storage = batch_rows
    if batch.page_size != PAGE:
        batch = Batch.build(batch.lengths, batch.lengths, torch.arange(6).view(3, 2).int()[: len(batch.lengths)], PAGE)
        storage = 6 * PAGE
    torch.manual_seed(seed)
    q, weights, keys = draw_keys(kind, batch.borders[-1], heads, dim, batch, storage)
    q, keys = q.to(dtype), keys.to(dtype)
    pool = written(keys, batch, torch.int8, storage)
    found = ops.select(q, weights, pool, batch, k)
    (q8, q_scale), (k8, k_scale) = cpu.quantise(q), cpu.quantise(keys)
    q, keys = q8.float() * q_scale[..., None], k8.float() * k_scale[:, None]
    expected = reference.select(q, weights, keys, batch, k)
    equal_but_at_the_boundary(found, expected, q, weights, keys, batch)
    with patch.object(cpu, "best", lambda: None):
        by_torch = ops.select(q8.float() * q_scale[..., None], weights, pool, batch, k)
    equal_but_at_the_boundary(by_torch, expected, q, weights, keys, batch)


def written(keys: Tensor, batch: Batch, dtype: torch.dtype, storage: int) -> Tensor:
    """A pool as the cache keeps it, garbage where nothing was written."""
    pool = ops.index_pool(storage // PAGE, PAGE, keys.shape[1], dtype)
    assert pool.ndim > 3
    pool.fill_(255 if dtype == torch.int8 else torch.nan)
    for request, length in enumerate(batch.lengths):
        at = torch.arange(length)
        slots = ops.batch.storage_rows(at, torch.full_like(at, request), batch.table, PAGE)
        ops.index_append(pool, keys[slots], slots)
    return pool


@drawn
@given(
    st.integers(0, 300),
    st.integers(1, 130),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    st.integers(0, 99),
)
def test_append_equals_indexing(isa, count, dim, dtype, seed):
    """To drawn places in drawn order; what lies beside them stays."""
    torch.manual_seed(seed)
    keys, slots = torch.randn(count, dim), torch.randperm(5 * PAGE)[:count]
    found = []
    for best in (cpu.best, lambda: None):
        pool = cpu.packed_pool(5, dim, dtype)
        pool.view(torch.uint8).fill_(7)
        with patch.object(cpu, "best", best):
            cpu.append_packed(pool, keys, slots)
        found.append(pool.view(torch.uint8))
    assert torch.equal(*found)


def places(count: int) -> Tensor:
    """Drawn rows of five pages, none twice."""
    return torch.randperm(5 * PAGE)[:count]


@drawn
@given(
    st.integers(0, 300), st.integers(1, 150) | st.sampled_from([64, 512]), st.integers(1, 40), st.integers(0, 5),
    DTYPES, DTYPES, st.integers(0, 99),
)  # fmt: skip
def test_written_latents_have_the_bits_of_the_ops_they_consist_of(
    isa, count, latent, half, beside, dtype, pool_dtype, seed
) -> None:
    """As slices of something wider, to drawn places, what lies beside them stays; and of a pool of another dtype."""
    torch.manual_seed(seed)
    kv = (torch.randn(count, latent + 2 * half + beside) * torch.rand(count, 1) ** 9).to(dtype)[:, beside:]
    weight, angles, slots = torch.randn(latent).to(dtype), torch.randn(count, half), places(count)
    cos, sin = angles.cos(), angles.sin()
    found, expected = (torch.full((5, PAGE, latent + 2 * half), 7.0, dtype=pool_dtype) for _ in range(2))
    ops.write_latent(found, kv, weight, 1e-5, cos, sin, slots)
    parts = ops.rms_norm(kv[:, :latent], weight, 1e-5), ops.rotate(kv[:, latent:], cos, sin)
    ops.cache_append(expected, torch.cat(parts, 1), slots)
    assert torch.equal(found, expected)


@drawn
@given(
    st.integers(0, 300), st.integers(1, 40), st.integers(0, 90), st.integers(0, 5), DTYPES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.integers(0, 99),
)  # fmt: skip
def test_written_index_keys_have_the_bits_of_the_ops_they_consist_of(
    isa, count, half, unturned, beside, dtype, pool_dtype, seed
) -> None:
    torch.manual_seed(seed)
    rope, dim = 2 * half, 2 * half + unturned
    keys = torch.randn(count, dim + beside).to(dtype)[:, beside:]
    weight, bias, angles, slots = (
        torch.randn(dim).to(dtype),
        torch.randn(dim).to(dtype),
        torch.randn(count, half),
        places(count),
    )
    cos, sin = angles.cos(), angles.sin()
    found, expected = (ops.index_pool(5, PAGE, dim, pool_dtype) for _ in range(2))
    for pool in (found, expected):
        pool.view(torch.uint8).fill_(7)
    ops.write_index_keys(found, keys, weight, bias, 1e-6, cos, sin, slots)
    normed = F.layer_norm(keys.float(), (dim,), weight.float(), bias.float(), 1e-6).to(dtype)
    ops.index_append(expected, torch.cat([ops.rotate(normed[:, :rope], cos, sin), normed[:, rope:]], 1), slots)
    assert found.ndim > 3 and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_written_bits_do_not_depend_on_threads_or_neighbours(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count, plain = 5 * PAGE, torch.float32 if dtype == torch.int8 else dtype
    kv, weight, angles = torch.randn(count, 512 + 64).to(plain), torch.randn(512).to(plain), torch.randn(count, 32)
    cos, sin, slots, bias = angles.cos(), angles.sin(), places(count), torch.randn(512).to(plain)

    def written(rows: list[slice]) -> list[Tensor]:
        pools = torch.zeros(5, PAGE, 576, dtype=plain), ops.index_pool(5, PAGE, 512, dtype)
        for row in rows:
            rest = 1e-5, cos[row], sin[row], slots[row]
            ops.write_latent(pools[0], kv[row], weight, *rest)
            ops.write_index_keys(pools[1], kv[row, :512], weight, bias, *rest)
        return [pool.view(torch.uint8) for pool in pools]

    before = torch.get_num_threads()
    try:
        whole = written([slice(None)])
        torch.set_num_threads(3)
        for rows in ([slice(None)], [slice(row, row + 1) for row in range(count)]):
            assert all(torch.equal(a, b) for a, b in zip(written(rows), whole, strict=True))
    finally:
        torch.set_num_threads(before)


@drawn
@given(st.integers(1, 300), st.integers(1, 150), st.integers(1, 140), st.integers(1, 3), DTYPES, st.integers(0, 99))
def test_linear_and_headwise_equal_torch(isa: str, rows, inputs, outputs, heads, dtype, seed) -> None:
    torch.manual_seed(seed)
    wide = torch.randn(rows, heads, inputs + seed % 3).to(dtype)
    x, weight = wide[..., :inputs], (torch.randn(heads, outputs, inputs) * inputs**-0.5).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for w in (weight.mT, weight.mT.contiguous()):  # an output's inputs side by side, and an input's outputs
        found = ops.headwise(x, w)
        expected = torch.einsum("tha,hab->thb", x.double(), w.double())
        assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) < limit
        row = seed % rows  # alone as among others
        assert torch.equal(ops.headwise(x[row : row + 1], w), found[row : row + 1])
    assert torch.equal(ops.linear(x[:, 0], weight[0]), found[:, 0])
    wide, expected = ops.linear_fp32(x[:, 0], weight[0]), x[:, 0].double() @ weight[0].double().T
    assert wide.dtype == torch.float32  # and as exact, whatever x and weight are
    assert float((wide - expected).abs().max() / expected.abs().max().clamp(min=1)) < 1e-5
    assert torch.equal(ops.linear_fp32(x[row : row + 1, 0], weight[0]), wide[row : row + 1])
    mixed, expected = (
        ops.linear_fp32(x[:, 0], exact := torch.randn(outputs, inputs)),
        x[:, 0].double() @ exact.double().T,
    )
    assert float((mixed - expected).abs().max() / expected.abs().max().clamp(min=1)) < 1e-5
    assert torch.equal(ops.linear_fp32(x[row : row + 1, 0], exact), mixed[row : row + 1])


@pytest.mark.parametrize("rows", [1, 50])
def test_of_no_inputs_sums_are_zero(isa: str, rows: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not ops.linear(torch.empty(rows, 0, dtype=dtype), torch.empty(70, 0, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [513, 1100, 2051])
def test_many_inputs_go_in_parts(isa: str, inputs: int, dtype: torch.dtype) -> None:
    """More than a panel holds, in several chunks of rows and panels of outputs."""
    torch.manual_seed(inputs)
    x, weight = torch.randn(450, inputs).to(dtype), (torch.randn(150, inputs) * inputs**-0.5).to(dtype)
    found, expected = ops.linear(x, weight), x.double() @ weight.double().T
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((found - expected).abs().max() / expected.abs().max()) < limit
    for rows in (1, 6, 7, 200):
        assert torch.equal(ops.linear(x[-rows:], weight), found[-rows:])


@drawn
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 150), DTYPES, st.integers(0, 99))
def test_mlp_equals_torch(isa: str, rows, dim, width, dtype, seed) -> None:
    torch.manual_seed(seed)
    x, gate, up = (torch.randn(*s).to(dtype) for s in ((rows, dim), (width, dim), (width, dim)))
    down = (torch.randn(dim, width) * (width * dim) ** -0.5).to(dtype)
    found = ops.mlp(x, gate, up, down)
    a, b = x.double() @ gate.double().T, x.double() @ up.double().T
    expected = (torch.nn.functional.silu(a) * b) @ down.double().T
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) < limit
    row = slice(seed % rows, seed % rows + 1)
    assert torch.equal(ops.mlp(x[row], gate, up, down), found[row])


@drawn
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 40), st.integers(0, 40), DTYPES, st.integers(0, 99)
)  # fmt: skip
def test_norm_rope_and_top_equal_torch(isa: str, rows, heads, half, beyond, dtype, seed) -> None:
    torch.manual_seed(seed)
    wide = torch.randn(rows, heads, 2 * half + beyond + 3).to(dtype)
    x, angles = wide[..., : 2 * half + beyond], torch.randn(rows, half)
    weight = torch.randn(2 * half + beyond).to(dtype)
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]

    def run() -> list[torch.Tensor]:
        turned = [ops.rotate(x, angles.cos(), angles.sin()), ops.rotate(x[:, 0], angles.cos(), angles.sin())]
        return [ops.rms_norm(x[:, 0], weight, 1e-5), *turned]

    found = run()
    with patch.object(cpu, "best", lambda: None):
        expected = run()
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max().clamp(min=1)) < limit
    assert torch.equal(found[1][..., 2 * half :], x[..., 2 * half :])
    taken = x.clone(memory_format=torch.contiguous_format)
    assert ops.rotate(taken, angles.cos(), angles.sin(), reuse=True) is taken and torch.equal(taken, found[1])
    cos, sin = (torch.cat([f(angles), angles], 1)[:, :half] for f in (torch.cos, torch.sin))  # with gaps between rows
    assert torch.equal(ops.rotate(x, cos, sin), found[1])
    if not x.is_contiguous():  # nothing to reuse
        assert torch.equal(ops.rotate(x, angles.cos(), angles.sin(), reuse=True), found[1])
    scores = torch.randn(rows, half + 1).mul(3).round() * torch.tensor([1.0, -0.0])[seed % 2]  # many ties, -0.0 too
    k = seed % (half + 1) + 1
    assert torch.equal(ops.top(scores, k), torch_tiled.top(scores, k))


@drawn
@given(
    st.integers(1, 30),
    st.integers(1, 150),
    st.integers(1, 90),
    st.integers(1, 9),
    st.data(),
    DTYPES,
    st.integers(0, 99),
)
def test_int8_experts_equal_torchs_and_reference(isa: str, tokens, dim, width, count, data, dtype, seed) -> None:
    k = data.draw(st.integers(1, count))
    torch.manual_seed(seed)
    x, gate_up = torch.randn(tokens, dim).to(dtype), torch.randn(count, 2 * width, dim) * dim**-0.5
    down, weights = torch.randn(count, dim, width) * width**-0.5, torch.rand(tokens, k)
    ids = torch.rand(tokens, count).topk(k).indices
    arguments = (x, ids, weights, *ops.quantise(gate_up), *ops.quantise(down))
    found = ops.experts_int8(*arguments)
    scale = weights.sum(-1).max().clamp(min=1)
    # One activation may round the other way after silu: a step of 1 / 127 of one input.
    assert float((found.float() - torch_tiled.experts_int8(*arguments).float()).abs().max() / scale) < 0.03
    expected = reference.experts_int8(x.float(), *arguments[1:])
    # Activations have steps of 1 / 127 of their largest; gate times up can double that, sums over inputs average it.
    assert float((found.float() - expected).abs().max() / expected.abs().max().clamp(min=scale)) < 0.1
    row = slice(seed % tokens, seed % tokens + 1)
    assert torch.equal(ops.experts_int8(x[row], ids[row], weights[row], *arguments[3:]), found[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_is_the_same_as_torchs(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(300, 3, 37) * torch.rand(300, 1, 1) ** 9).to(dtype)
    x[4] = 0
    found = cpu.quantise(x)
    with patch.object(cpu, "best", lambda: None):
        assert all(torch.equal(a, b) for a, b in zip(found, cpu.quantise(x), strict=True))


def draw_selection(batch: Batch, k: int, storage: int) -> tuple[Tensor, Tensor]:
    """A Selection of each row, and which storage rows none selects."""
    chosen = torch.full((batch.borders[-1], k), -1, dtype=torch.int32)
    for row, position in enumerate(batch.positions.tolist()):
        some = torch.randperm(position + 1)[: torch.randint(1, k + 1, ())].sort().values
        chosen[row, : len(some)] = some.int()
    unused = torch.ones(storage, dtype=torch.bool)
    slots = ops.batch.storage_rows(chosen.clamp(min=0).long(), batch.requests[:, None], batch.table, batch.page_size)
    unused[slots[chosen >= 0]] = False
    return chosen, unused


@drawn
@given(
    batches(400), st.integers(1, 17), st.integers(1, 80) | st.sampled_from([32, 64, 96, 512]),
    st.integers(1, 24) | st.sampled_from([4, 20, 32, 64]), st.integers(1, 200), DTYPES,
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_sparse_attention_equals_reference(isa: str, batch_rows, heads, c, r, k, dtype, together, seed) -> None:
    batch, storage = batch_rows
    torch.manual_seed(seed)
    rows = batch.borders[-1]
    tensors = [torch.randn(*s).to(dtype) for s in ((rows, heads, c), (rows, heads, r), (storage, c), (storage, r))]
    chosen, unused = draw_selection(batch, k, storage)  # poison in what is not selected must not be read
    poisoned = [*tensors[:2], *(t.masked_fill(unused[:, None], torch.nan) for t in tensors[2:])]
    if together:  # as the cache keeps them: a row's latent and rope side by side
        poisoned[2:] = torch.cat(poisoned[2:], 1).split([c, r], 1)
    found = ops.sparse_attention(*poisoned, chosen, batch, 0.3).float()
    expected = reference.sparse_attention(*(t.float() for t in tensors), chosen, batch, 0.3)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) < limit


@drawn
@given(
    batches(400), st.integers(1, 17), st.integers(1, 80) | st.sampled_from([32, 64, 96]), st.integers(1, 24),
    st.integers(1, 200), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_gradients_of_sparse_attention_equal_autograd_of_the_reference(
    isa: str, batch_rows, heads, c, r, k, together, seed
) -> None:
    batch, storage = batch_rows
    torch.manual_seed(seed)
    rows = batch.borders[-1]
    shapes = (rows, heads, c), (rows, heads, r), (storage, c), (storage, r)
    tensors, grad = [torch.randn(*s) for s in shapes], torch.randn(rows, heads, c)
    chosen, unused = draw_selection(batch, k, storage)
    exact = [x.double().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(reference.sparse_attention(*exact, chosen, batch, 0.3), exact, grad.double())
    poisoned = [*tensors[:2], *(t.masked_fill(unused[:, None], torch.nan) for t in tensors[2:])]
    if together:
        poisoned[2:] = torch.cat(poisoned[2:], 1).split([c, r], 1)
    inputs = [x.detach().requires_grad_() for x in poisoned]
    found = torch.autograd.grad(ops.sparse_attention(*inputs, chosen, batch, 0.3), inputs, grad)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max().clamp(min=1)) < 1e-5


@drawn
@given(
    st.integers(1, 3), st.integers(1, 90), st.integers(0, 70), st.integers(1, 100), st.integers(1, 9),
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_indexer_kl_equals_torchs_in_fp64(
    isa: str, sequences, length, before, k, index_heads, dim, heads, main_dim, teachers, seed
) -> None:
    torch.manual_seed(seed)
    rows, keys = sequences * length, sequences * (before + length)
    chosen = torch.full((rows, k), -1, dtype=torch.int32)
    for row in range(rows):
        some = torch.randperm(before + row % length + 1)[: torch.randint(1, k + 1, ())].sort().values
        chosen[row, : len(some)] = some.int()
    inputs = torch.randn(rows, index_heads, dim), torch.randn(rows, index_heads), torch.randn(keys, dim)
    main = [torch.randn(rows, heads, main_dim) for _ in range(teachers)]
    main_keys = [torch.randn(keys, main_dim) for _ in range(teachers)]
    rest = length, before, 0.3, chosen
    found = ops.indexer_kl(*inputs, main, main_keys, *rest)
    wide = [[x.double() for x in each] for each in (inputs, main, main_keys)]
    # A product near 0 may fall on the other side of the ReLU, whose gradient jumps there.
    q, _, k_ = wide[0]
    exact = kl.indexer_kl(*wide[0], wide[1], wide[2], *rest)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-5, abs=1e-5)
    near = (torch.einsum("tji,si->tjs", q, k_).abs() < 1e-6).any()
    for a, b in zip(found[1:], () if near else exact[1:], strict=not near):
        assert float((a - b).abs().max() / b.abs().max().clamp(min=1)) < 1e-5


@drawn
@given(
    st.integers(1, 60), st.integers(1, 70), st.integers(1, 50), st.integers(1, 9), st.data(), DTYPES, st.integers(0, 99)
)
def test_experts_equal_reference(isa: str, tokens, dim, width, count, data, dtype, seed) -> None:
    k = data.draw(st.integers(1, count))
    torch.manual_seed(seed)
    x, gate_up = torch.randn(tokens, dim).to(dtype), (torch.randn(count, 2 * width, dim) * dim**-0.5).to(dtype)
    down, weights = (torch.randn(count, dim, width) * width**-0.5).to(dtype), torch.rand(tokens, k)
    ids = torch.rand(tokens, count).topk(k).indices
    found = ops.experts(x, ids, weights, gate_up, down)
    expected = reference.experts(x.float(), ids, weights, gate_up.float(), down.float())
    # Measured by what is added up, which may cancel: rounding hidden values to bf16 costs a part of each.
    both = [(x.float() @ w.float().T).chunk(2, -1) for w in gate_up]
    sizes = [(F.silu(gate) * up).abs() @ w.float().abs().T for (gate, up), w in zip(both, down, strict=True)]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((found.float() - expected).abs().max()) < limit * k * float(torch.stack(sizes).max().clamp(min=1e-3))
    row = seed % tokens  # alone as among others
    one = slice(row, row + 1)
    assert torch.equal(ops.experts(x[one], ids[one], weights[one], gate_up, down), found[one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("threads", "heads"), [(1, 8), (2, 8), (5, 8), (2, 24)])
def test_bits_do_not_depend_on_threads_or_neighbours(isa: str, dtype: torch.dtype, threads: int, heads: int) -> None:
    """One row alone (keys or heads split over threads) and among others (rows split)."""
    torch.manual_seed(0)
    count, dim, k = 2500, 16, 150
    q, weights, keys = torch.randn(count, heads, dim).to(dtype), torch.randn(count, heads), torch.randn(count, dim)
    keys = keys.to(dtype)
    pool = ops.index_pool(-(-count // PAGE), PAGE, dim, dtype)
    ops.index_append(pool, keys, torch.arange(count))
    table = torch.arange(pool.shape[0]).int()[None]
    latents = [torch.randn(*s).to(dtype) for s in ((count, heads, 64), (count, heads, 8), (count, 64), (count, 8))]
    before = torch.get_num_threads()
    whole = Batch.contiguous([count])
    chosen = ops.select(q, weights, keys, whole, k)
    attended = ops.sparse_attention(*latents, chosen, whole, 0.2)

    def gradients() -> tuple[Tensor, ...]:
        if dtype is not torch.float32:
            return ()
        both = torch.cat([latents[0], latents[1]], -1), torch.cat([latents[2], latents[3]], -1)
        rest = attended, *latents, chosen, whole.requests, whole.table, 1, 0.2
        kl = cpu.indexer_kl(q, weights, keys, both[:1], both[1:], count, 0, 0.2, chosen)
        return *cpu.sparse_attention_backward(*rest), *kl

    before_them = gradients()
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(gradients(), before_them, strict=True))
        assert torch.equal(ops.select(q, weights, keys, whole, k), chosen)
        assert torch.equal(ops.sparse_attention(*latents, chosen, whole, 0.2), attended)
        for row in (0, 63, 64, 1111, count - 1):
            one = slice(row, row + 1)
            alone = Batch.build([1], [row + 1], table, PAGE)
            assert torch.equal(ops.select(q[one], weights[one], pool, alone, k), chosen[one])
            rest = (latents[2], latents[3], chosen[one], alone, 0.2)
            assert torch.equal(ops.sparse_attention(latents[0][one], latents[1][one], *rest), attended[one])
    finally:
        torch.set_num_threads(before)


def test_work_is_counted_alike(isa: str) -> None:
    batch = Batch.contiguous([100, 33])
    torch.manual_seed(0)
    q, weights, keys = torch.randn(133, 2, 8), torch.randn(133, 2), torch.randn(133, 8)
    counts = []
    for native in (True, False):
        with patch.object(cpu, "best", cpu.best if native else lambda: None), count_work() as work:
            chosen = ops.select(q, weights, keys, batch, 16)
            ops.sparse_attention(q, q, keys, keys, chosen, batch, 1.0)
        counts.append((work.pairs_scored, work.rows_attended))
    assert counts[0] == counts[1] == (100 * 101 // 2 + 33 * 34 // 2, int((chosen >= 0).sum()))


def test_infinite_scores_are_as_in_torch(isa: str) -> None:
    """+inf comes first, by position; -inf is never chosen."""
    torch.manual_seed(0)
    q, weights, keys = torch.rand(90, 1, 8) + 0.5, torch.ones(90, 1), torch.rand(90, 8)
    keys[7], keys[40] = 3e38, 3e38
    weights[60:] = -1
    batch = Batch.contiguous([90])
    found = ops.select(q, weights, keys, batch, 16)
    assert {7, 40} <= set(found[59].tolist()) and not {7, 40} & set(found[89].tolist())
    with patch.object(cpu, "best", lambda: None):
        assert torch.equal(found, ops.select(q, weights, keys, batch, 16))


def test_half_precision_is_torchs(isa: str) -> None:
    torch.manual_seed(0)
    q, weights, keys = torch.randn(40, 2, 8).half(), torch.randn(40, 2), torch.randn(40, 8).half()
    batch = Batch.contiguous([40])
    expected = torch_tiled.select(q, weights, keys, batch.table, 1, batch.borders, batch.lengths, 8)
    assert torch.equal(ops.select(q, weights, keys, batch, 8), expected)
    assert ops.index_pool(2, PAGE, 8, torch.float16).shape == (2, PAGE, 8)
