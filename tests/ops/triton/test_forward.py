"""Selection and attention equal their references on drawn shapes."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.drawing import batches, draw_keys, draw_selection, equal_but_at_the_boundary
from torch import Tensor

triton = pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from nanoglm import ops  # noqa: E402
from nanoglm.config import GLMConfig  # noqa: E402
from nanoglm.model import GLM, BatchStore  # noqa: E402
from nanoglm.ops import Batch, reference, torch_tiled  # noqa: E402
from nanoglm.ops.triton import attention, dispatch, select  # noqa: E402

drawn = settings(deadline=None, max_examples=int(os.environ.get("DRAWN_CASES", "50")), derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def few(batch: Batch, rows: int) -> Batch:
    """The same requests with so many of their last rows at most: the interpreter is slow."""
    counts = [end - begin for begin, end in zip(batch.borders, batch.borders[1:], strict=False)]
    return batch.tail([min(rows, n) for n in counts])[0]


def run_select(q: Tensor, weights: Tensor, keys: Tensor, batch: Batch, k: int, device: torch.device) -> Tensor:
    tensors = (x.to(device) for x in (q, weights, keys, batch.table))
    q, weights, keys, table = tensors
    positions, requests = batch.positions.to(device), batch.requests.to(device)
    found = select.select(
        q, weights, keys, table, batch.page_size, batch.borders, batch.lengths, k, requests, positions
    )
    return found.cpu()


@drawn
@given(
    batches(400), st.integers(1, 12), st.integers(1, 36), st.integers(1, 60), DTYPES,
    st.sampled_from(["random", "ties", "equal", "rising"]), st.integers(0, 99),
)  # fmt: skip
def test_select_equals_reference(device, batch_rows, heads, dim, k, dtype, kind, seed) -> None:
    batch, storage = batch_rows
    batch = few(batch, 20)
    torch.manual_seed(seed)
    q, weights, keys = draw_keys(kind, batch.borders[-1], heads, dim, batch, storage)
    q, keys = q.to(dtype), keys.to(dtype)
    found = run_select(q, weights, keys, batch, k, device)
    expected = reference.select(q, weights, keys, batch, k)
    if kind == "random":
        equal_but_at_the_boundary(found, expected, q.float(), weights, keys.float(), batch)
    else:
        assert torch.equal(found, expected)


@drawn
@given(
    st.integers(1, 3000), st.integers(1, 8), st.integers(1, 40), DTYPES, st.floats(0, 1), st.floats(0, 1),
    st.sampled_from([1, 8, 100]), st.sampled_from([1, 64]), st.sampled_from([64, 1024]), st.sampled_from([0, 64]),
    st.integers(0, 99),
)  # fmt: skip
def test_select_looks_into_the_best_groups_only(
    device, length, rows, k, dtype, zeros, negative, most, page, places, few_rows, seed
) -> None:
    """Long rows of few kept: scores of both signs, a crowd of zeros below, at and above the least that is kept."""
    torch.manual_seed(seed)
    rows = min(rows, length)
    score = torch.randint(1, most + 1, (length,)) * torch.where(torch.rand(length) < negative, -1, 1)
    score = torch.where(torch.rand(length) < zeros, 0, score).to(dtype)
    keys = torch.stack([score.relu(), (-score).relu()], 1)  # by a head of weight 1 and one of weight -1
    q, weights = torch.eye(2, dtype=dtype).expand(rows, 2, 2), torch.tensor([1.0, -1.0]).expand(rows, 2)
    pages = torch.randperm(-(-length // page))
    batch = Batch.build([rows], [length], pages.int()[None], page)
    storage = torch.full((len(pages) * page, 2), torch.nan, dtype=dtype)
    at = torch.arange(length)
    storage[pages[at // page] * page + at % page] = keys
    # What is listed may take several turns; and as launched for few rows, and for many.
    with patch.object(select, "PLACES", places), patch.object(select, "FEW", few_rows):
        found = run_select(q, weights, storage, batch, k, device)
    assert torch.equal(found, reference.select(q, weights, storage, batch, k))


@drawn
@given(
    st.integers(1, 700), st.integers(1, 6), st.integers(1, 12), st.sampled_from([4, 16, 36, 64]), st.integers(1, 60),
    st.sampled_from(["random", "ties", "equal"]), st.integers(0, 99),
)  # fmt: skip
def test_fp8_select_equals_reference_of_what_fp8_stands_for(device, length, rows, heads, dim, k, kind, seed) -> None:
    torch.manual_seed(seed)
    rows, pages = min(rows, length), torch.randperm(-(-length // 64))
    batch = Batch.build([rows], [length], pages.int()[None], 64)
    q, weights, keys = draw_keys(kind, rows, heads, dim, batch, len(pages) * 64)
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no FP8")
    pool = select.fp8_pool(len(pages), 64, dim, device)
    pool.fill_(127)  # garbage where nothing is written
    at = torch.arange(length)
    slots = pages[at // 64] * 64 + at % 64
    select.append_fp8(pool, keys[slots].to(device), slots.to(device))
    found = run_select(q, weights, pool, batch, k, device)
    (q8, q_scale), (k8, k_scale) = select.quantise(q), select.quantise(keys)
    q, keys = q8.float() * q_scale[..., None], k8.float() * k_scale[:, None]
    expected = reference.select(q, weights, keys, batch, k)
    if kind == "random":
        equal_but_at_the_boundary(found, expected, q, weights, keys, batch)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000], ids=hex)
@pytest.mark.parametrize("count", [1, 30])
def test_scores_that_are_no_numbers_write_nothing_beyond_the_row(device, bits: int, count: int) -> None:
    """A GPU's own NaN has the greatest bits there are; numpy's, which the interpreter makes, has others."""
    scores, n, k = torch.randn(1, 256), 200, 8
    scores.view(torch.int32)[0, 17 : 17 + count] = bits
    out = torch.full((40, k), -7, dtype=torch.int32, device=device)
    scores, positions = scores.to(device), torch.tensor([n - 1], device=device)
    places = torch.empty(1, 256, dtype=torch.int32, device=device)
    select._choose[(1,)](scores, scores, places, positions, out, 256, k, GROUP=1, PLACES=64)
    assert bool((out[1:] == -7).all())
    found = out[0].tolist()
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < n


@pytest.mark.parametrize("k", [5, 80, 400])
def test_scoring_holds_no_more_than_is_said(device: torch.device, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of 64, of 8, and none; rows in several parts."""
    monkeypatch.setattr(select, "SCRATCH", 1 << 16)
    batch, _ = Batch.contiguous([3000]).tail([20])
    sizes, empty = [], torch.empty

    def counted(*shape: object, **options: object) -> Tensor:
        found = empty(*shape, **options)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(torch, "empty", counted)
    run_select(torch.randn(20, 4, 8), torch.randn(20, 4), torch.randn(3000, 8), batch, k, device)
    out, *scratch = sizes
    assert out == 20 * k * 4 and 4 * select.SCRATCH * 0.7 < sum(scratch) <= dispatch.scratch()


