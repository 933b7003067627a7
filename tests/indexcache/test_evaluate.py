"""Many schedules at once give what each gives by itself, whatever is shared, kept, cut or read from a disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_models import LAYERS, sequences, small

from nanoglm.errors import InputError
from nanoglm.eval.longcontext import rescheduled
from nanoglm.indexcache.calibration import Calibration, of_tasks, of_text
from nanoglm.indexcache.evaluate import Evaluator
from nanoglm.indexcache.pattern import flipped, subsets
from nanoglm.indexcache.stack import GLMStack
from nanoglm.model import GLM, BatchStore
from nanoglm.weights import save


@torch.no_grad()
def alone(model: GLM, pattern: str, data: Calibration) -> torch.Tensor:
    """Loss by sequence of a model that is built with this schedule."""
    other, sample = rescheduled(model, pattern), data.sample
    logits = other.logits(other(sample.ids, sample.batch, BatchStore()).hidden)
    losses = F.cross_entropy(logits, sample.targets, reduction="none").double()
    return losses.view(len(data), -1).mean(1)


@given(
    st.sets(st.sampled_from(subsets("F" * LAYERS, 2) + subsets("F" * LAYERS, 3)), min_size=1, max_size=6),
    st.sampled_from([1 << 30, 140_000, 65_280]),
    st.sampled_from([24, 48, 8192]),
)
@settings(max_examples=20, deadline=None)
def test_each_pattern_gives_what_it_gives_alone(patterns: set[str], budget: int, batch_tokens: int) -> None:
    model = small()
    data = sequences(model)
    found = Evaluator(GLMStack(model), data, budget=budget, batch_tokens=batch_tokens).scores(patterns)
    assert set(found) == patterns
    for pattern, score in found.items():
        torch.testing.assert_close(score.loss, alone(model, pattern, data), rtol=0, atol=2e-6)


def test_a_layer_uses_exactly_its_sources_set() -> None:
    model = small()
    data, seen = sequences(model), {}
    stack = GLMStack(model)
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, args, out, i=i: seen.setdefault(i, []).append((args[2], out[1])))
    Evaluator(stack, data).scores(["FSFSS"])
    used = [calls[0][1] for calls in (seen[i] for i in range(LAYERS))]
    assert used[1] is used[0] and used[3] is used[2] and used[4] is used[2] and not torch.equal(used[2], used[0])


def test_kept_states_change_nothing_and_save_work() -> None:
    model, own = small(8), "F" * 8
    data = sequences(model)
    committed, with_restart, naive = (
        own,
        Evaluator(GLMStack(model), data),
        Evaluator(GLMStack(model), data, restart=False),
    )
    plain = 0
    while committed.count("F") > 2:
        candidates = [flipped(committed, i) for i in range(1, 8) if committed[i] == "F"]
        found, same = with_restart.scores(candidates, committed), naive.scores(candidates)
        for pattern in candidates:
            assert torch.equal(found[pattern].loss, same[pattern].loss)
        plain += len(candidates) * 8 * len(data.sample.ids)
        committed = min(candidates, key=lambda p: float(found[p].loss.mean()))
    assert with_restart.layer_tokens < naive.layer_tokens < plain


def test_layers_are_read_once_for_all_candidates(tmp_path: Path) -> None:
    model = small()
    save(model, tmp_path / "m", dtype=torch.float32)
    data, stack = sequences(model), GLMStack.streamed(tmp_path / "m")
    assert all(p.is_meta for layer in stack.model.layers for p in layer.parameters())
    patterns = subsets("F" * LAYERS, 3)
    found = Evaluator(stack, data, batch_tokens=24).scores(patterns)
    assert stack.layers_read == LAYERS
    for pattern, score in found.items():
        torch.testing.assert_close(score.loss, alone(model, pattern, data), rtol=0, atol=2e-6)


@pytest.mark.parametrize("pattern", ["SFFFF", "FFFF", "FXFFF", "FFFFFF", ""])
def test_patterns_that_are_none_are_refused(pattern: str) -> None:
    model = small()
    with pytest.raises(InputError, match="expected 5 letters F and S"):
        Evaluator(GLMStack(model), sequences(model)).scores([pattern])


def test_an_f_needs_an_indexer() -> None:
    model = rescheduled(small(), "FSFSF")
    with pytest.raises(InputError, match="own FSFSF"):
        Evaluator(GLMStack(model), sequences(model)).scores(["FFFSF"])


def test_a_sequence_without_a_target_is_refused() -> None:
    model = small()
    data = sequences(model)
    data.sample.targets[:24] = -100
    with pytest.raises(InputError, match="nothing is scored"):
        Evaluator(GLMStack(model), data).scores(["FSSSS"])


def test_calibration_sets_are_fixed_and_apart() -> None:
    text = np.arange(4000)
    here, there = of_text(text, 32, 8), of_text(text, 32, 8, skip=1)
    assert here.digest == of_text(text, 32, 8).digest != there.digest
    begins = [[int(x) for x in each.sample.ids.view(8, 32)[:, 0]] for each in (here, there)]
    assert not set(begins[0]) & set(begins[1])
    with pytest.raises(InputError, match="at least"):
        of_text(text[:500], 32, 8)
    tasks = of_tasks(("recall", "multihop"), 128, 4)
    assert (
        tasks.groups == ("recall", "multihop") * 2 and tasks.digest == of_tasks(("recall", "multihop"), 128, 4).digest
    )
    assert tasks.digest != of_tasks(("recall", "multihop"), 128, 4, seed=1).digest
