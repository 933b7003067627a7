"""Checkpoints in and out: what comes back is what was saved, and every damaged file is one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import nanoglm.weights.write as write
from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import CheckpointError, ConfigError, InputError, NanoglmError
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch
from nanoglm.weights import SHARED_INDEXERS, Checkpoint, checkpoint_tensors, save
from nanoglm.weights.names import KEEP_FP32

BIAS = "e_score_correction_bias"
SHARD = 200_000  # bytes: several files for the tiny preset
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def build(seed: int = 0, **changes: object) -> GLM:
    """A tiny model in which no two tensors are alike: norms and the router bias are random too."""
    model = GLM(GLMConfig.preset("tiny").replace(**changes)).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.ndim == 1:  # the published bias lies in [6.8, 7.1], where bf16 knows 8 values
            low = 6.8 if name.endswith(BIAS) else 0.5
            value.data.uniform_(low, low + 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> GLM:
    return build()


def forward(model: GLM) -> Tensor:
    ids = torch.arange(40) * 7 % model.config.vocab_size
    with torch.no_grad():
        return model.logits(model(ids, Batch.contiguous([40]), BatchStore()).hidden)


def same(a: GLM, b: GLM, dtype: torch.dtype = torch.float32, skip: str | None = None) -> None:
    """Every tensor of ``b`` bit for bit that of ``a`` as ``dtype`` keeps it."""
    theirs = checkpoint_tensors(b)
    ours = {n: t for n, t in checkpoint_tensors(a).items() if skip is None or not n.startswith(skip)}
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        kept = tensor if name.endswith(BIAS) else tensor.to(dtype).float()
        assert torch.equal(theirs[name].float(), kept), name


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites the single weights file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def refusal(directory: Path, kind: type[NanoglmError] = CheckpointError) -> str:
    """The one sentence that refuses to load ``directory``; refusing changes nothing on disk."""
    before = snapshot(directory)
    with pytest.raises(kind) as error:
        Checkpoint(directory).load()
    assert snapshot(directory) == before
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# ------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, SHARD])
def test_round_trip(tmp_path: Path, model: GLM, dtype: torch.dtype, layout: write.Layout, shard_bytes: int) -> None:
    save(model, tmp_path / "x", dtype=dtype, layout=layout, shard_bytes=shard_bytes)
    loaded, report = Checkpoint(tmp_path / "x").load()
    assert (report.missing, report.unexpected, report.ignored) == ([], [], [])
    assert loaded.config == model.config.replace(extra={"dtype": str(dtype).removeprefix("torch.")})
    same(model, loaded, dtype)
    if dtype == torch.float32:
        assert torch.equal(forward(loaded), forward(model))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_in_memory_and_back(tmp_path: Path, model: GLM, dtype: torch.dtype) -> None:
    save(model, tmp_path / "a", dtype=dtype)
    loaded, _ = Checkpoint(tmp_path / "a").load(dtype=dtype)
    for name, value in [*loaded.named_parameters(), *loaded.named_buffers()]:
        assert value.dtype == (torch.float32 if KEEP_FP32.fullmatch(name) else dtype), name
    same(model, loaded, dtype)
    save(loaded, tmp_path / "b", dtype=dtype)  # saving what was loaded writes the same bytes
    first, second = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)


def test_files_as_published(tmp_path: Path, model: GLM) -> None:
    """Hugging Face's names, one tensor per expert; all bf16 but the router bias (trap 4)."""
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == checkpoint_tensors(model).keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith(BIAS) else torch.bfloat16), name
        assert tensor.is_contiguous()
    prefix = "model.layers.1.mlp.experts"
    whole = model.model.layers[1].mlp.experts.gate_up_proj.detach()  # gate rows first
    assert torch.equal(tensors[f"{prefix}.3.gate_proj.weight"], whole[3, :32].bfloat16())
    assert torch.equal(tensors[f"{prefix}.3.up_proj.weight"], whole[3, 32:].bfloat16())
    assert not any(".1.self_attn.indexer." in n or ".3.self_attn.indexer." in n for n in tensors)  # Shared
    assert "model.layers.4.shared_head.norm.weight" in tensors
    assert not any(n.startswith("model.layers.4.") and ("embed" in n or "shared_head.head" in n) for n in tensors)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and written["architectures"] == ["GlmMoeDsaForCausalLM"]


