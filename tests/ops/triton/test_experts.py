"""Routed experts on a GPU, or interpreted, equal the plain form in fp64 on drawn cases."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanoglm.ops import torch_tiled
from nanoglm.ops.triton import experts as kernels

drawn = settings(deadline=None, max_examples=int(os.environ.get("DRAWN_CASES", "50")), derandomize=True)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Few sizes, since kernels are compiled anew for sizes that are or are not multiples of 16 and of their blocks.
SIZES = st.sampled_from([16, 37, 64, 100])
# tokens, experts, k, D, W, how unevenly experts are favoured, dtype, seed
CASES = st.tuples(
    st.integers(1, 12) | st.integers(13, 90), st.integers(1, 7), st.sampled_from([1, 2, 5]), SIZES, SIZES,
    st.sampled_from([0, 1, 9]), st.sampled_from(list(LIMITS)), st.integers(0, 99),
)  # fmt: skip


def inputs(
    tokens: int, count: int, k: int, dim: int, width: int, uneven: int, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """grad, x, ids, weights, gate_up, down."""
    torch.manual_seed(seed)
    scores = torch.randn(tokens, count) + uneven * torch.randn(count)
    ids = scores.topk(min(k, count)).indices
    shapes = (tokens, dim), (tokens, dim), (count, 2 * width, dim), (count, dim, width)
    grad, x, gate_up, down = (torch.randn(shape) for shape in shapes)
    gate_up, down, weights = gate_up * dim**-0.5, down * width**-0.5, torch.rand(ids.shape) + 0.1
    return [grad.to(dtype), x.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype)]


def as_double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def error(found: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    size = expected.norm() if size is None else size
    return float((found.cpu().double() - expected).norm() / size.clamp(min=1e-9))


def forward_equals(case: tuple[Any, ...], device: torch.device) -> None:
    _, *arguments = inputs(*case)
    found = kernels.experts(*(t.to(device) for t in arguments))
    assert found.dtype == arguments[0].dtype and found.device.type == device.type
    assert error(found, torch_tiled.experts(*as_double(arguments))) < LIMITS[found.dtype]


def backward_equals(case: tuple[Any, ...], device: torch.device) -> None:
    arguments = inputs(*case)
    found = kernels.experts_backward(*(t.to(device) for t in arguments))
    grad, x, ids, weights, gate_up, down = as_double(arguments)
    expected = torch_tiled.experts_backward(grad, x, ids, weights, gate_up, down)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        size = b.norm()
        if b is expected[1]:  # a single product of grad and an expert's result may cancel: what such products measure
            grads, rows = (t.repeat_interleave(ids.shape[1], 0) for t in (grad, x))
            results = torch_tiled.experts(rows, ids.view(-1, 1), torch.ones(len(rows), 1).double(), gate_up, down)
            size = (grads.norm(dim=1) * results.norm(dim=1)).norm() / grad.shape[1] ** 0.5
        assert error(a, b, size) < LIMITS[arguments[0].dtype]
    assert [t.dtype for t in found] == [t.dtype for t in (arguments[1], *arguments[3:])]
    unused = ids.flatten().bincount(minlength=len(down)) == 0
    assert not found[2].cpu()[unused].any() and not found[3].cpu()[unused].any()


@drawn
@given(CASES)
def test_experts_equal_the_plain_form(device: torch.device, case: tuple[Any, ...]) -> None:
    forward_equals(case, device)


@drawn
@given(CASES)
def test_gradients_equal_the_plain_form(device: torch.device, case: tuple[Any, ...]) -> None:
    backward_equals(case, device)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_several_tiles_of_an_expert(device: torch.device, dtype: torch.dtype) -> None:
    """More rows than the largest tiles hold."""
    case = 300, 2, 1, 192, 130, 1, dtype, 0
    forward_equals(case, device)
    backward_equals(case, device)


@drawn
@given(
    st.integers(1, 70) | st.sampled_from([300, 700]), st.integers(1, 9), st.integers(1, 40),
    st.sampled_from([16, 64]), st.integers(0, 99),
)  # fmt: skip
def test_plan_covers_every_slot_once(device: torch.device, tokens: int, k: int, count: int, rows: int, seed: int):
    torch.manual_seed(seed)
    ids = torch.randint(count, (tokens, k))  # a row may even choose an expert twice
    to = kernels.plan(ids.to(device), count, rows)
    assert torch.equal(to.order.cpu().long(), ids.flatten().argsort(stable=True))
    counts = ids.flatten().bincount(minlength=count)
    assert to.borders.tolist() == [0, *counts.cumsum(0).tolist()]
    place = 0
    for expert, begin, size in to.tiles.T.tolist():
        if size:
            assert begin == place and 0 < size <= rows
            assert (ids.flatten()[to.order.cpu()[begin : begin + size].long()] == expert).all()
            place += size
    assert place == ids.numel()


def example(tokens: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes: Any = (tokens, 64), (tokens, 64), (tokens, 3), (5, 96, 64), (5, 64, 48)
    grad, x, weights, gate_up, down = (torch.randn(shape, device=device) * 0.2 for shape in shapes)
    ids = torch.rand(tokens, 5, device=device).topk(3).indices
    return [grad.to(dtype), x.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype)]


def test_no_rows(device: torch.device) -> None:
    grad, *rest = example(0, device)
    assert kernels.experts(*rest).shape == (0, 64)
    found = kernels.experts_backward(grad, *rest)
    assert [t.shape for t in found] == [t.shape for t in (rest[0], *rest[2:])]
    assert not any(t.any() for t in found)


def test_views_are_read_as_they_stand(device: torch.device) -> None:
    """Arguments that are not contiguous."""
    arguments = example(40, device)
    expected = kernels.experts(*arguments[1:]), *kernels.experts_backward(*arguments)
    views = [torch.stack([t, t], -1)[..., 0] for t in arguments]
    found = kernels.experts(*views[1:]), *kernels.experts_backward(*views)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_call_repeated_gives_the_same_bits(device: torch.device) -> None:
    arguments = example(100, device, torch.bfloat16)
    first, second = ((kernels.experts(*arguments[1:]), *kernels.experts_backward(*arguments)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(torch.version.hip is not None, reason="grouped_mm is made for CUDA")
def test_grouped_mm_gives_the_same(device: torch.device) -> None:
    for tokens in (2, 100):
        arguments = example(tokens, device, torch.bfloat16)[1:]
        expected = torch_tiled.experts(*as_double([t.cpu() for t in arguments]))
        assert error(kernels.experts_by_grouped_mm(*arguments), expected) < 1e-2
