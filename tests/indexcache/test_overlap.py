"""Overlap of Selections and likeness of attention outputs, against what a loop over rows finds."""

import pytest
import torch
from pattern_models import sequences, small

from nanoglm.errors import InputError
from nanoglm.eval.longcontext import rescheduled
from nanoglm.indexcache.gates import _made, gates, scores
from nanoglm.indexcache.overlap import merged, overlap, similarity
from nanoglm.indexcache.stack import GLMStack
from nanoglm.model import BatchStore

K = 4  # that small models select


def test_overlap_is_that_of_the_sets() -> None:
    model = small()
    data = sequences(model, 3, 40)
    with torch.no_grad():
        chosen = model(data.sample.ids, data.sample.batch, BatchStore()).selections
    sets = [[set(row[row >= 0].tolist()) for row in s] for s in chosen if s is not None]
    bands = overlap(GLMStack(model), data)
    assert [(band.begin, band.end) for band in bands] == [(8, 16), (16, 32), (32, 64)]
    for band in bands:
        rows = [r for r in range(3 * 40) if band.begin <= r % 40 < band.end]
        assert band.queries == len(rows)
        assert band.chance == pytest.approx(sum(K / (r % 40 + 1) for r in rows) / len(rows))
        for i in range(5):
            assert band.overlap[i, i] == 1 and band.corrected[i, i] == 1
            for j in range(5):
                expected = sum(len(sets[i][r] & sets[j][r]) for r in rows) / K / len(rows)
                assert float(band.overlap[i, j]) == pytest.approx(expected)
    whole = merged(bands, 16)
    assert whole.queries == bands[1].queries + bands[2].queries
    weighted = (bands[1].overlap * bands[1].queries + bands[2].overlap * bands[2].queries) / whole.queries
    torch.testing.assert_close(whole.overlap, weighted)


def test_shared_layers_overlap_wholly() -> None:
    model = rescheduled(small(), "FSFSS")
    bands = overlap(GLMStack(model), sequences(model, 3, 40))
    assert bands[-1].overlap[0, 1] == bands[-1].overlap[2, 4] == 1 != bands[-1].overlap[0, 2]


def test_overlap_by_chance_is_corrected_to_nothing() -> None:
    """Random sets: overlap is the chance level within sampling error."""
    positions = torch.arange(600)
    generator = torch.Generator().manual_seed(0)
    one, other = (_made("random", positions, 32, generator) for _ in range(2))
    assert one is not None and other is not None
    rows = range(128, 600)
    found = sum(len(set(one[r].tolist()) & set(other[r].tolist())) / 32 for r in rows) / len(rows)
    chance = sum(32 / (r + 1) for r in rows) / len(rows)
    assert found == pytest.approx(chance, abs=0.01)


def test_short_sequences_show_no_overlap() -> None:
    model = small()
    with pytest.raises(InputError, match="more than 2 k"):
        overlap(GLMStack(model), sequences(model, 3, 8))


def test_similarity_is_the_cosine_under_the_other_set() -> None:
    model = small(3)
    data = sequences(model, 2, 24)
    found = similarity(GLMStack(model), data)
    with torch.no_grad():
        output = model(data.sample.ids, data.sample.batch, BatchStore())
        outputs = {}

        def keep(module: object, args: object, out: tuple[torch.Tensor, object]) -> None:
            outputs["last"] = out[0]

        model.layers[2].self_attn.register_forward_hook(keep)
        for j in (0, 1, 2):
            given = [s for s in output.selections if s is not None]
            given[2] = given[j]
            model(data.sample.ids, data.sample.batch, BatchStore(), selections=given)
            outputs[j] = outputs["last"].double()
    for j in (0, 1):
        expected = torch.nn.functional.cosine_similarity(outputs[2], outputs[j], dim=-1).mean()
        assert float(found[2, j]) == pytest.approx(float(expected), abs=1e-6)
    assert torch.equal(found.triu(), torch.zeros(3, 3, dtype=torch.float64))


# ------------------------------------------------------------------------------- gates
@pytest.mark.parametrize("way", ["random", "window"])
def test_controls_are_selections(way: str) -> None:
    positions = torch.cat([torch.arange(50), torch.arange(7)])
    made = _made(way, positions, 8, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert made is not None and made.dtype == torch.int32 and made.shape == (57, 8)
    for at, row in zip(positions.tolist(), made.tolist(), strict=True):
        valid = [p for p in row if p >= 0]
        assert len(valid) == min(8, at + 1) == len(set(valid)) and valid == sorted(valid) and valid[-1] <= at
        assert row[len(valid) :] == [-1] * (8 - len(valid))
        if way == "window":
            assert valid == (list(range(at + 1)) if at < 8 else [0, *range(at - 6, at + 1)])


def test_where_k_covers_everything_all_ways_are_dense() -> None:
    model = small()
    data, stack = sequences(model, 3, 4), GLMStack(model)
    dense = scores(stack, data, "dense").loss
    for way in ("sparse", "random", "window", "one"):
        torch.testing.assert_close(scores(stack, data, way).loss, dense, rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_one_is_the_pattern_of_one_f() -> None:
    model = small()
    data = sequences(model)
    alone = scores(GLMStack(rescheduled(model, "FSSSS")), data, "sparse").loss
    assert torch.equal(scores(GLMStack(model), data, "one").loss, alone)


def test_gates_stay_shut_on_random_weights() -> None:
    """It does not matter what a model selects that has learnt nothing: the gates say so."""
    model = small()
    shut = [gate.name for gate in gates(GLMStack(model), sequences(model)) if not gate.ok]
    assert any("random" in name for name in shut) and any("last k - 1" in name for name in shut)
