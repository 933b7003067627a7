"""The public surface: shapes, replay, streaming, saving, refusals."""

import pytest
import torch

import nanoglm
from nanoglm import InputError, SamplingParams
from nanoglm.api import DEFAULT_MODEL, Model

SEQUENCES = [list(range(40)), [7], list(range(200, 225))]


@pytest.fixture(scope="module")
def model() -> Model:
    return nanoglm.load("tiny")


def test_logits_and_selections_have_the_documented_shapes(model: Model) -> None:
    logits, selections = model.logits(SEQUENCES), model.selections(SEQUENCES)
    for ids, of_sequence, layers in zip(SEQUENCES, logits, selections, strict=True):
        assert of_sequence.shape == (len(ids), 320)
        assert len(layers) == 4
        for layer in layers:
            assert layer.shape == (len(ids), 16) and layer.dtype == torch.int32


def test_replaying_the_own_selections_changes_nothing(model: Model) -> None:
    replayed = model.logits(SEQUENCES, selections=model.selections(SEQUENCES))
    assert all(torch.equal(a, b) for a, b in zip(model.logits(SEQUENCES), replayed, strict=True))


def test_replayed_selections_may_be_narrower(model: Model) -> None:
    """Widths may differ between tensors: the rest counts as empty places."""
    only_self = [[torch.arange(len(ids))[:, None]] * 4 for ids in SEQUENCES]
    narrow = model.logits(SEQUENCES, selections=only_self)
    wide = [[torch.cat([t, torch.full((len(t), 3), -1)], 1) for t in layers] for layers in only_self]
    assert torch.allclose(narrow[0], model.logits(SEQUENCES, selections=wide)[0], atol=1e-6)
    assert not torch.allclose(narrow[0], model.logits(SEQUENCES)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda s: s[:2], "expected 3 lists of 4 tensors"),
        (lambda s: [s[0], s[1], s[2][:3]], "expected 3 lists of 4 tensors"),
        (
            lambda s: [s[0], s[1], [t[:-1] for t in s[2]]],
            r"selections\[2\]\[0\] has shape \[24, 16\]; expected \[25, k\]",
        ),
        (lambda s: [[t + 1 for t in s[0]], s[1], s[2]], r"selections\[0\]\[0\] holds a position no row may see"),
        (lambda s: [[t - 5 for t in s[0]], s[1], s[2]], "holds a position no row may see"),
        (lambda s: [s[0], [torch.full((1, 4), -1)] * 4, s[2]], r"selections\[1\]\[0\] holds a position"),
    ],
)
def test_selections_that_do_not_fit_are_refused(model: Model, spoil, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        model.logits(SEQUENCES, selections=spoil(model.selections(SEQUENCES)))


@pytest.mark.parametrize(
    ("sequences", "sentence"),
    [([[]], "prompt is empty"), ([[1], [320]], "token id 320; expected 0 to 319"), ([[-1]], "token id -1")],
)
def test_bad_ids_are_refused(model: Model, sequences: list[list[int]], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        model.logits(sequences)


def test_stream_joined_is_generate_and_stop_texts_never_show(model: Model) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=4)
    whole = model.generate("abc", params)[0]
    assert "".join(model.stream("abc", params)) == whole and len(whole) > 20
    stop = whole[10:13]
    cut = "".join(model.stream("abc", params, stop=[stop]))
    assert cut == whole[: whole.index(stop)]


def test_empty_stop_text_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="stop holds an empty text"):
        model.generate("abc", stop=["x", ""])


def test_weights_are_floats() -> None:
    with pytest.raises(InputError, match=r"dtype is torch\.int8; expected"):
        nanoglm.load("tiny", dtype=torch.int8)


def test_save_and_load_again(model: Model, tmp_path) -> None:
    model.save(tmp_path / "copy", dtype=torch.float32)
    again = nanoglm.load(tmp_path / "copy")
    assert torch.equal(again.logits(SEQUENCES)[0], model.logits(SEQUENCES)[0])
    assert again.tokenizer.is_bytes and again.config == nanoglm.load(tmp_path / "copy").config
    assert again.checkpoint_tensors() == model.checkpoint_tensors()
    model.save(tmp_path / "plain", mtp=False)
    assert nanoglm.load(tmp_path / "plain").config.num_nextn_predict_layers == 0


def test_a_preset_without_the_byte_vocabulary_has_no_tokenizer() -> None:
    with pytest.raises(InputError, match="has no tokenizer.json"):
        nanoglm.load("recall").generate("text")


def test_a_model_larger_than_memory_is_refused() -> None:
    with pytest.raises(InputError, match="model needs 3,013 GB"):
        nanoglm.load("glm-5.2")


def test_the_bundled_model_loads_and_speaks() -> None:
    """Greedy text of the default model: real words, the same each time, under 8 MB in bf16."""
    model = nanoglm.load()
    assert model.config.pattern == "FFSSSFSSSFSS" and model.config.num_nextn_predict_layers == 1
    text = model.generate("It was a dark evening in November, and", SamplingParams(max_tokens=80))[0]
    assert " the " in text
    assert (DEFAULT_MODEL / "model.safetensors").stat().st_size <= 8_000_000