def test_stacked_layout_has_two_tensors_a_layer(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, layout="stacked")
    experts = [n for n in load_file(tmp_path / "model.safetensors") if ".mlp.experts." in n]
    assert len(experts) == 2 * 4  # three MoE layers and the MTP layer
    assert all(n.endswith((".gate_up_proj", ".down_proj")) for n in experts)


def test_index_file_and_shards(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, shard_bytes=SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert not (tmp_path / "model.safetensors").exists()
    total = 0
    for file in files:
        held = load_file(tmp_path / file)
        size = sum(t.nbytes for t in held.values())
        assert size <= SHARD
        assert {n for n, f in index["weight_map"].items() if f == file} == held.keys()
        total += size
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == checkpoint_tensors(model).keys()


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(checkpoint_tensors(model))
    same(model, Checkpoint(tmp_path).load()[0], torch.bfloat16)


def test_files_have_the_usual_permissions(tmp_path: Path, model: GLM) -> None:
    """safetensors writes mode 0600; a server under another user must read the weights too."""
    save(model, tmp_path, shard_bytes=SHARD)
    plain = tmp_path / "plain"
    plain.touch()
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {plain.stat().st_mode}


def test_plain_weights_do_not_claim_to_be_quantised(tmp_path: Path) -> None:
    """quantization_config describes a file's weights, as dtype does; other unknown keys stay."""
    model = build(extra={"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16", "use_cache": True})
    save(model, tmp_path, dtype=torch.float16)
    assert Checkpoint(tmp_path).config.extra == {"dtype": "float16", "use_cache": True}


def test_loading_on_meta_reads_no_weights(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path)
    loaded, _ = Checkpoint(tmp_path).load(device="meta")
    assert all(p.is_meta for p in loaded.parameters())
    assert {n: t.shape for n, t in checkpoint_tensors(loaded).items()} == {
        n: t.shape for n, t in checkpoint_tensors(model).items()
    }


def test_latent_norm_eps_reaches_the_norms(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path)
    loaded, _ = Checkpoint(tmp_path, latent_norm_eps=3e-4).load()
    assert loaded.model.layers[0].self_attn.kv_a_layernorm.eps == 3e-4
    assert loaded.model.layers[0].input_layernorm.eps == 1e-6


# ------------------------------------------------------------------------------- MTP, tied embeddings
@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_without_mtp(tmp_path: Path, model: GLM, layout: write.Layout) -> None:
    save(model, tmp_path, dtype=torch.float32, mtp=False, layout=layout)
    assert not any(n.startswith("model.layers.4.") for n in load_file(tmp_path / "model.safetensors"))
    loaded, _ = Checkpoint(tmp_path).load()
    assert loaded.config.num_nextn_predict_layers == 0
    same(model, loaded, skip="model.layers.4.")
    assert torch.equal(forward(loaded), forward(model))
    with pytest.raises(InputError, match=r"no MTP layer; expected tensors model\.layers\.4\.\*"):
        _ = loaded.mtp


def test_a_file_without_mtp_overrules_its_config(tmp_path: Path, model: GLM) -> None:
    """transformers writes no MTP layer but leaves num_nextn_predict_layers 1 in the config."""
    save(model, tmp_path)
    edit(tmp_path, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("model.layers.4.")])
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    loaded, _ = Checkpoint(tmp_path).load()
    assert loaded.config.num_nextn_predict_layers == 0


