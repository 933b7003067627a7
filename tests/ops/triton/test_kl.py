"""The indexers' loss and its gradients equal the plain ones, taken in fp64, on drawn shapes."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.drawing import apart, deterministic, draw_selection

triton = pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from nanoglm.ops import kl as plain  # noqa: E402
from nanoglm.ops.triton import kl  # noqa: E402

drawn = settings(deadline=None, max_examples=int(os.environ.get("DRAWN_CASES", "50")), derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@drawn
@given(
    st.integers(1, 2), st.integers(1, 6), st.integers(0, 70), st.integers(1, 70), st.integers(1, 20),
    st.integers(1, 40), st.integers(1, 20), st.integers(1, 70), st.integers(1, 3), DTYPES, st.booleans(),
    st.booleans(), st.sampled_from([1, 3000, 1 << 28]), st.integers(0, 99),
)  # fmt: skip
def test_loss_and_gradients_equal_plain_ones(
    device, sequences, length, before, k, index_heads, dim, heads, main_dim, teachers, dtype, views, ordered, scratch,
    seed,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    rows, keys = sequences * length, sequences * (before + length)
    chosen = draw_selection([before + i for i in range(length)] * sequences, k)
    # Weights are fp32 in the model; scores about as large as there, else one key takes all.
    inputs = [
        torch.randn(rows, index_heads, dim).to(dtype),
        torch.randn(rows, index_heads) * (dim * index_heads) ** -0.5,
    ]
    inputs.append(torch.randn(keys, dim).to(dtype))
    queries = [torch.randn(rows, heads + i, main_dim).to(dtype) for i in range(teachers)]
    teacher_keys = [torch.randn(keys, main_dim + 3).to(dtype)[:, :main_dim] for _ in range(teachers)]
    if views:
        inputs[0], queries[0] = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (inputs[0], queries[0]))
    rest = length, before, main_dim**-0.5, chosen
    wide = [[x.double() for x in each] for each in (inputs, queries, teacher_keys)]
    expected = plain.indexer_kl(*wide[0], *wide[1:], *rest)
    moved = [[x.to(device) for x in each] for each in (inputs, queries, teacher_keys)]
    with patch.object(kl, "SCRATCH", scratch), deterministic(ordered):  # in one chunk or many
        found = kl.indexer_kl(*moved[0], *moved[1:], *rest[:3], chosen.to(device))
    assert all(x.dtype == torch.float32 for x in found)
    # The sum itself may cancel to nothing: p is known to a rounding, and as much moves the loss.
    assert abs(float(found[0]) - float(expected[0])) < LIMIT[dtype] * max(float(expected[0]), 1e-2 * rows)
    # A product near 0 may fall on the other side of the ReLU, whose gradient jumps there.
    if (torch.einsum("tji,si->tjs", wide[0][0], wide[0][2]).abs() < 1e-5).any():
        return
    for x, a, b in zip(inputs, found[1:], expected[1:], strict=True):
        assert a.shape == x.shape and apart(a, b) < LIMIT[dtype]


def test_bits_are_the_same_every_time_if_asked(device: torch.device) -> None:
    torch.manual_seed(0)
    rows, k = (16, 16) if device.type == "cpu" else (512, 128)
    chosen = torch.arange(k).int().expand(rows, k).contiguous().to(device)  # where atomics would meet
    shapes = (rows, 8, 16), (rows, 8), (rows + k, 16)
    inputs, main = [torch.randn(*s).to(device) for s in shapes], torch.randn(rows, 4, 20).to(device)
    main_keys = torch.randn(rows + k, 20).to(device)
    with deterministic(True):
        first, *others = (kl.indexer_kl(*inputs, [main], [main_keys], rows, k, 0.2, chosen) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("selected", [False, True])
def test_what_has_no_kernel_is_plain(device: torch.device, selected: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*s).to(device) for s in ((6, 2, 8), (6, 2), (8, 8))]
    main, main_keys = [torch.randn(6, 3, 5).to(device)], [torch.randn(8, *([3] * selected), 5).to(device)]
    rest = 3, 1, 0.3, draw_selection([1, 2, 3] * 2, 4).to(device) if selected else None
    found, expected = (f.indexer_kl(*inputs, main, main_keys, *rest) for f in (kl, plain))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_of_nothing(device: torch.device) -> None:
    inputs = [torch.ones(*s, device=device) for s in ((0, 2, 8), (0, 2), (5, 8))]
    main, main_keys = [torch.ones(0, 3, 5, device=device)], [torch.ones(5, 5, device=device)]
    chosen = torch.ones(0, 4, dtype=torch.int32, device=device)
    found = kl.indexer_kl(*inputs, main, main_keys, 3, 2, 1.0, chosen)
    assert [x.shape for x in found[1:]] == [x.shape for x in inputs] and not any(x.any() for x in found)
