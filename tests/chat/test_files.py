"""What lies beside the weights: a saved model is a directory that transformers can talk with, in our bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chat_examples import EXAMPLES, user

import nanoglm
from nanoglm.api import Model
from nanoglm.chat.files import sampling_defaults, write_text_files
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from nanoglm.config import GLMConfig
from nanoglm.errors import CheckpointError
from nanoglm.indexcache.apply import apply
from nanoglm.weights.slice import slice_checkpoint

FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
MERGED = train_bpe(["the weather of the house, <tool> [call] über /think 🙂 "] * 20, 320)


@pytest.fixture(scope="module")
def model() -> Model:
    return nanoglm.load("tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name in FILES}


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), MERGED], ids=["bytes", "bpe"])
def test_transformers_makes_our_prompts_of_a_saved_model(tmp_path: Path, model: Model, tokenizer: Tokenizer) -> None:
    end, user, observation = (tokenizer.encode(t)[0] for t in ("<|endoftext|>", "<|user|>", "<|observation|>"))
    config = model.config.replace(eos_token_id=(end, user, observation), pad_token_id=end)
    Model(nanoglm.model.GLM(config), tokenizer).save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES | {"config.json", "model.safetensors"}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side) == (end, end, "left")
    assert len(theirs) == 320 and theirs.model_max_length == config.max_position_embeddings
    for name, (messages, options, text) in EXAMPLES.items():
        options = {"add_generation_prompt": True} | options
        text = text.replace("None", "") if name == "E15" else text  # transformers takes nulls out before it renders
        assert theirs.apply_chat_template(messages, tokenize=False, **options) == text
        ids = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert ids == tokenizer.encode(text) and theirs.decode(ids) == text


def test_generation_begins_with_the_published_defaults(tmp_path: Path, model: Model) -> None:
    model.save(tmp_path, mtp=False)
    expected = {"temperature": 1.0, "top_p": 0.95, "do_sample": True, "eos_token_id": [256, 263, 265]}
    found = transformers.GlmMoeDsaForCausalLM.from_pretrained(tmp_path).generation_config
    assert expected.items() <= found.to_dict().items() and found.pad_token_id == 256
    found.validate(strict=True)  # what transformers would not save again


def test_what_a_checkpoint_brought_stays(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through loading and saving, in place too, through slicing and another pattern."""
    model.save(tmp_path / "in", dtype=torch.float32)
    assert nanoglm.load(tmp_path / "in").template.source == model.template.source == ChatTemplate().source
    for name, text in {
        "chat_template.jinja": "é{{ messages[0].content }}\r\n",
        "generation_config.json": '{"temperature": 0.5}',
        "tokenizer_config.json": '{"model_max_length": 7}',
        "special_tokens_map.json": "{}",
    }.items():
        (tmp_path / "in" / name).write_text(text, encoding="utf-8", newline="")
    monkeypatch.chdir(tmp_path)
    loaded = nanoglm.load("in")
    monkeypatch.chdir("/")
    assert loaded.template.render([user("x")]).startswith("éx")
    own = contents(tmp_path / "in")
    loaded.save(tmp_path / "out", dtype=torch.float32)
    slice_checkpoint(tmp_path / "out", tmp_path / "sliced", layers=[0, 1], experts=[0, 1])
    apply(tmp_path / "out", model.config.pattern, tmp_path / "applied")
    loaded.save(tmp_path / "in", dtype=torch.float32)
    for folder in ("out", "sliced", "applied", "in"):
        assert contents(tmp_path / folder) == own
        assert (tmp_path / folder / "special_tokens_map.json").read_text() == "{}"
        assert nanoglm.load(tmp_path / folder).template.source == loaded.template.source


def test_what_nobody_asks_for_is_not_read(tmp_path: Path, model: Model) -> None:
    model.save(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text("{% nonsense %}")
    loaded = nanoglm.load(tmp_path / "in")
    loaded.save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="chat template line 1 is no Jinja"):
        _ = loaded.template
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{% nonsense %}"


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path, model: Model) -> None:
    Model(model.module, None).save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("changes", "names", "ids"),
    [
        ({"eos_token_id": (), "pad_token_id": None}, {}, {}),
        ({"eos_token_id": (400,), "pad_token_id": -1}, {}, {"eos_token_id": [400], "pad_token_id": -1}),
        ({"eos_token_id": (263,), "pad_token_id": None}, {"eos_token": "<|user|>"}, {"eos_token_id": [263]}),
    ],
)
def test_ids_without_a_name_have_none(tmp_path: Path, changes: Any, names: Any, ids: Any) -> None:
    write_text_files(tmp_path, GLMConfig.preset("tiny").replace(**changes), byte_tokenizer())
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {key: about[key] for key in ("eos_token", "pad_token") if key in about} == names
    defaults = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: value for key, value in defaults.items() if key.endswith("_id")} == ids


def test_a_checkpoint_says_how_to_sample(tmp_path: Path) -> None:
    assert sampling_defaults(None) == sampling_defaults(tmp_path) == {"temperature": 1.0, "top_p": 0.95}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.4, "top_k": 20, "eos_token_id": [1], "min_p": null}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.4, "top_p": 0.95, "top_k": 20}
    file.write_text('{"do_sample": false, "temperature": 0.4}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.0}
    for damaged in ("{", "[1]"):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match="generation_config.json cannot be read"):
            sampling_defaults(tmp_path)
