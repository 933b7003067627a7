"""RMSNorm, RoPE and SwiGLU equal their plain versions on drawn shapes, and so does what they write into a cache."""

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
from nanoglm.ops.triton import select  # noqa: E402

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
    x[..., 2 * half :][x[..., 2 * half :] > 1] = torch.inf  # what stays is copied
    arguments = angles.cos(), angles.sin()
    given_x, turns = x.to(device)[..., :width], tuple(a.to(device) for a in arguments)
    found = kernels.rotate(given_x, *turns)
    assert found.shape == (*shape[:-1], width)
    if count:
        exact = torch_tiled.rotate(x[..., : 2 * half].double(), *(a.double() for a in arguments))
        close(found[..., : 2 * half], exact)
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


@drawn
@given(
    st.integers(0, 9), st.integers(1, 300), st.integers(1, 20), st.integers(0, 5), st.sampled_from([1, 7, 64]),
    DTYPES, st.integers(0, 99),
)  # fmt: skip
def test_write_latent(device, count, latent, half, beside, page, dtype, seed) -> None:
    """To drawn places; what lies beside them stays."""
    torch.manual_seed(seed)
    kv, weight = torch.randn(count, latent + 2 * half + beside).to(dtype)[:, beside:], torch.randn(latent).to(dtype)
    angles, slots = torch.randn(count, half), torch.randperm(12 * page)[:count]
    cos, sin = angles.cos(), angles.sin()
    pool = torch.full((12, page, latent + 2 * half), 7.0, dtype=dtype, device=device)
    moved = [x.to(device) for x in (kv, weight, cos, sin, slots)]
    kernels.write_latent(pool, *moved[:2], 1e-5, *moved[2:])
    found = pool.flatten(0, 1).cpu()
    wide = kv.double()
    normed = torch_tiled.rms_norm(wide[:, :latent], weight.double(), 1e-5)
    if count:
        close(found[slots][:, :latent].to(device), normed)
        close(found[slots][:, latent:].to(device), torch_tiled.rotate(wide[:, latent:], cos.double(), sin.double()))
    found[slots] = 7
    assert bool((found == 7).all())


def index_keys(count: int, half: int, unturned: int, beside: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Keys, weight, bias, cos and sin."""
    dim, angles = 2 * half + unturned, torch.randn(count, half)
    keys = torch.randn(count, dim + beside).add(0.3).to(dtype)[:, beside:]
    return keys, torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), angles.cos(), angles.sin()


def finished(keys, weight, bias, cos, sin) -> torch.Tensor:
    """In fp64, but rounded where the kernels round."""
    normed = torch_tiled.layer_norm(keys.double(), weight.double(), bias.double(), 1e-6).to(keys.dtype).double()
    return torch_tiled.rotate(normed, cos.double(), sin.double())


@drawn
@given(
    st.integers(0, 9), st.integers(1, 40), st.integers(0, 90), st.integers(0, 5), st.sampled_from([1, 7, 64]),
    DTYPES, st.integers(0, 99),
)  # fmt: skip
def test_write_index_keys(device, count, half, unturned, beside, page, dtype, seed) -> None:
    torch.manual_seed(seed)
    given_keys, slots = index_keys(count, half, unturned, beside, dtype), torch.randperm(12 * page)[:count]
    pool = torch.full((12, page, 2 * half + unturned), 7.0, dtype=dtype, device=device)
    moved = [x.to(device) for x in (*given_keys, slots)]
    kernels.write_index_keys(pool, *moved[:3], 1e-6, *moved[3:])
    found = pool.flatten(0, 1).cpu()
    if count:
        expected = finished(*given_keys)
        limit = 1e-5 if dtype == torch.float32 else 2**-7 if device.type == "cuda" else 2**-5  # two roundings
        assert float((found[slots].double() - expected).abs().max()) <= limit * float(expected.abs().max())
    found[slots] = 7
    assert bool((found == 7).all())


@drawn
@given(
    st.integers(1, 9), st.integers(1, 20), st.integers(0, 90), st.sampled_from([-9, 0, 9]), DTYPES, st.integers(0, 99)
)
def test_write_fp8_index_keys(device, count, half, unturned, size, dtype, seed) -> None:
    """Scales are those of the keys that other kernels would have written, which are quantised as they are."""
    torch.manual_seed(seed)
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no FP8")
    unturned += -(2 * half + unturned) % 4
    keys, weight, bias, *turn = index_keys(count, half, unturned, 0, dtype)
    weight, bias, dim = weight * 2.0**size, bias * 2.0**size, 2 * half + unturned
    slots = torch.randperm(3 * 64)[:count]
    moved = [x.to(device) for x in (keys, weight, bias, *turn, slots)]
    plain = torch.zeros(3, 64, dim, dtype=dtype, device=device)
    kernels.write_index_keys(plain, *moved[:3], 1e-6, *moved[3:])
    pools = [select.fp8_pool(3, 64, dim, device).fill_(127) for _ in range(2)]
    kernels.write_index_keys(pools[0], *moved[:3], 1e-6, *moved[3:])
    select.append_fp8(pools[1], plain.flatten(0, 1)[moved[-1]], moved[-1])
    (found, scale), (expected, expected_scale) = ([x.cpu() for x in select.halves(pool)] for pool in pools)
    assert torch.equal(scale, expected_scale)
    a, b = found.view(torch.uint8).int(), expected.view(torch.uint8).int()
    if device.type == "cpu":  # the interpreter rounds ties up, loses what it carries, and of the smallest numbers more
        near = ((a - b).abs() <= 1) | (b % 8 == 0) & (a == b - 8) | (b % 128 <= 8) & ((a - b).abs() <= 4)
        a = torch.where(near, b, a)
    assert torch.equal(a, b)
