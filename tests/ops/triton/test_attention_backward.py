"""Gradients of sparse attention equal the plain ones, taken in fp64, on drawn shapes."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.drawing import apart, deterministic, draw_selection
from torch import Tensor

triton = pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from nanoglm.ops import Batch, torch_tiled  # noqa: E402
from nanoglm.ops.batch import storage_rows  # noqa: E402
from nanoglm.ops.triton import attention_backward  # noqa: E402
from nanoglm.ops.triton.attention_backward import add_in_order, sparse_attention_backward  # noqa: E402

drawn = settings(deadline=None, max_examples=int(os.environ.get("DRAWN_CASES", "50")), derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, int]:
    """A few rows, contiguous or behind others in pages, and the storage rows there are: the interpreter is slow."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
    if draw(st.booleans()):
        return Batch.contiguous(counts), sum(counts)
    page = draw(st.sampled_from([1, 4, 64]))
    lengths = [count + draw(st.integers(0, 80)) for count in counts]
    wide = max(-(-n // page) for n in lengths)
    pages = torch.randperm(wide * len(counts) + 2)[: wide * len(counts)]  # shuffled, with holes
    return Batch.build(counts, lengths, pages.view(len(counts), wide).int(), page), (wide * len(counts) + 2) * page


def selected(batch: Batch, k: int, storage: int) -> tuple[Tensor, Tensor]:
    """A Selection of each row, and which storage rows none selects."""
    chosen = draw_selection(batch.positions.tolist(), k)
    unused = torch.ones(storage, dtype=torch.bool)
    slots = storage_rows(chosen.clamp(min=0).long(), batch.requests[:, None], batch.table, batch.page_size)
    unused[slots[chosen >= 0]] = False
    return chosen, unused


@drawn
@given(
    batches(), st.integers(1, 20), st.integers(1, 40) | st.sampled_from([64, 96]), st.integers(1, 36),
    st.integers(1, 70), DTYPES, st.booleans(), st.booleans(), st.sampled_from([1, 3000, 1 << 28]), st.integers(0, 99),
)  # fmt: skip
def test_gradients_equal_plain_ones(device, batch_rows, heads, c, r, k, dtype, views, ordered, scratch, seed) -> None:
    batch, storage = batch_rows
    torch.manual_seed(seed)
    rows = batch.borders[-1]
    grad, q_latent, q_rope = (torch.randn(rows, heads, n).to(dtype) for n in (c, c, r))
    chosen, unused = selected(batch, k, storage)
    keys = torch.randn(storage, c + r).to(dtype)
    keys[unused] = torch.nan  # what is not selected must not be read
    latent, rope = keys.split([c, r], 1)  # side by side, as the cache keeps them
    if views:  # as headwise leaves queries
        grad, q_latent = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (grad, q_latent))
    else:
        latent, rope = latent.contiguous(), rope.contiguous()
    tensors = grad, q_latent, q_rope, latent, rope
    scale = (c + r) ** -0.5
    expected = torch_tiled.sparse_attention_backward(
        *(x.double() for x in tensors), chosen, batch.requests, batch.table, batch.page_size, scale
    )
    moved = [x.to(device) for x in (*tensors, chosen, batch.requests, batch.table)]
    with patch.object(attention_backward, "SCRATCH", scratch), deterministic(ordered):  # in one chunk or many
        found = sparse_attention_backward(*moved, batch.page_size, scale)
    for x, a, b in zip(tensors[1:], found, expected, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert apart(a, b) < LIMIT[dtype]
    assert not found[2][unused.to(device)].any() and not found[3][unused.to(device)].any()


def test_bits_are_the_same_every_time_if_asked(device: torch.device) -> None:
    """All rows select the same few keys, where atomics would meet."""
    torch.manual_seed(0)
    rows, heads, c, r, k = (16, 4, 16, 16, 16) if device.type == "cpu" else (512, 16, 64, 16, 128)
    batch = Batch.contiguous([rows + k])
    shapes = (rows, heads, c), (rows, heads, c), (rows, heads, r), (rows + k, c), (rows + k, r)
    tensors = [torch.randn(*s).to(device) for s in shapes]
    chosen = torch.arange(k).int().expand(rows, k).contiguous().to(device)
    rest = chosen, batch.requests[k:].to(device), batch.table.to(device), 1, 0.3
    with deterministic(True):
        first, *others = (sparse_attention_backward(*tensors, *rest) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@drawn
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 40), st.integers(1, 20), st.integers(0, 99))
def test_sums_in_order_equal_index_add(device, count, storage, wide, beside, seed) -> None:
    torch.manual_seed(seed)
    rows, values = torch.randint(-1, storage, (count,)), torch.randn(count, wide + beside)
    values[rows < 0] = torch.nan
    expected = torch.randn(storage, wide + beside)
    targets = [x.contiguous().to(device) for x in expected.split([wide, beside], 1)]
    add_in_order(rows.int().to(device), values.to(device), *targets)
    expected.index_add_(0, rows[rows >= 0], values[rows >= 0])
    assert apart(torch.cat(targets, 1), expected.double()) < 1e-6


def test_of_nothing(device: torch.device) -> None:
    batch = Batch.build([0], [5], torch.arange(5).int()[None], 1)
    tensors = [torch.ones(*s, device=device) for s in ((0, 3, 8), (0, 3, 8), (0, 3, 4), (5, 8), (5, 4))]
    chosen = torch.ones(0, 7, dtype=torch.int32, device=device)
    found = sparse_attention_backward(*tensors, chosen, batch.requests.to(device), batch.table.to(device), 1, 1.0)
    assert [x.shape for x in found] == [x.shape for x in tensors[1:]] and not any(x.any() for x in found)
