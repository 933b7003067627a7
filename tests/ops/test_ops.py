"""Every op equals its plain reference on drawn shapes; gradients equal autograd's; ties are total."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.drawing import batches
from torch import Tensor

from nanoglm import ops
from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.model.keys import IndexKeys, Latents
from nanoglm.model.layers import Rotary
from nanoglm.ops import Batch, count_work, cpu, reference, torch_tiled

shapes = settings(deadline=None, max_examples=30, derandomize=True)


@shapes
@given(batches(), st.integers(1, 24), st.integers(1, 20), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_select_equals_reference(batch_rows, heads: int, dim: int, k: int, ties: bool, seed: int) -> None:
    batch, rows = batch_rows
    torch.manual_seed(seed)
    q, keys = torch.randn(batch.borders[-1], heads, dim), torch.randn(rows, dim)
    weights = torch.randn(batch.borders[-1], heads)
    if ties:  # small integers: exact arithmetic, so many equal scores and the tie rule decides
        q, keys, weights = q.round(), keys.round(), weights.round()
    found = ops.select(q, weights, keys, batch, k)
    expected = reference.select(q, weights, keys, batch, k)
    if ties:
        assert torch.equal(found, expected)
    else:  # sums in another order may swap scores within rounding; the sets' scores must agree
        differing = (found != expected).any(-1).nonzero().flatten().tolist()
        for row in differing:
            a, b = ({int(s) for s in sel[row] if s >= 0} for sel in (found, expected))
            visible = reference._visible_rows(row, batch)
            scores = weights[row] @ (q[row] @ keys[visible].T).relu()
            gap = abs(min(scores[list(a - b)]) - min(scores[list(b - a)]))
            assert len(a) == len(b) and gap < 1e-4 * scores.abs().max()


def test_select_is_ascending_padded_and_causal() -> None:
    batch = Batch.contiguous([40, 7])
    selection = ops.select(torch.randn(47, 2, 8), torch.randn(47, 2), torch.randn(47, 8), batch, 16)
    assert selection.dtype == torch.int32 and selection.shape == (47, 16)
    for row, position in enumerate(batch.positions.tolist()):
        valid = [s for s in selection[row].tolist() if s >= 0]
        assert valid == sorted(set(valid)) and len(valid) == min(16, position + 1)
        assert max(valid) <= position
        assert selection[row].tolist() == valid + [-1] * (16 - len(valid))


def test_tie_rule_minus_zero_equals_zero_then_lower_position() -> None:
    """Order of the total rule: score, -0.0 = +0.0, lower position."""
    scores = torch.tensor([[-0.0, 0.0, -1.0, 2.0, 2.0, float("inf"), -0.0, 1e-45]])
    order = torch_tiled.sort_keys(scores, torch.arange(8)).argsort(descending=True)[0].tolist()
    assert order == [5, 3, 4, 7, 0, 1, 6, 2]
    assert ops.top(scores, 4)[0].tolist() == [5, 3, 4, 7]


def test_self_is_selectable() -> None:
    """Trap: the newest key counts. With only the own key scoring above zero it must be chosen."""
    keys = torch.eye(4).repeat(5, 1)
    q = keys[:, None]
    selection = ops.select(q, torch.ones(20, 1), keys, Batch.contiguous([20]), 1)
    assert selection[:4, 0].tolist() == [0, 1, 2, 3]


def test_a_score_of_all_zeros_selects_the_earliest() -> None:
    """ReLU makes exact ties; the rule, not the sort's whim, decides them (also across key tiles)."""
    n = torch_tiled.KEY_TILE + 100
    selection = ops.select(torch.ones(n, 1, 2), torch.zeros(n, 1), torch.ones(n, 2), Batch.contiguous([n]), 5)
    assert selection[-1].tolist() == [0, 1, 2, 3, 4]


