"""A recording replays bit for bit; what was altered in it shows where it was altered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.test_engine import build as repetitive
from engine.test_engine import prompt as drawn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import nanoglm
from nanoglm.api import Model
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.config import GLMConfig
from nanoglm.engine import Engine, generate
from nanoglm.engine.record import Recording, Trace
from nanoglm.errors import InputError
from nanoglm.model import GLM

SEQUENCES = [[(7 * i + i // 9) % 320 for i in range(n)] for n in (90, 23, 130)]
PARAMS = nanoglm.SamplingParams(max_tokens=40, temperature=0.8, seed=3)


def build(seed: int = 0, **changes: object) -> Model:
    config = GLMConfig.preset("tiny").replace(initializer_range=0.3, eos_token_id=(), **changes)
    return Model(GLM(config).initialise(seed), byte_tokenizer())


@pytest.fixture
def lm() -> Model:
    return build()


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def hidden(lm: Model, sequences: list[list[int]]) -> list[Tensor]:
    """Residual stream after each layer."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _m, _i, out: found.append(out[0])) for m in lm.module.layers]
    lm.logits(sequences)
    for hook in hooks:
        hook.remove()
    return found


def test_replay_of_a_recorded_run_gives_equal_bits(lm: Model, tmp_path: Path) -> None:
    with lm.record(tmp_path / "run"):
        recorded = lm.logits(SEQUENCES)
    plain = lm.logits(SEQUENCES)
    with lm.replay(tmp_path / "run"):
        replayed = lm.logits(SEQUENCES)
    for a, b, c in zip(recorded, plain, replayed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_decoding_replays_as_a_whole_and_the_whole_in_decoding(lm: Model, tmp_path: Path) -> None:
    with lm.record(tmp_path / "decoded") as recording:
        text = lm.generate("It was a dark", PARAMS)[0]
    trace = recording.traces[0]
    assert len(trace.ids) == 13 + 39  # the last token was drawn, not run
    with lm.replay(tmp_path / "decoded"), lm.record(tmp_path / "whole"):
        whole = lm.logits([trace.ids])[0]
    assert torch.equal(whole, lm.logits([trace.ids])[0])
    one, other = load_file(tmp_path / "whole"), load_file(tmp_path / "decoded")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    with lm.replay(tmp_path / "whole"):
        assert lm.generate("It was a dark", PARAMS)[0] == text


def test_replay_with_other_weights_keeps_the_routing(lm: Model, tmp_path: Path) -> None:
    """What RL asks for: a policy that has moved, under the Selections and experts of the rollout."""
    with lm.record(tmp_path / "a") as recorded:
        lm.logits(SEQUENCES)
    other = build(seed=1)
    with other.record(tmp_path / "own") as own:
        plain = other.logits(SEQUENCES)
    with other.replay(tmp_path / "a"), other.record(tmp_path / "b") as replayed:
        moved = other.logits(SEQUENCES)
    assert recorded.difference(own) is not None and recorded.difference(replayed) is None
    assert not any(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@pytest.mark.parametrize("layer", [0, 2])
def test_an_altered_selection_shows_in_its_layer(lm: Model, tmp_path: Path, layer: int) -> None:
    with lm.record(tmp_path / "run"):
        plain = hidden(lm, SEQUENCES)
    original = Recording.load(tmp_path / "run", lm.config)

    def alter(tensors: dict[str, Tensor]) -> None:
        row = tensors[f"1.selections.{layer}"][20]
        row[:] = torch.tensor(sorted(set(range(21)) - {5, 6, 7, 8, 9})[:16], dtype=torch.int32)

    edit(tmp_path / "run", alter)
    altered = Recording.load(tmp_path / "run", lm.config)
    difference = original.difference(altered)
    assert difference is not None and difference.startswith(
        f"layer {layer}, sequence 1, position 20: Selections differ"
    )
    with lm.replay(tmp_path / "run"):
        found = hidden(lm, SEQUENCES)
    for i, (a, b) in enumerate(zip(plain, found, strict=True)):
        rows = (a != b).any(-1).nonzero().flatten().tolist()
        if i < layer:
            assert rows == []
        elif i == layer:
            assert rows == [90 + 20]
        else:
            assert 90 + 20 in rows and min(rows) >= 90 + 20 and max(rows) < 90 + 23


def test_an_altered_route_shows_in_its_layer(lm: Model, tmp_path: Path) -> None:
    with lm.record(tmp_path / "run"):
        plain = hidden(lm, SEQUENCES)
    original = Recording.load(tmp_path / "run", lm.config)

    def alter(tensors: dict[str, Tensor]) -> None:
        tensors["0.routes.2"][50] = (tensors["0.routes.2"][50] + 1) % 8

    edit(tmp_path / "run", alter)
    difference = original.difference(Recording.load(tmp_path / "run", lm.config))
    assert difference is not None and difference.startswith("layer 2, sequence 0, position 50: routes differ")
    with lm.replay(tmp_path / "run"):
        found = hidden(lm, SEQUENCES)
    same = [torch.equal(a, b) for a, b in zip(plain, found, strict=True)]
    assert same == [True, True, False, False]


def test_shared_layers_replay_their_sources_object(lm: Model, tmp_path: Path) -> None:
    with lm.record(tmp_path / "run"):
        lm.logits(SEQUENCES)
    names = load_file(tmp_path / "run").keys()
    assert {n.split(".")[2] for n in names if ".selections." in n} == {"0", "2"}  # FSFS
    with lm.replay(tmp_path / "run"):
        chosen = lm.selections(SEQUENCES)
    assert all(c[0] is c[1] and c[2] is c[3] and not torch.equal(c[0], c[2]) for c in chosen)


def test_a_beginning_of_the_recorded_sequence_replays(lm: Model, tmp_path: Path) -> None:
    with lm.record(tmp_path / "run"):
        whole = lm.logits(SEQUENCES[:1])[0]
    with lm.replay(tmp_path / "run"):
        assert torch.equal(lm.logits([SEQUENCES[0][:50]])[0], whole[:50])


def run(lm: Model, path: Path) -> None:
    with lm.record(path):
        lm.logits(SEQUENCES[:1])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE = {
    "truncated": (truncate, "cannot be read"),
    "no file": (lambda path: path.unlink(), "cannot be read"),
    "no recording": (lambda path: save_file({"x": torch.zeros(1)}, path), "has format None; expected"),
    "a lost layer": (lambda p: edit(p, lambda t: t.pop("0.selections.2")), r"damaged: '0\.selections\.2'"),
    "other tokens": (lambda p: edit(p, lambda t: t["0.ids"].add_(1)), "tokens of sequence 0 do not match their hash"),
    "the future": (lambda p: edit(p, lambda t: t["0.selections.0"][3].fill_(4)), "holds a position no row may see"),
    "twice the same": (
        lambda p: edit(p, lambda t: t["0.selections.0"][40].fill_(4)),
        "is not ascending with -1 behind",
    ),
    "no expert": (lambda p: edit(p, lambda t: t["0.routes.1"][3].fill_(8)), "holds an expert that is none"),
    "other width": (
        lambda p: edit(p, lambda t: t.update({"0.selections.0": t["0.selections.0"][:, :3].clone()})),
        r"is not int32 \[90, 16\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_recording_is_one_sentence(lm: Model, tmp_path: Path, name: str) -> None:
    change, words = DAMAGE[name]
    run(lm, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(InputError, match=words) as error, lm.replay(tmp_path / "run"):
        pass
    assert len(str(error.value).splitlines()) == 1


def test_a_recording_of_another_model_is_one_sentence(lm: Model, tmp_path: Path) -> None:
    run(lm, tmp_path / "run")
    other = build(index_topk=8)
    with pytest.raises(InputError, match="made with index_topk 16; this model has 8"), other.replay(tmp_path / "run"):
        pass
    full = build(indexer_types=("full",) * 4)
    with pytest.raises(InputError, match="made with indexer_types"), full.replay(tmp_path / "run"):
        pass


def test_other_tokens_or_too_many_are_one_sentence(lm: Model, tmp_path: Path) -> None:
    run(lm, tmp_path / "run")
    wrong = [*SEQUENCES[0][:40], 1, *SEQUENCES[0][41:]]
    with lm.replay(tmp_path / "run"), pytest.raises(InputError, match=r"has token 1 at position 40; .* has token \d+$"):
        lm.logits([wrong])
    with lm.replay(tmp_path / "run"), pytest.raises(InputError, match=r"position 90; the recording has only 90 tokens"):
        lm.logits([[*SEQUENCES[0], 5]])
    with lm.replay(tmp_path / "run"), pytest.raises(InputError, match="no sequence left"):
        lm.logits([SEQUENCES[0], SEQUENCES[0]])
    with lm.replay(tmp_path / "run"), pytest.raises(InputError, match="replayed sequence has token"):
        lm.generate("Another prompt", PARAMS)
    assert torch.isfinite(lm.logits(SEQUENCES)[0]).all()  # outside, all is as before


def test_a_refused_call_leaves_the_recording_whole(lm: Model, tmp_path: Path) -> None:
    with lm.record(tmp_path / "run"):
        with pytest.raises(InputError, match="attention is 'dense'"):
            lm.logits(SEQUENCES, attention="dense")
        lm.logits(SEQUENCES[:1])
    assert [len(t.ids) for t in Recording.load(tmp_path / "run", lm.config).traces] == [90]


def test_a_failed_run_writes_nothing(lm: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError), lm.record(tmp_path / "run"):
        lm.logits(SEQUENCES)
        lm.logits([[]])
    with pytest.raises(InputError, match="attention is 'dense'"), lm.record(tmp_path / "run"):
        lm.logits(SEQUENCES, attention="dense")
    with pytest.raises(InputError, match="record is running"), lm.record(tmp_path / "a"), lm.record(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), lm.record(tmp_path / "file" / "run"):
        lm.logits(SEQUENCES)


def test_a_stream_that_nobody_read_is_no_sequence(lm: Model, tmp_path: Path) -> None:
    with lm.record(tmp_path / "run"):
        lm.stream("never read", PARAMS)
        lm.logits(SEQUENCES[:1])
    assert [len(t.ids) for t in Recording.load(tmp_path / "run", lm.config).traces] == [90]


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_engine_records_what_the_plain_loop_does(drafts: int) -> None:
    """In company, in chunks, sent back for want of pages, behind a known prefix, with drafts that are rejected."""
    model = repetitive()
    params = nanoglm.SamplingParams(max_tokens=20)
    engine = Engine(model, pages=7, budget=24, drafts=drafts)
    prompts = [drawn(116, i, prefix=80) for i in range(4)]
    engine.add(prompts[0], params)
    while engine.busy:  # the tree knows the prompts' beginning now
        engine.step()
    requests = [engine.add(ids, params, record=i != 2) for i, ids in enumerate(prompts)]
    while engine.busy:
        engine.step()
        engine.check()
        for request in requests:
            assert request.trace is None or request.finish or len(request.trace.ids) == request.computed
    assert any(request.preempted for request in requests) and requests[2].trace is None
    for ids, request in zip(prompts, requests, strict=True):
        if request.trace is None:
            continue
        expected = Trace(model.config)
        outputs = list(generate(model, ids, params, record=expected))
        assert request.outputs == outputs and request.trace.ids == expected.ids == [*ids, *outputs[:-1]]
        for kind in ("selections", "routes"):
            found, wanted = getattr(request.trace, kind), getattr(expected, kind)
            assert found.keys() == wanted.keys() and all(torch.equal(found[i], wanted[i]) for i in found)
        assert len(request.kept) == 20 and sum(request.kept) == sum(request.accepted)
    assert any(any(request.kept) for request in requests) == (drafts > 0)