def test_half_an_mtp_layer_is_missing_tensors(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path)
    edit(tmp_path, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("model.layers.4.mlp.")])
    assert "missing" in refusal(tmp_path)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    tied = build(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    save(tied, tmp_path, dtype=torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = Checkpoint(tmp_path).load()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(forward(loaded), forward(tied))


# ------------------------------------------------------------------------------- names
def test_missing_tensors_are_counted_and_named(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    message = refusal(tmp_path)
    assert "1 missing tensors: model.norm.weight;" in message
    edit(tmp_path, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".layers.2.mlp.experts.5." in n])
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    message = refusal(tmp_path)
    assert "5 missing tensors" in message and "and 2 more" in message and "expected" in message


def test_a_lost_stacked_tensor_is_named(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, layout="stacked")
    edit(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.experts.down_proj"))
    message = refusal(tmp_path)
    assert "8 missing tensors" in message and "model.layers.2.mlp.experts.0.down_proj.weight" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.input_layernorm.weight_scale_inv",
        "model.layers.1.mlp.experts.8.up_proj.weight",  # the config has experts 0 to 7
        "model.layers.9.input_layernorm.weight",
        "model.layers.1.self_attn.indexers_proj.weight",
        "rotary.inv_freq",
    ],
)
def test_unexpected_tensor_is_named(tmp_path: Path, model: GLM, name: str) -> None:
    save(model, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert f"1 unexpected tensors: {name};" in refusal(tmp_path)


def test_copied_indexers_on_shared_layers_are_ignored_and_reported(tmp_path: Path, model: GLM) -> None:
    """Some conversions duplicate a Full layer's indexer onto the layers that share it (spec 4.2)."""
    save(model, tmp_path, dtype=torch.float32)

    def copy(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".layers.0.self_attn.indexer." in n]:
            tensors[name.replace(".layers.0.", ".layers.1.")] = tensors[name] + 1  # and wrong besides

    edit(tmp_path, copy)
    loaded, report = Checkpoint(tmp_path).load()
    parts = ("k_norm.bias", "k_norm.weight", "weights_proj.weight", "wk.weight", "wq_b.weight")
    assert sorted(report.ignored) == [f"model.layers.1.self_attn.indexer.{part}" for part in parts]
    assert (report.missing, report.unexpected) == ([], [])
    assert loaded.model.layers[1].self_attn.indexer is None
    assert torch.equal(forward(loaded), forward(model))


# ------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize("keep", [0, 7, 300, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_weights(tmp_path: Path, model: GLM, keep: int, sharded: bool) -> None:
    save(model, tmp_path, shard_bytes=SHARD if sharded else 10**9)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert file.name in message and "truncated" in message


def test_weights_that_are_no_safetensors(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert "no safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64, torch.bool], ids=str)
def test_wrong_dtype(tmp_path: Path, model: GLM, dtype: torch.dtype) -> None:
    save(model, tmp_path)
    name = "model.layers.2.self_attn.o_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = refusal(tmp_path)
    code = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float64: "F64", torch.bool: "BOOL"}[dtype]
    assert name in message and code in message and "expected one of F32, BF16, F16" in message


@pytest.mark.parametrize(
    ("name", "reshape"),
    [
        ("model.norm.weight", lambda t: t[:-1].clone()),
        ("lm_head.weight", lambda t: t.T.contiguous()),
        ("model.layers.1.mlp.experts.3.down_proj.weight", lambda t: t[None].clone()),
        (f"model.layers.1.mlp.gate.{BIAS}", lambda t: t[:1].clone()),  # would broadcast
    ],
)
def test_wrong_shape(tmp_path: Path, model: GLM, name: str, reshape: Callable[[Tensor], Tensor]) -> None:
    save(model, tmp_path)
    shapes = {}

    def change(tensors: dict[str, Tensor]) -> None:
        shapes["expected"] = list(tensors[name].shape)
        tensors[name] = reshape(tensors[name])
        shapes["found"] = list(tensors[name].shape)

    edit(tmp_path, change)
    assert f"{name} has shape {shapes['found']}; expected {shapes['expected']}" in refusal(tmp_path)


@pytest.mark.parametrize("shift", [-4, 4])
def test_a_header_whose_tensors_overlap_or_leave_a_gap(tmp_path: Path, model: GLM, shift: int) -> None:
    save(model, tmp_path, dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
    header[name]["data_offsets"] = [offset + shift for offset in header[name]["data_offsets"]]
    raw, body = json.dumps(header).encode(), data[8 + length :] + bytes(4)
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + body[: len(data) - 8 - length + shift])
    assert "a gap or overlap at byte" in refusal(tmp_path)


def test_missing_index_file(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, shard_bytes=SHARD)
    (tmp_path / "model.safetensors.index.json").unlink()
    count = len(list(tmp_path.glob("*.safetensors")))
    message = refusal(tmp_path)
    assert f"{count} shards" in message and "expected model.safetensors or model.safetensors.index.json" in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}', b"\xff\xfe", b"null"]
)
def test_damaged_index_file(tmp_path: Path, model: GLM, content: bytes) -> None:
    save(model, tmp_path, shard_bytes=SHARD)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    message = refusal(tmp_path)
    assert "index.json is damaged; expected JSON with a weight_map" in message