def test_select_of_nothing(device: torch.device) -> None:
    batch = Batch.build([0], [5], torch.arange(5).int()[None], 1)
    found = run_select(torch.ones(0, 1, 4), torch.ones(0, 1), torch.ones(5, 4), batch, 3, device)
    assert found.shape == (0, 3)


@drawn
@given(
    batches(), st.integers(1, 20), st.integers(1, 40), st.integers(1, 20), st.integers(1, 90), DTYPES,
    st.sampled_from([0, 16]), st.integers(0, 99),
)  # fmt: skip
def test_sparse_attention_equals_reference(device, batch_rows, heads, c, r, k, dtype, least, seed) -> None:
    """Whole, and split over the Selection; storage rows that nobody selected hold NaN."""
    batch, storage = batch_rows
    batch = few(batch, 6)
    torch.manual_seed(seed)
    rows = batch.borders[-1]
    q = torch.randn(rows, heads, c).to(dtype), torch.randn(rows, heads, r).to(dtype)
    selection = draw_selection(batch.positions.tolist(), k)
    both = torch.full((storage, c + r), torch.nan, dtype=dtype)
    for row in range(rows):
        s = selection[row][selection[row] >= 0].long()
        slots = batch.table[batch.requests[row], s // batch.page_size] * batch.page_size + s % batch.page_size
        both[slots] = torch.randn(len(s), c + r).to(dtype)
    latent, rope = both.split([c, r], 1)  # rows with a stride wider than themselves
    tensors = (*q, latent, rope, selection, batch.requests, batch.table)
    doubles = (x.double() if x.is_floating_point() else x for x in tensors)
    expected = torch_tiled.sparse_attention(*doubles, batch.page_size, 0.3)
    tensors = [x.to(device) for x in tensors]
    with patch.object(attention, "splits_of", lambda programs, selected, device: 4 if least else 1):
        found = attention.sparse_attention(*tensors, batch.page_size, 0.3)
        located = attention.rows_of(*tensors[4:], batch.page_size)
        again = attention.sparse_attention(*tensors, batch.page_size, 0.3, *located)
    assert found.dtype == dtype and bool(found.isfinite().all())
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(again, found)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go where a GPU's would, but for choosing and experts: norms, attention, and where its rows lie."""
    monkeypatch.setattr(ops.cpu, "direct", lambda *tensors: None)
    monkeypatch.setattr(ops, "_beside", lambda x: dispatch)
    monkeypatch.setattr(ops, "_locate", dispatch.locate)
    monkeypatch.setattr(ops, "_sparse_attention", dispatch.sparse_attention)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing needs to be led there")
@torch.no_grad()
def test_layers_that_share_a_selection_locate_its_rows_once(interpreted, monkeypatch) -> None:
    """One Full layer and three Shared ones, twice; each new pass, tail and chain of drafts anew."""
    config = GLMConfig.preset("tiny", num_hidden_layers=8, index_topk_freq=4, index_skip_topk_offset=1)
    assert config.pattern == "FSSSFSSS"
    model, ids = GLM(config).initialise(0), torch.arange(9)
    batch, rows_of, given = Batch.contiguous([9]), attention.rows_of, []

    def counted(selection: Tensor, *places: object) -> tuple[Tensor, Tensor]:
        given.append(selection)
        return rows_of(selection, *places)

    monkeypatch.setattr(attention, "rows_of", counted)
    output = model(ids, batch, BatchStore())
    assert len(given) == 2 and given[0] is output.selections[0] and given[1] is output.selections[7]
    m, selection = model.draft(ids, output.hidden, output.step)  # the MTP layer chooses for itself
    assert len(given) == 3 and given[2] is selection
    for depth in (1, 2):  # and its later steps attend under the same
        m, _ = model.draft(ids, m, output.step, depth=depth, selection=selection)
    assert len(given) == 3
    step, rows = output.step.tail([2])  # the table is another batch's now, the Selection another object
    model.draft(ids[rows], m[rows], step, depth=1, selection=selection[rows])
    assert len(given) == 4
    model(ids, Batch.contiguous([9]), BatchStore())
    assert len(given) == 6
    again = model(ids, batch, BatchStore(), selections=output.selections)  # given before, but not the last
    assert len(given) == 8
    monkeypatch.undo()
    expected = model(ids, Batch.contiguous([9]), BatchStore(), selections=output.selections).hidden
    for found in (output.hidden, again.hidden):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