@shapes
@given(batches(), st.integers(1, 5), st.integers(1, 20), st.integers(1, 9), st.integers(1, 30), st.integers(0, 99))
def test_sparse_attention_equals_reference(
    batch_rows, heads: int, latent_dim: int, rope_dim: int, k: int, seed: int
) -> None:
    batch, rows = batch_rows
    torch.manual_seed(seed)
    q = torch.randn(batch.borders[-1], heads, latent_dim), torch.randn(batch.borders[-1], heads, rope_dim)
    storage = torch.randn(rows, latent_dim), torch.randn(rows, rope_dim)
    selection = ops.select(torch.randn(batch.borders[-1], 1, 3), torch.randn(batch.borders[-1], 1),
                           torch.randn(rows, 3), batch, k)  # fmt: skip
    found = ops.sparse_attention(*q, *storage, selection, batch, 0.3)
    torch.testing.assert_close(found, reference.sparse_attention(*q, *storage, selection, batch, 0.3))


def test_sparse_attention_reads_no_unselected_row() -> None:
    """Everything outside the Selection is poisoned with NaN; one row read and the output shows it."""
    torch.manual_seed(0)
    batch = Batch.contiguous([50])
    selection = torch.full((50, 8), -1, dtype=torch.int32)
    selection[:, 0] = torch.arange(50).clamp(max=3)  # rows 0..3 alone are ever selected
    latent, rope = torch.full((50, 6), torch.nan), torch.full((50, 2), torch.nan)
    latent[:4], rope[:4] = torch.randn(4, 6), torch.randn(4, 2)
    out = ops.sparse_attention(torch.randn(50, 2, 6), torch.randn(50, 2, 2), latent, rope, selection, batch, 1.0)
    assert out.isfinite().all()


def test_sparse_attention_gradient(seed: int = 0) -> None:
    torch.manual_seed(seed)
    batch = Batch.contiguous([13, 6])
    inputs = [torch.randn(19, 2, 5), torch.randn(19, 2, 4), torch.randn(19, 5), torch.randn(19, 4)]
    selection = ops.select(torch.randn(19, 1, 3), torch.randn(19, 1), torch.randn(19, 3), batch, 4)
    _same_gradients(
        lambda *x: ops.sparse_attention(*x, selection, batch, 0.4),
        lambda *x: reference.sparse_attention(*x, selection, batch, 0.4),
        inputs,
    )


@shapes
@given(st.integers(1, 40), st.integers(1, 8), st.integers(2, 20), st.integers(1, 9), st.data())
def test_experts_equal_reference_and_gradients(rows: int, experts: int, dim: int, width: int, data) -> None:
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(rows * 100 + dim)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(rows)])
    inputs = [torch.randn(rows, dim), torch.rand(rows, k), torch.randn(experts, 2 * width, dim),
              torch.randn(experts, dim, width)]  # fmt: skip
    found = ops.experts(inputs[0], ids, *inputs[1:])
    torch.testing.assert_close(found, reference.experts(inputs[0], ids, *inputs[1:]), rtol=1e-4, atol=1e-4)
    _same_gradients(lambda x, *w: ops.experts(x, ids, *w), lambda x, *w: reference.experts(x, ids, *w), inputs, 1e-3)


