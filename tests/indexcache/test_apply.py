"""A pattern in a checkpoint: what is written is the model under that pattern, here and in transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pattern_models import sequences, small

import nanoglm
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.cli import main
from nanoglm.config import ConfigError
from nanoglm.errors import InputError
from nanoglm.eval.longcontext import rescheduled
from nanoglm.indexcache.apply import apply, launch_lines
from nanoglm.indexcache.distil import distil, recipe_of, scheduled
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import count_work
from nanoglm.train.data import Tokens
from nanoglm.train.run import Corpus
from nanoglm.verify.oracle import hf, our_tie_rule, silent
from nanoglm.weights import Checkpoint, fp8, save


def logits(model: GLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids, sequences_batch(len(ids)), BatchStore()).hidden)


def sequences_batch(length: int) -> nanoglm.ops.Batch:
    return nanoglm.ops.Batch.contiguous([length])


@pytest.mark.parametrize("pattern", ["FSSFS", "FFSSS", "FFFFF"])
def test_what_is_written_is_the_model_under_the_pattern(tmp_path: Path, pattern: str) -> None:
    model = small()
    save(model, tmp_path / "in", dtype=torch.float32)
    (tmp_path / "in" / "generation_config.json").write_text("{}")
    config = apply(tmp_path / "in", pattern, tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    assert config.pattern == found.config.pattern == pattern and (tmp_path / "out" / "generation_config.json").is_file()
    with_indexer = {int(n.split(".")[2]) for n in found.shards.shapes if ".indexer." in n}
    assert with_indexer == {i for i, c in enumerate(pattern) if c == "F"}
    ids = sequences(model).sample.ids[:24]
    expected = logits(rescheduled(model, pattern), ids)
    assert torch.equal(logits(found.load()[0], ids), expected)
    with silent():
        theirs = hf.GlmMoeDsaForCausalLM.from_pretrained(
            tmp_path / "out", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        ).eval()
    with our_tie_rule(), torch.no_grad():
        other = theirs(ids[None], use_cache=False).logits[0]
    ours = nanoglm.load(tmp_path / "out", latent_norm_eps=1e-6).module
    torch.testing.assert_close(logits(ours, ids), other, rtol=0, atol=2e-5)


def test_the_configuration_says_the_pattern_twice(tmp_path: Path) -> None:
    model = small(8)
    save(model, tmp_path / "in")
    for pattern, keys in [
        ("FSSSFSSS", {"index_topk_freq": 4, "index_skip_topk_offset": 1}),
        ("FFFSSSFS", {"index_topk_freq": 4, "index_skip_topk_offset": 3}),
        ("FSFFSSSS", {"index_topk_pattern": "FSFFSSSS"}),
    ]:
        apply(tmp_path / "in", pattern, tmp_path / pattern)
        raw = json.loads((tmp_path / pattern / "config.json").read_text())
        assert raw["indexer_types"] == ["full" if c == "F" else "shared" for c in pattern]
        assert {k: v for k, v in raw.items() if k.startswith(("index_topk_", "index_skip"))} == keys
        lines = launch_lines(tmp_path / pattern, Checkpoint(tmp_path / pattern).config)
        for name, value in keys.items():
            assert all(f'"{name}": {json.dumps(value)}' in lines[engine] for engine in ("vLLM", "SGLang"))


def test_fp8_is_copied_as_it_lies(tmp_path: Path) -> None:
    save(small(), tmp_path / "in", dtype=fp8.DTYPE)
    apply(tmp_path / "in", "FSSFS", tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = raw["quantization_config"]["modules_to_not_convert"]
    assert any("layers.3.self_attn.indexer" in name for name in plain)
    assert not any("layers.1.self_attn.indexer" in name for name in plain)
    old, new = Checkpoint(tmp_path / "in").shards, Checkpoint(tmp_path / "out").shards
    for name, tensor in new.stream(list(new.shapes)):
        assert torch.equal(tensor.view(torch.uint8), old.read(name).view(torch.uint8))


@pytest.mark.parametrize("pattern", ["SFFFF", "FS", "FFFFX"])
def test_wrong_patterns_leave_nothing_behind(tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(small(), tmp_path / "in")
    with pytest.raises(SystemExit, match="2"):
        main(["indexcache", "apply", str(tmp_path / "in"), pattern, str(tmp_path / "out")])
    assert "attern" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_indexer_that_was_dropped_does_not_come_back(tmp_path: Path) -> None:
    save(rescheduled(small(), "FSFSS"), tmp_path / "in")
    with pytest.raises(InputError, match="F at layer 1; expected F where"):
        apply(tmp_path / "in", "FFFSS", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        apply(tmp_path / "in", "FSSSS", tmp_path / "full")


def test_so_many_fewer_pairs_are_scored(tmp_path: Path) -> None:
    """F of N indexers score F/N of the pairs, and attend to as many rows."""
    model = small()
    save(model, tmp_path / "in")
    apply(tmp_path / "in", "FSSFS", tmp_path / "out")
    ids, found = sequences(model).sample.ids[:24].tolist(), []
    for name in ("in", "out"):
        with count_work() as work:
            nanoglm.load(tmp_path / name).logits([ids])
        found.append(work)
    assert found[1].pairs_scored * 5 == found[0].pairs_scored * 2 > 0
    assert found[1].rows_attended == found[0].rows_attended > 0


# ------------------------------------------------------------------------------- distillation
def test_new_indexers_begin_as_their_sources_copies() -> None:
    model = rescheduled(small(), "FSFSS")
    other = scheduled(model, "FFSFS", topk=2)
    assert other.config.pattern == "FFSFS" and other.config.index_topk == 2 == other.layers[0].self_attn.topk
    state, old = other.state_dict(), model.state_dict()
    for layer, source in ((1, 0), (3, 2)):
        for name in ("wq_b.weight", "k_norm.bias", "weights_proj.weight"):
            assert torch.equal(
                state[f"model.layers.{layer}.self_attn.indexer.{name}"],
                old[f"model.layers.{source}.self_attn.indexer.{name}"],
            )
    assert not any(".indexer." in n and n.startswith(("model.layers.2.", "model.layers.4.")) for n in state)
    with pytest.raises(ConfigError, match="begins with S"):
        scheduled(model, "SFFFF")


def test_distillation_trains_what_stays(tmp_path: Path) -> None:
    """The pattern is in the checkpoint, indexers and backbone moved, and it matters whose attention indexers learn."""
    model, found = scheduled(small(4), "FFFF"), {}
    ids = np.random.default_rng(0).integers(0, 200, 4000).astype(np.uint16)
    data = Corpus(byte_tokenizer(), Tokens.of(ids))
    for own in (False, True):
        recipe = recipe_of(2, 2, 32, False, tokens=64, warmup=1, own_layer_kl=own)
        assert [(stage.name, stage.length) for stage in recipe.stages] == [("indexer_warmup", 32), ("sparse", 32)]
        distil(model, "FSFS", data, recipe, tmp_path / str(own), topk=4)
        trained, _ = Checkpoint(tmp_path / str(own)).load()
        assert trained.config.pattern == "FSFS" and trained.config.index_topk == 4
        found[own] = trained.state_dict()
        before = model.state_dict()
        moved = {n for n, value in found[own].items() if not torch.equal(value, before[n].to(torch.bfloat16).float())}
        assert any(".0.self_attn.indexer.wq_b" in name for name in moved) and any("o_proj" in name for name in moved)
    name = "model.layers.0.self_attn.indexer.wk.weight"
    assert not torch.equal(found[False][name], found[True][name])
    with pytest.raises(InputError, match="not empty"):
        distil(model, "FSFS", data, recipe, tmp_path / "True")
    with pytest.raises(InputError, match="warmup is 0"):
        recipe_of(0, 2, 32, False)
    with pytest.raises(InputError, match="expected the tasks' 2048"):
        distil(model, "FSFS", data, recipe_of(1, 1, 32, True, tokens=64), tmp_path / "tasks")