def test_missing_shard_file(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, shard_bytes=SHARD)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink()
    assert f"names {file.name}, which is missing" in refusal(tmp_path)


def test_index_that_names_a_tensor_its_file_lacks(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path, shard_bytes=SHARD)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.layers.0.nonsense"] = file = raw["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(raw))
    message = refusal(tmp_path)
    assert "model.layers.0.nonsense" in message and file in message
    # The tensor exists, but not where the index says.
    del raw["weight_map"]["model.layers.0.nonsense"]
    raw["weight_map"]["model.norm.weight"] = next(f for f in raw["weight_map"].values() if f != file)
    index.write_text(json.dumps(raw))
    assert "model.norm.weight" in refusal(tmp_path)


def test_the_index_decides_between_two_copies(tmp_path: Path, model: GLM) -> None:
    """A shard may still hold a tensor that the index places elsewhere; the index is right."""
    save(model, tmp_path, dtype=torch.float32, shard_bytes=SHARD)
    name = "model.embed_tokens.weight"
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    held = load_file(last)
    assert name not in held
    save_file(held | {name: torch.zeros(320, 64)}, last, metadata={"format": "pt"})
    loaded, _ = Checkpoint(tmp_path).load()
    same(model, loaded)


def test_no_weights_and_no_config(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no weights; expected model.safetensors" in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json cannot be read" in refusal(tmp_path, ConfigError)


def test_config_of_another_size(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"kv_lora_rank": 16}))
    assert "kv_a" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"kv_lora_rank": -32}))
    assert "kv_lora_rank is -32" in refusal(tmp_path, ConfigError)


# ------------------------------------------------------------------------------- indexers of Shared layers
def test_all_full_takes_the_separate_indexers(tmp_path: Path, model: GLM) -> None:
    everywhere = build(seed=1, indexer_types=(FULL,) * 4)
    everywhere.load_state_dict(model.state_dict(), strict=False)
    save(model, tmp_path, dtype=torch.float32)
    extra = {n: t.detach() for n, t in everywhere.named_parameters() if ".indexer." in n and n[13] in "13"}
    save_file(extra, tmp_path / SHARED_INDEXERS)
    loaded, report = Checkpoint(tmp_path, all_full=True).load()
    assert loaded.config.pattern == "FFFF" and report.ignored == []
    same(everywhere, loaded)
    plain, report = Checkpoint(tmp_path).load()  # which no other reader notices
    assert plain.config.pattern == "FSFS" and report.ignored == []
    (tmp_path / SHARED_INDEXERS).unlink()
    with pytest.raises(CheckpointError, match=SHARED_INDEXERS):
        Checkpoint(tmp_path, all_full=True)