@shapes
@given(
    st.integers(0, 40), st.integers(1, 80), st.integers(1, 20), st.integers(0, 70), st.sampled_from([1, 7, 64]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_written_keys_equal_reference(rows, latent, half, unturned, page, dtype, native: bool, seed: int) -> None:
    """With kernels and without; into plain pools and, of index keys, whatever ``index_pool`` chooses."""
    torch.manual_seed(seed)
    kv, weight = torch.randn(rows, latent + 2 * half).to(dtype), torch.randn(latent).to(dtype)
    keys, scale, bias = (torch.randn(*s, 2 * half + unturned).to(dtype) for s in ((rows,), (), ()))
    angles, slots = torch.randn(rows, half), torch.randperm(50 * page)[:rows]
    turn = angles.cos(), angles.sin(), slots
    with patch.object(cpu, "best", cpu.best if native else lambda: None):
        latents = torch.zeros(50, page, kv.shape[1], dtype=dtype)
        pools = torch.zeros(50, page, keys.shape[1], dtype=dtype), ops.index_pool(50, page, keys.shape[1], dtype)
        ops.write_latent(latents, kv, weight, 1e-5, *turn)
        for pool in pools:
            ops.write_index_keys(pool, keys, scale, bias, 1e-6, *turn)
    expected = [torch.zeros(*x.shape) for x in (latents, pools[0])]
    reference.write_latent(expected[0], kv, weight, 1e-5, *turn)
    reference.write_index_keys(expected[1], keys, scale, bias, 1e-6, *turn)
    packed = pools[1] if pools[1].ndim == 3 else cpu.unpack(pools[1], keys.shape[1]).view(expected[1].shape)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for found, exact in zip((latents, pools[0], packed), (expected[0], expected[1], expected[1]), strict=True):
        torch.testing.assert_close(found.float(), exact, rtol=limit, atol=limit)


def _same_gradients(ours, plain, inputs: list[Tensor], tolerance: float = 1e-4) -> None:
    grads = []
    for function in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("selected", [False, True])
def test_dense_attention_ragged_equals_absorbed_reference(selected: bool) -> None:
    """With queries and keys in latent space the expanded form is the same sum."""
    torch.manual_seed(1)
    batch = Batch.contiguous([30, 300, 5])
    T = batch.borders[-1]
    q, k, v = torch.randn(T, 2, 7), torch.randn(T, 2, 7), torch.randn(T, 2, 3)
    selection = None
    if selected:
        selection = ops.select(torch.randn(T, 1, 3), torch.randn(T, 1), torch.randn(T, 3), batch, 9)
    found = ops.dense_attention(q, k, v, batch.borders, 0.5, selection)
    for row in range(T):
        keys = reference._visible_rows(row, batch)
        if selection is not None:
            keys = [keys[s] for s in selection[row].tolist() if s >= 0]
        weights = torch.einsum("ha,sha->hs", q[row], k[keys]).mul(0.5).softmax(-1)
        torch.testing.assert_close(found[row], torch.einsum("hs,shv->hv", weights, v[keys]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("counts", [(300, 300), (7, 290, 0)])
def test_dense_attention_of_a_sequences_last_rows(selected: bool, counts: tuple[int, ...]) -> None:
    """As a rank of several has them: the same as of whole sequences at those rows."""
    torch.manual_seed(2)
    lengths = (310,) * len(counts)
    every = Batch.contiguous(lengths)
    q, k, v = (torch.randn(every.borders[-1], 2, n) for n in (7, 7, 3))
    selection = None
    if selected:
        selection = ops.select(torch.randn(len(q), 1, 3), torch.randn(len(q), 1), torch.randn(len(q), 3), every, 9)
    batch, rows = every.tail(counts)
    part = None if selection is None else selection[rows]
    found = ops.dense_attention(q[rows], k, v, batch.borders, 0.5, part, lengths)
    torch.testing.assert_close(found, ops.dense_attention(q, k, v, every.borders, 0.5, selection)[rows])


def test_registered_with_torch_library() -> None:
    """Schema, fake and autograd registrations hold what PyTorch checks of a custom op."""
    torch.manual_seed(0)
    batch = Batch.contiguous([20])
    q, w, keys = torch.randn(20, 2, 4), torch.randn(20, 2), torch.randn(20, 4)
    args = q, w, keys, batch.table, 1, batch.borders, batch.lengths, 6, batch.requests, batch.positions
    torch.library.opcheck(torch.ops.nanoglm.select.default, args)
    selection = ops.select(q, w, keys, batch, 6)
    leaves = [torch.randn(*s).requires_grad_() for s in ((20, 2, 5), (20, 2, 4), (20, 5), (20, 4))]
    args = *leaves, selection, batch.requests, batch.table, 1, 0.5
    torch.library.opcheck(torch.ops.nanoglm.sparse_attention.default, args)
    torch.library.opcheck(torch.ops.nanoglm.sparse_attention.default, (*args, selection, batch.requests.int()))
    leaves = [torch.randn(*s).requires_grad_() for s in ((20, 5), (20, 2), (3, 8, 5), (3, 5, 4))]
    ids = torch.randint(0, 3, (20, 2))
    torch.library.opcheck(torch.ops.nanoglm.experts.default, (leaves[0], ids, *leaves[1:]))
    slots = torch.tensor([3, 70])
    torch.library.opcheck(torch.ops.nanoglm.cache_append.default, (torch.zeros(2, 64, 3), torch.ones(2, 3), slots))
    turn = torch.randn(2, 2), torch.randn(2, 2), slots
    pool, kv, weight = torch.zeros(2, 64, 9), torch.randn(2, 9), torch.ones(5)
    torch.library.opcheck(torch.ops.nanoglm.write_latent.default, (pool, kv, weight, 1e-5, *turn))
    for pool in (torch.zeros(2, 64, 9), ops.index_pool(2, 64, 9), ops.index_pool(2, 64, 9, torch.int8)):
        args = pool, kv, torch.ones(9), torch.ones(9), 1e-6, *turn
        torch.library.opcheck(torch.ops.nanoglm.write_index_keys.default, args)


def test_work_is_counted() -> None:
    batch = Batch.contiguous([100, 33])
    with count_work() as work:
        selection = ops.select(torch.randn(133, 2, 4), torch.randn(133, 2), torch.randn(133, 4), batch, 10)
    assert work.pairs_scored == sum(n * (n + 1) // 2 for n in (100, 33)) and work.rows_attended == 0
    with count_work() as work:
        ops.sparse_attention(
            torch.randn(133, 1, 4), torch.randn(133, 1, 2), torch.randn(133, 4), torch.randn(133, 2),
            selection, batch, 1.0,
        )  # fmt: skip
    assert work.rows_attended == sum(min(t + 1, 10) for n in (100, 33) for t in range(n))


def test_nothing_but_pools_is_mutated() -> None:
    """No op returns an alias of an input, and none but those of the cache write to one."""
    for op in (torch.ops.nanoglm.select, torch.ops.nanoglm.sparse_attention, torch.ops.nanoglm.experts):
        schema = op.default._schema
        assert not any(a.alias_info for a in [*schema.arguments, *schema.returns])
    for name in ("cache_append", "index_append", "write_latent", "write_index_keys"):
        schema = getattr(torch.ops.nanoglm, name).default._schema
        assert [a.name for a in schema.arguments if a.alias_info] == ["pool"] and not schema.returns


def test_empty_sequence_is_refused() -> None:
    with pytest.raises(InputError, match="at least one token"):
        Batch.contiguous([3, 0])


def test_paged_store_writes_where_the_table_says() -> None:
    config = GLMConfig.preset("tiny")
    cache = PagedCache(config, 6)
    first, second = cache.open(), cache.open()
    batch = cache.extend([first, second], [70, 3])
    layer, rotary = (
        GLM(config).initialise().layers[0].self_attn,
        Rotary.at(batch.positions, config.qk_rope_head_dim, 1e4),
    )
    latents = Latents(torch.randn(73, config.kv_lora_rank + config.qk_rope_head_dim), layer.kv_a_layernorm, rotary)
    keys = IndexKeys(torch.randn(73, config.index_head_dim), layer.indexer.k_norm, rotary)
    with torch.no_grad():
        cache.write_latent(0, latents, batch)
        cache.write_index_keys(0, keys, batch)
        found = [x[batch.slots] for x in (*cache.latent(0), cpu.unpack(cache.index_keys(0), config.index_head_dim))]
        for a, b in zip(found, (*latents.finished(), keys.finished()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "page", "expected"),
    [(torch.float8_e4m3fn, 64, "NVIDIA GPU"), (torch.int8, 32, "pages of 64 on the CPU")],
)
def test_index_keys_are_quantised_where_there_is_a_kernel(dtype: torch.dtype, page: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        ops.index_pool(2, page, 16, dtype, "cpu")
