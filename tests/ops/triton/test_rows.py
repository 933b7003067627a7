"""RMSNorm, RoPE and SwiGLU equal their plain versions on drawn shapes."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from nanoglm.ops import torch_tiled  # noqa: E402
from nanoglm.ops.triton import rows as kernels  # noqa: E402

drawn = settings(deadline=None, max_examples=int(os.environ.get("DRAWN_CASES", "50")), derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To half a step of the dtype; the interpreter cuts bf16 off instead of rounding it, so there to a whole one."""
    limit = 1e-6 if found.dtype == torch.float32 else 2**-8 if found.is_cuda else 2**-7
    assert float((found.cpu().double() - expected).abs().max()) <= limit * float(expected.abs().max()) + 1e-12


@drawn
@given(st.integers(0, 9), st.integers(1, 300), st.integers(0, 5), DTYPES, st.integers(0, 99))
def test_rms_norm(device, count, dim, beside, dtype, seed) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(count, dim + beside).to(dtype), torch.randn(dim).to(dtype)
    found = kernels.rms_norm(x.to(device)[:, :dim], weight.to(device), 1e-5)
    assert found.shape == (count, dim) and found.is_contiguous()
    if count:
        close(found, torch_tiled.rms_norm(x[:, :dim].double(), weight.double(), 1e-5))


@drawn
@given(
    st.integers(0, 9), st.integers(0, 5), st.integers(1, 20), st.integers(0, 9), st.integers(0, 3), DTYPES,
    st.integers(0, 99),
)  # fmt: skip
def test_rotate(device, count, heads, half, beyond, beside, dtype, seed) -> None:
    """Of one vector a row (no heads), or of some; with dims that stay; as slices of something wider."""
    torch.manual_seed(seed)
    width = 2 * half + beyond
    shape = (count, heads, width + beside) if heads else (count, width + beside)
    x, angles = torch.randn(shape).to(dtype), torch.randn(count, half)
    arguments = angles.cos(), angles.sin()
    given_x, turns = x.to(device)[..., :width], tuple(a.to(device) for a in arguments)
    found = kernels.rotate(given_x, *turns)
    assert found.shape == (*shape[:-1], width)
    if count:
        close(found, torch_tiled.rotate(x[..., :width].double(), *(a.double() for a in arguments)))
        assert torch.equal(found[..., 2 * half :], given_x[..., 2 * half :])
        taken = given_x.contiguous().clone()
        assert kernels.rotate(taken, *turns, reuse=True) is taken and torch.equal(taken, found)


@drawn
@given(st.integers(0, 9), st.integers(1, 300), DTYPES, st.integers(0, 99))
def test_swiglu(device, count, dim, dtype, seed) -> None:
    torch.manual_seed(seed)
    gate, up = (3 * torch.randn(count, dim).to(dtype) for _ in range(2))
    found = kernels.swiglu(gate.to(device), up.to(device))
    if count:
        close(found, torch_tiled.silu(gate.double()) * up.double())
