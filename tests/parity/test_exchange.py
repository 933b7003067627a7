"""Checkpoints to and from transformers, and the published counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import nanoglm
from nanoglm.config import GLMConfig
from nanoglm.model import GLM
from nanoglm.verify.oracle import hf, pair, randomise, transformers
from nanoglm.weights import Checkpoint, save

IDS = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def model() -> GLM:
    return pair(GLMConfig.preset("tiny"), 1)[1]


@torch.no_grad()
def same_logits(theirs, ours: GLM) -> None:
    expected = theirs(torch.tensor([IDS])).logits[0]
    found = nanoglm.Model(ours, None).logits([IDS])[0]
    assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) <= 1e-5


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_ours_loads_in_transformers(model: GLM, tmp_path: Path, mtp: bool, layout: str) -> None:
    """No missing key; none unexpected but those of the MTP layer, and without it none at all."""
    save(model, tmp_path, dtype=torch.float32, mtp=mtp, layout=layout, shard_bytes=400_000)
    theirs, report = hf.GlmMoeDsaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"]
    unexpected = set(report["unexpected_keys"])
    assert bool(unexpected) == mtp and all(key.startswith("model.layers.4.") for key in unexpected)
    same_logits(theirs.eval(), model)


def test_theirs_loads_in_ours(tmp_path: Path) -> None:
    theirs, _ = pair(GLMConfig.preset("tiny"), 2)
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    ours, report = Checkpoint(tmp_path, latent_norm_eps=1e-6).load()
    assert not report.ignored and ours.config.num_nextn_predict_layers == 0
    same_logits(theirs, ours)


def test_bf16_keeps_the_router_bias_in_fp32(model: GLM, tmp_path: Path) -> None:
    save(model, tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # no dict
    assert {dtype for name, dtype in dtypes.items() if name.endswith("e_score_correction_bias")} == {"F32"}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("e_score_correction_bias")} == {"BF16"}


@pytest.mark.parametrize("preset", ["nano", "glm-5", "glm-5.2"])
def test_our_config_is_theirs(preset: str, tmp_path: Path) -> None:
    config = GLMConfig.preset(preset)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GlmMoeDsaConfig"
    assert tuple(theirs.indexer_types) == config.indexer_types
    assert tuple(theirs.mlp_layer_types) == config.mlp_layer_types
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.head_dim == config.qk_rope_head_dim


def count(preset: str, layer: int | None = None) -> tuple[int, int]:
    """Tensors and values of a preset's checkpoint, or of one layer of it."""
    shapes = nanoglm.load(preset, device="meta").checkpoint_tensors()
    prefix = "" if layer is None else f"model.layers.{layer}."
    chosen = [shape for name, shape in shapes.items() if name.startswith(prefix)]
    return len(chosen), sum(torch.Size(shape).numel() for shape in chosen)


def test_glm_52_has_the_published_tensors() -> None:
    total, values = count("glm-5.2")
    mtp, mtp_values = count("glm-5.2", 78)
    assert (total, values) == (59_585, 753_329_940_480)
    assert (mtp, mtp_values) == (791, 9_952_920_576)
    assert values - mtp_values == 743_377_019_904
    names = nanoglm.load("glm-5.2", device="meta").checkpoint_tensors()
    owners = {int(name.split(".")[2]) for name in names if ".indexer." in name}
    assert owners == {0, 1, 2, *range(6, 75, 4), 78}


def test_glm_5_has_the_published_parameters() -> None:
    assert count("glm-5")[1] == 753_864_139_008


def test_copied_indexers_on_shared_layers_are_tolerated(model: GLM, tmp_path: Path) -> None:
    """Trap 9 and spec 4.2: some files carry them; they are reported and never run."""
    full = GLM(model.config.replace(indexer_types=("full",) * 4)).initialise()
    randomise(full, 9)
    full.load_state_dict(model.state_dict(), strict=False)
    save(full, tmp_path, dtype=torch.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"indexer_types": ["full", "shared"] * 2, "index_topk_freq": 2, "index_skip_topk_offset": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded, report = Checkpoint(tmp_path).load()
    assert len(report.ignored) == 10 and loaded.layers[1].self_attn.indexer is None
    found, expected = (nanoglm.Model(m, None).logits([IDS])[0] for m in (loaded, model))
    assert torch.equal(found, expected)
