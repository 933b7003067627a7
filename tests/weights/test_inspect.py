"""inspect tells a real index file apart without its shards, and a damaged one by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from weights.sparse import sparse_checkpoint

import nanoglm
from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.weights import Checkpoint
from nanoglm.weights.fp8 import scale_shape
from nanoglm.weights.names import FP8


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and index file of GLM-5.2-FP8 as spec 4 describes them; no shards."""
    folder = tmp_path_factory.mktemp("index")
    names = nanoglm.load("glm-5.2", device="meta").checkpoint_tensors()
    names = [*names, *(n + "_scale_inv" for n in names if FP8.fullmatch(n))]
    index = {"metadata": {"total_size": 755_617_140_416}, "weight_map": {}}
    index["weight_map"] = {
        n: f"model-{i * 141 // len(names) + 1:05d}-of-00141.safetensors" for i, n in enumerate(names)
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(GLMConfig.preset("glm-5.2").to_dict()))
    return folder


def inspected(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, str]:
    main(["inspect", str(folder)])
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_published_index_file(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(capsys, published)
    assert shown["names"] == "118,629, 59,044 of them scales of FP8 blocks of 128 x 128"
    assert (shown["missing"], shown["unexpected"]) == ("0", "0")
    assert shown["schedule"] == "FFF" + "SSSF" * 18 + "SSS"
    assert shown["files"].startswith("0 of 141 here")
    assert shown["size"].endswith("(755.62 GB) by the configuration")
    assert shown["size by the index"].endswith("(755.62 GB)")


def test_an_index_file_that_does_not_fit(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((published / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.layers.3.self_attn.indexer.wk.weight"] = "model-00001-of-00141.safetensors"
    index["weight_map"]["model.rotary"] = "model-00001-of-00141.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(tmp_path)])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert re.search(r"missing +1: model\.norm\.weight\n", out)
    assert re.search(r"unexpected +1: model\.rotary\n", out)
    assert re.search(r"ignored +1 indexer tensors on Shared layers\n", out)
    assert len(err.splitlines()) == 1 and "1 missing tensors: model.norm.weight;" in err


@pytest.mark.slow
def test_all_files_of_the_published_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """141 shards of 755.6 GB in all, holes but for their headers: every header is read, one layer loaded."""
    config, tensors = GLMConfig.preset("glm-5.2"), {}
    for name, shape in nanoglm.load("glm-5.2", device="meta").checkpoint_tensors().items():
        if FP8.fullmatch(name):
            tensors |= {name: ("F8_E4M3", shape), name + "_scale_inv": ("F32", scale_shape(shape))}
        else:
            tensors[name] = ("F32" if name.endswith("e_score_correction_bias") else "BF16", shape)
    total = sparse_checkpoint(tmp_path, config, tensors, 141)
    shown = inspected(capsys, tmp_path)
    assert shown["size"] == f"{total:,} bytes (755.62 GB)" and shown["files"] == "141, all here"
    assert shown["names"].startswith("118,629, 59,044 of them scales")
    assert (shown["missing"], shown["unexpected"]) == ("0", "0")
    layer = Checkpoint(tmp_path).layer(0, dtype=torch.bfloat16)
    assert layer.self_attn.kv_a_proj_with_mqa.weight.shape == (576, 6144)
    assert sum(p.numel() for p in layer.parameters()) == 165_022_208 + 12_288 + 226_492_416 + 9_371_904
