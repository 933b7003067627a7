"""plan against the published figures (architecture spec 5 to 7, quantisation spec 5)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.memory import parse_bytes
from nanoglm.plan import FORMATS, place, plan, tiers

MILLION = 1_048_576


@pytest.fixture(scope="module")
def glm() -> GLMConfig:
    return GLMConfig.preset("glm-5.2")


def test_glm_52_at_a_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "glm-5.2", "--length", str(MILLION), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 753_329_940_480
    assert found["parameters"]["without_mtp"] == 743_377_019_904
    assert found["parameters"]["active"] == 39_347_358_720
    assert found["parameters"]["active_with_head"] == 40_298_941_440
    assert found["parameters"]["all_full"] == 753_864_139_008  # GLM-5's
    flops = found["flops_per_token"]
    assert round(flops["ratio_without_attention_and_head"], 3) == 2.894
    assert round(flops["ratio"], 2) == 2.73
    assert (round(flops["indexshare"] / 1e8), round(flops["all_full"] / 1e8)) == (2832, 7739)
    cache = {name: round(value / 1e9, 2) for name, value in found["cache_bytes"].items()}
    assert cache == {"latent": 94.22, "index": 5.64, "total": 99.86, "mtp": 1.48, "index_all_full": 20.94}
    assert round(found["weight_bytes"]["bf16"] / 1e9, 2) == 1506.66
    assert round(found["weight_bytes"]["fp8"] / 1e9, 1) == 755.6
    assert (found["tensors"], found["tensors_fp8"]) == (59_585, 118_629)
    assert found["placement"] == {}


@pytest.mark.parametrize(
    ("length", "full", "shared"), [(32_768, 124.9, 108.5), (131_072, 187.7, 125.4), (202_752, 233.5, 137.7)]
)
def test_flops_at_other_lengths(glm: GLMConfig, length: int, full: float, shared: float) -> None:
    flops = plan(glm, length)["flops_per_token"]
    assert round(flops["all_full"] / 1e9, 1) == full and round(flops["indexshare"] / 1e9, 1) == shared


def test_below_k_tokens_all_are_attended() -> None:
    """32 tokens of `tiny` (k = 16) read 16 rows a layer, 8 tokens read 8."""
    config = GLMConfig.preset("tiny")
    at = {n: plan(config, n)["flops_per_token"]["indexshare"] for n in (8, 16, 32)}
    scoring, row = 2 * 2 * 8 * 16, 4 * 2 * 2 * (32 + 8 + 32)  # two indexers of 8 x 16; 4 layers of 2 heads
    assert at[16] - at[8] == 8 * (scoring + row) and at[32] - at[16] == 16 * scoring


def test_what_fits_where(glm: GLMConfig) -> None:
    """Quantisation spec 5: bytes per expert and bounds at 4.25 bits and FP8."""
    found = tiers("24GB", "64GB", "504GB/s", "50GB/s", "3GB/s")
    bound = place(glm, 2048, "int4_g64", found)
    held = {tier.name: {part: round(n / 1e9, 1) for part, n in tier.held.items()} for tier in found}
    assert [t.capacity for t in found[:2]] == [24e9, 64e9]
    assert sum(found[0].held.values()) == pytest.approx(24e9) and sum(found[1].held.values()) == pytest.approx(64e9)
    assert list(held["memory"]) == ["dense part", "cache", "experts"] and list(held["ram"]) == ["experts"]
    routed = sum(t.held.get("experts", 0) for t in found)
    assert routed / 1e9 == pytest.approx(385, abs=0.5)
    disk = found[2].held["experts"] / routed * 12.03e9 / 3e9
    assert bound == pytest.approx(1 / disk, rel=1e-3)
    only_disk = tiers(ram="1B", ram_bandwidth="1TB/s", disk_bandwidth="3GB/s")
    place(glm, 1, "fp8", only_disk)
    assert only_disk[1].read / 1e9 == pytest.approx(22.65 + 18.6, abs=0.5)  # spec: routed 22.65, dense 17.7 + bf16 head


def test_no_bandwidth_no_bound(glm: GLMConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert place(glm, 2048, "fp8", tiers("12GB", "64GB", "504GB/s")) is None
    main(["plan", "glm-5.2", "--memory", "12GB", "--ram", "64GB"])
    out = capsys.readouterr().out
    assert out.count("give the bandwidths") == len(FORMATS) and "753,329,940,480 with MTP" in out


def test_all_in_one_memory_is_bound_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "tiny", "--length", "64", "--memory", "1GB", "--memory-bandwidth", "1GB/s", "--json"])
    found = json.loads(capsys.readouterr().out)["placement"]["bf16"]
    assert list(found["held"]["memory"]) == ["dense part", "cache", "experts"] and found["held"]["disk"] == {}
    assert found["tokens_per_second_at_most"] == pytest.approx(1e9 / found["read_per_token"]["memory"])


def test_a_path_is_as_good_as_a_preset(tmp_path: Path, glm: GLMConfig, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(glm.to_dict()))
    for path in (tmp_path, tmp_path / "config.json"):
        main(["plan", str(path), "--length", "4096", "--json"])
        assert json.loads(capsys.readouterr().out)["parameters"] == plan(glm, 4096)["parameters"]


@pytest.mark.parametrize(
    ("text", "value"), [("12GB", 12e9), ("64GiB", 64 * 2**30), ("1.5TB/s", 1.5e12), ("7 B", 7), ("3KiB", 3072)]
)
def test_sizes(text: str, value: float) -> None:
    assert parse_bytes("ram", text) == value


@pytest.mark.parametrize("text", ["12", "GB", "-1GB", "0GB", "12gb", "5iB", "1e9B"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="ram is .* expected a size such as 12GB or 64GiB"):
        parse_bytes("ram", text)


def test_length_is_positive(glm: GLMConfig) -> None:
    with pytest.raises(InputError, match="length is 0; expected at least 1"):
        plan(glm, 0)