# ------------------------------------------------------------------------------- failed and repeated writes
def broken_save_file(error: Exception, after: int) -> Callable[..., None]:
    """save_file that writes ``after`` files and then half a file and an error."""
    done = []

    def broken(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if len(done) == after:
            Path(file).write_bytes(b"half")
            raise error
        done.append(file)
        save_file(tensors, file, metadata)

    return broken


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), InputError),
        (SafetensorError("I/O error: No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_changes_nothing(
    tmp_path: Path, model: GLM, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[BaseException], after: int
) -> None:
    target = tmp_path / "x"
    save(model, target, shard_bytes=SHARD)
    (target / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    monkeypatch.setattr(write, "save_file", broken_save_file(error, after))
    for directory in (target, tmp_path / "new"):
        with pytest.raises(kind):
            save(build(seed=9), directory, shard_bytes=SHARD)
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]  # neither "new" nor a temporary folder


def test_a_full_disk_is_one_sentence(tmp_path: Path, model: GLM) -> None:
    """A real write error from safetensors, by a limit on file size."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written") as error:
            save(model, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failing_neighbour_changes_nothing(tmp_path: Path, model: GLM) -> None:
    """What is written beside the weights (the tokenizer) belongs to the same all or nothing."""

    def beside(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise InputError("no tokenizer")

    with pytest.raises(InputError, match="no tokenizer"):
        save(model, tmp_path / "x", beside=beside)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "second"), [(SHARD, 10**9), (10**9, SHARD), (SHARD // 2, SHARD)])
def test_overwriting_leaves_no_stale_shards(tmp_path: Path, model: GLM, first: int, second: int) -> None:
    save(build(seed=5), tmp_path / "x", dtype=torch.float32, shard_bytes=first)
    (tmp_path / "x" / "notes.txt").write_text("mine")
    save(model, tmp_path / "x", dtype=torch.float32, shard_bytes=second)
    save(model, tmp_path / "fresh", dtype=torch.float32, shard_bytes=second)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {p.name for p in (tmp_path / "fresh").iterdir()} | {
        "notes.txt"
    }
    same(model, Checkpoint(tmp_path / "x").load()[0])


def test_the_current_directory_stays_the_current_directory(
    tmp_path: Path, model: GLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanged, it would leave the shell that stands in it in a folder that is gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(build(seed=5), ".", shard_bytes=SHARD)
    save(model, ".", dtype=torch.float32)
    assert sorted(os.listdir(".")) == ["config.json", "model.safetensors", "notes.txt"]
    assert sorted(os.listdir(".")) == sorted(p.name for p in tmp_path.iterdir())
    same(model, Checkpoint(".").load()[0])


def test_without_an_exchange_files_are_replaced(tmp_path: Path, model: GLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_exchange", lambda *_: False)
    save(build(seed=5), tmp_path / "x", shard_bytes=SHARD)
    (tmp_path / "x" / "sub").mkdir()
    (tmp_path / "x" / "sub" / "notes.txt").write_text("mine")
    save(model, tmp_path / "x", dtype=torch.float32)
    assert sorted(os.listdir(tmp_path / "x")) == ["config.json", "model.safetensors", "sub"]
    assert (tmp_path / "x" / "sub" / "notes.txt").read_text() == "mine" and os.listdir(tmp_path) == ["x"]
    same(model, Checkpoint(tmp_path / "x").load()[0])


@pytest.mark.parametrize("exchange", [True, False])
def test_what_is_written_replaces_and_the_users_files_stay(
    tmp_path: Path, model: GLM, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """The tokenizer of the weights before must not stay; files that only look like ours must."""
    if not exchange:
        monkeypatch.setattr(write, "_exchange", lambda *_: False)
    save(build(seed=5), tmp_path, beside=lambda folder: (folder / "tokenizer.json").write_text("old"))
    mine = ("model_lora.safetensors", "model-old.safetensors.bak", "notes.txt")
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / SHARED_INDEXERS).write_text("of the old weights")
    save(model, tmp_path, dtype=torch.float32, beside=lambda folder: (folder / "tokenizer.json").write_text("new"))
    assert (tmp_path / "tokenizer.json").read_text() == "new"
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert not (tmp_path / SHARED_INDEXERS).exists()
    same(model, Checkpoint(tmp_path).load()[0])


def test_folders_inside_are_left_where_they_are(tmp_path: Path, model: GLM) -> None:
    """They may be mounts: nothing below the directory is walked, copied or removed."""
    save(build(seed=5), tmp_path / "x")
    (tmp_path / "x" / "sub").mkdir()
    before = (tmp_path / "x").stat().st_ino, (tmp_path / "x" / "sub").stat().st_ino
    save(model, tmp_path / "x")
    assert before == ((tmp_path / "x").stat().st_ino, (tmp_path / "x" / "sub").stat().st_ino)


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_replacement_is_refused_not_mixed(
    tmp_path: Path, model: GLM, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    save(build(seed=5), tmp_path, shard_bytes=SHARD)
    (tmp_path / "sub").mkdir()  # so that files are replaced one by one
    replace, done = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(write.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path, shard_bytes=SHARD)
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        Checkpoint(tmp_path)


def test_fp8_of_an_infinite_weight_is_refused(tmp_path: Path) -> None:
    broken = build()
    broken.model.layers[0].self_attn.o_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"o_proj\.weight holds a value that is not finite"):
        save(broken, tmp_path / "x", dtype=torch.float8_e4m3fn)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path, model: GLM) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()


def test_targets_that_cannot_be(tmp_path: Path, model: GLM) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be written"):
            save(model, target)
    with pytest.raises(InputError, match=r"dtype is torch\.int8; expected torch\.float32"):
        save(model, tmp_path / "x", dtype=torch.int8)
    with torch.device("meta"):
        empty = GLM(model.config)
    with pytest.raises(InputError, match="device meta has no weights"):
        save(empty, tmp_path / "x")
    assert snapshot(tmp_path) == {"file": b"mine"} and os.listdir(tmp_path) == ["file"]
