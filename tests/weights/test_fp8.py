"""FP8 blocks: the bound of every element, the fifth scale row of 576, and checkpoints in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import nanoglm
from nanoglm.config import GLMConfig
from nanoglm.errors import CheckpointError, ConfigError
from nanoglm.model import GLM
from nanoglm.weights import Checkpoint, checkpoint_tensors, fp8, save
from nanoglm.weights.names import FP8

UE8M0 = torch.float8_e8m0fnu


def blockwise(scale: Tensor, shape: torch.Size) -> Tensor:
    """Each element's scale, by the definition: element [i, j] belongs to block [i // 128, j // 128]."""
    rows, columns = torch.arange(shape[-2]) // 128, torch.arange(shape[-1]) // 128
    return scale.double()[..., rows[:, None], columns]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.sampled_from([torch.float32, UE8M0]), st.integers(-20, 20),
    st.integers(0, 2**20), st.sampled_from([(), (3,)]),
)  # fmt: skip
def test_every_element_is_within_half_a_step(
    rows: int, columns: int, scale_dtype: torch.dtype, magnitude: int, seed: int, leading: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, rows, columns, generator=generator) * 10.0**magnitude
    x *= torch.rand(*leading, rows, columns, generator=generator) ** 8  # many of them tiny
    values, scale = fp8.quantise(x, scale_dtype)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == fp8.scale_shape(x.shape)
    found = fp8.dequantise(values, scale, torch.empty_like(x))
    each = blockwise(scale.float(), x.shape)
    assert torch.equal(found, (values.double() * each).float())  # the formula, element by element
    error = (x.double() - values.double() * each).abs()
    bound = torch.maximum(x.double().abs() / 16, each / 1024) * (1 + 1e-6)  # x / scale is rounded to fp32 first
    assert bool((error <= bound).all())
    if scale_dtype == UE8M0:
        mantissa, _ = torch.frexp(scale.float())
        assert bool((mantissa == 0.5).all())
    largest = torch.zeros_like(each[..., ::128, ::128])
    for i in range(largest.shape[-2]):
        for j in range(largest.shape[-1]):
            block = x[..., 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            largest[..., i, j] = block.abs().amax((-2, -1)).double()
    ratio = scale.double() if scale_dtype == torch.float32 else scale.float().double()
    wanted = largest / 448
    if scale_dtype == torch.float32:
        assert torch.allclose(ratio, wanted, rtol=1e-6, atol=0)
    else:
        assert bool(((ratio >= wanted * (1 - 1e-6)) & (ratio < 2 * wanted * (1 + 1e-6))).all())


def test_576_rows_have_a_fifth_scale_row() -> None:
    """Trap 13: 576 / 128 = 4.5; the last block covers 64 rows, here far larger than the others."""
    x = torch.randn(576, 256, generator=torch.Generator().manual_seed(0))
    x[512:] *= 1000
    values, scale = fp8.quantise(x)
    assert scale.shape == (5, 2) and float(scale[4].min()) > 100 * float(scale[:4].max())
    found = fp8.dequantise(values, scale, torch.empty_like(x))
    assert float((found - x).abs().max() / x[512:].abs().max()) < 0.04
    assert float((found[512:] - x[512:]).norm() / x[512:].norm()) < 0.03


def test_a_zero_block_stays_zero() -> None:
    values, scale = fp8.quantise(torch.zeros(130, 5))
    assert torch.equal(scale, torch.ones(2, 1)) and not values.float().any()


# ------------------------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def model() -> GLM:
    """kv_a_proj_with_mqa has 576 rows, as in GLM-5.2."""
    config = GLMConfig.preset("tiny").replace(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=64)
    return GLM(config).initialise(1)


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file means, by the formula alone."""
    out = {}
    for name, tensor in tensors.items():
        if name + "_scale_inv" in tensors:
            raw = tensors[name + "_scale_inv"]
            scale = torch.exp2(raw.float() - 127) if raw.dtype == torch.uint8 else raw.float()
            out[name] = (tensor.double() * blockwise(scale, tensor.shape)).float()
        elif not name.endswith("_scale_inv"):
            out[name] = tensor.float()
    return out


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, UE8M0], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_round_trip(tmp_path: Path, model: GLM, layout, scale_dtype: torch.dtype, shard_bytes: int) -> None:
    save(model, tmp_path, dtype=fp8.DTYPE, scale_dtype=scale_dtype, layout=layout, shard_bytes=shard_bytes)
    files: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        files |= load_file(file)
    scaled = {n for n in files if n.endswith("_scale_inv")}
    assert {n.removesuffix("_scale_inv") for n in scaled} == {n for n in files if FP8.fullmatch(n)}
    assert {files[n].dtype for n in scaled} == {scale_dtype}
    assert files["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 1)
    loaded, report = Checkpoint(tmp_path).load()
    assert (report.missing, report.unexpected, report.ignored) == ([], [], [])
    state = loaded.state_dict() if layout == "stacked" else checkpoint_tensors(loaded)
    meant = dequantised(files)
    assert meant.keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in meant.items())
    # What was quantised once stays: FP8 values and scales come back bit for bit from fp32.
    save(loaded, tmp_path / "again", dtype=fp8.DTYPE, scale_dtype=scale_dtype, layout=layout)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == files.keys()
    assert all(torch.equal(dequantised(again)[n], meant[n]) for n in meant)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128] and quantization["quant_method"] == "fp8"
    assert ("scale_fmt" in quantization) == (scale_dtype == UE8M0)


def test_fp8_is_decided_by_the_scales(tmp_path: Path, model: GLM) -> None:
    """Trap 13: the published list excludes `indexers_proj`, which no tensor is called."""
    save(model, tmp_path, dtype=fp8.DTYPE)
    raw = json.loads((tmp_path / "config.json").read_text())
    before = Checkpoint(tmp_path).load()[0].state_dict()
    for change in (
        {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"]},
        {"modules_to_not_convert": ["model.layers.0"]},
        None,
    ):
        config = dict(raw) | ({} if change is None else {"quantization_config": raw["quantization_config"] | change})
        if change is None:
            del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        after = Checkpoint(tmp_path).load()[0].state_dict()
        assert all(torch.equal(before[n], after[n]) for n in before)


def test_scale_bytes_called_u8_are_exponents(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, dtype=fp8.DTYPE, scale_dtype=UE8M0)
    before = Checkpoint(tmp_path).load()[0].state_dict()
    file = tmp_path / "model.safetensors"
    tensors = {n: t.view(torch.uint8) if t.dtype == UE8M0 else t for n, t in load_file(file).items()}
    save_file(tensors, file)
    after = Checkpoint(tmp_path).load()[0].state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_kv_b_is_dequantised_before_absorption(tmp_path: Path, model: GLM) -> None:
    """Trap 13: the absorbed form splits kv_b_proj by head, which cuts through its blocks."""
    save(model, tmp_path, dtype=fp8.DTYPE)
    loaded, _ = Checkpoint(tmp_path).load()
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    meant = dequantised({n: tensors[n] for n in (name, name + "_scale_inv")})[name]
    w_uk, w_uv = loaded.layers[1].self_attn._up()
    heads = meant.view(model.config.num_attention_heads, -1, meant.shape[1])
    nope = model.config.qk_nope_head_dim
    assert torch.equal(w_uk, heads[:, :nope]) and torch.equal(w_uv, heads[:, nope:])
    ids = [[i % 320 for i in range(60)]]
    lm = nanoglm.Model(loaded, None)
    assert torch.allclose(lm.logits(ids)[0], lm.logits(ids, attention="masked")[0], atol=1e-4)


WEIGHT = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(WEIGHT + "_scale_inv"), rf"{WEIGHT} has dtype F8_E4M3; expected one of F32, BF16, F16"),
        (lambda t: t.update({WEIGHT + "_scale_inv": torch.ones(2, 1)}), r"scale_inv has shape \[2, 1\]; expected \[1"),
        (lambda t: t.update({WEIGHT + "_scale_inv": torch.ones(1, 1).half()}), r"scale_inv has dtype F16; expected"),
        (lambda t: t.update({WEIGHT + "_scale_inv": torch.full((1, 1), torch.nan)}), r"not finite"),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].float()}),
            rf"{WEIGHT} has dtype F32; expected one of F8_E4M3 with .*_scale_inv beside it",
        ),
    ],
)
def test_a_damaged_fp8_checkpoint_is_one_sentence(tmp_path: Path, model: GLM, change, words: str) -> None:
    save(model, tmp_path, dtype=fp8.DTYPE)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        Checkpoint(tmp_path).load()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; expected 'fp8'"),
        ({"weight_block_size": [1, 32]}, r"weight_block_size is \[1, 32\]; expected \[128, 128\]"),
    ],
)
def test_another_quantisation_is_refused(tmp_path: Path, model: GLM, change: dict[str, object], words: str) -> None:
    save(model, tmp_path, dtype=fp8.DTYPE)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=words):
        Checkpoint(tmp_path)
