"""A slice is the model of the kept layers and experts: it loads here and in transformers, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanoglm
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.cli import main
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.verify.oracle import hf
from nanoglm.weights import Checkpoint, fp8, save
from nanoglm.weights.slice import slice_checkpoint

IDS = [[(7 * i) % 320 for i in range(70)]]


@pytest.fixture(scope="module")
def model() -> GLM:
    config = GLMConfig.preset("nano").replace(
        num_hidden_layers=8, indexer_types=tuple("full" if c == "F" else "shared" for c in "FFFSSSFS"),
        mlp_layer_types=("dense",) + ("sparse",) * 7, hidden_size=64, index_topk=16, initializer_range=0.2,
    )  # fmt: skip
    return GLM(config).initialise(2)


def by_hand(model: GLM, layers: list[int], experts: list[int]) -> GLM:
    """The same cut, made in memory."""
    c = model.config
    config = c.replace(
        num_hidden_layers=len(layers), indexer_types=tuple(c.indexer_types[i] for i in layers),
        mlp_layer_types=tuple(c.mlp_layer_types[i] for i in layers), n_routed_experts=len(experts),
        num_experts_per_tok=min(c.num_experts_per_tok, len(experts)),
    )  # fmt: skip
    small = GLM(config)
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            if int(number) not in [*layers, 8]:
                continue
            name = f"model.layers.{[*layers, 8].index(int(number))}.{rest}"
            if ".experts." in name or ".mlp.gate." in name:
                value = value[experts]
        state[name] = value
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, fp8.DTYPE], ids=str)
def test_a_slice_is_the_model_of_what_was_kept(tmp_path: Path, model: GLM, layout, dtype: torch.dtype) -> None:
    save(model, tmp_path / "in", dtype=dtype, layout=layout, shard_bytes=300_000)
    whole, _ = Checkpoint(tmp_path / "in").load()
    slice_checkpoint(tmp_path / "in", tmp_path / "out", layers=[0, 2, 3, 5], experts=[1, 2, 6], shard_bytes=200_000)
    small, report = Checkpoint(tmp_path / "out").load()
    assert (report.missing, report.unexpected, report.ignored) == ([], [], [])
    wanted = by_hand(whole, [0, 2, 3, 5], [1, 2, 6])
    assert small.config.pattern == "FFSS" and small.config.num_nextn_predict_layers == 1
    assert all(torch.equal(small.state_dict()[n], t) for n, t in wanted.state_dict().items())
    if dtype == fp8.DTYPE:
        listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        modules = listed["modules_to_not_convert"]
        assert "model.layers.3.mlp.gate" in modules and "model.layers.4.eh_proj" in modules
        assert not any(m.startswith("model.layers.5") for m in modules)


def test_a_slice_loads_in_transformers(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path / "in", dtype=torch.float32)
    slice_checkpoint(tmp_path / "in", tmp_path / "out", layers=[0, 1, 6, 7], experts=range(4), mtp=False)
    theirs, report = hf.GlmMoeDsaForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS)).logits[0]
    found = nanoglm.load(tmp_path / "out", latent_norm_eps=1e-6).logits(IDS)[0]
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_slicing_what_transformers_wrote(tmp_path: Path, model: GLM) -> None:
    """Its config lists one `layer_types` entry a layer, which a slice must not keep."""
    save(model, tmp_path / "in", dtype=torch.float32, mtp=False)
    theirs = hf.GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    slice_checkpoint(tmp_path / "theirs", tmp_path / "out", layers=[0, 1])
    again = hf.GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(again.model.layers) == 2


def test_the_command(tmp_path: Path, model: GLM, capsys: pytest.CaptureFixture[str]) -> None:
    save(
        model, tmp_path / "in", beside=lambda folder: byte_tokenizer().save(folder / "tokenizer.json")
    )  # fmt: skip
    main(["slice", str(tmp_path / "in"), str(tmp_path / "out"), "--layers", "0,2-5", "--experts", "0-3", "--no-mtp"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 5 layers (FFSSS), 4 experts\n"
    main(["generate", "A", "--model", str(tmp_path / "out"), "--max-tokens", "3"])  # the tokenizer came along


def test_copied_indexers_are_left_behind(tmp_path: Path, model: GLM) -> None:
    save(model, tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    extra = {n.replace(".2.", ".3.", 1): t.clone() for n, t in tensors.items() if "layers.2.self_attn.indexer" in n}
    save_file(tensors | extra, file)
    slice_checkpoint(tmp_path / "in", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [0, 1, 3]}, "layers holds 3, which is Shared and takes its Selection from layer 2; expected 2"),
        ({"layers": [0, 8]}, "layers holds 8; expected 0 to 7"),
        ({"layers": []}, "expected at least one number"),
        ({"layers": [1, 0]}, "ascending"),
        ({"experts": [8]}, "experts holds 8; expected 0 to 7"),
        ({"out": "in"}, "is the checkpoint that is read"),
    ],
)
def test_a_slice_that_makes_no_model(tmp_path: Path, model: GLM, options: dict, words: str) -> None:
    save(model, tmp_path / "in")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        slice_checkpoint(tmp_path / "in", tmp_path / options.pop("out", "out"), **options)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
