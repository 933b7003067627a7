"""The twelve-layer model that comes with nanoglm: it can tell patterns apart, and greedy finds the optimum on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nanoglm
from nanoglm.cli import main
from nanoglm.indexcache import Evaluator, GLMStack, Search, apply, gates, of_tasks
from nanoglm.indexcache.commands import DEFAULT
from nanoglm.tasks import draw
from nanoglm.verify.oracle import hf, our_tie_rule, silent


@pytest.fixture(scope="module")
def stack() -> GLMStack:
    return GLMStack(nanoglm.load(DEFAULT).module)


def test_every_gate_is_open(stack: GLMStack) -> None:
    """Spec 8.3, on sequences that nothing was chosen by."""
    found = gates(stack, of_tasks(("recall", "2hop", "3hop", "4hop"), 512, 16, seed=5))
    assert len(found) == 5 and all(gate.ok for gate in found), found


def test_greedy_finds_the_optimum_and_uniform_does_not(stack: GLMStack) -> None:
    search = Search(Evaluator(stack, of_tasks(("recall", "3hop"), 512, 6, seed=6)))
    best, rows = search.exhaustive(2), search.greedy(2)
    harm, error = search.difference("FSSSSSFSSSSS", search.own)
    assert harm > 5 * error
    (rule, *_) = search.uniform(2)
    assert (rule.loss - rows[-1].loss) / (rule.loss - best.loss) >= 0.95


def test_hops_show_what_single_facts_do_not(stack: GLMStack) -> None:
    """GLM-5.2's own rule at this depth: single facts are found as before, chains are not."""
    data = of_tasks(("recall", "3hop"), 512, 8, seed=7)
    search = Search(Evaluator(stack, data))
    own, rule = search.row("all", search.own).right, search.row("glm", "FFFSSSSSFSSS").right
    assert own["recall"] > 0.97 and own["3hop"] > 0.9
    assert rule["recall"] > 0.9 and rule["3hop"] < 0.5


@torch.no_grad()
def test_transformers_loads_it_with_a_pattern(tmp_path: Path) -> None:
    """What apply writes of trained weights, read by both: the same logits on a sequence sixteen times k long."""
    apply(Path(DEFAULT), "FFFSFSSSSFSS", tmp_path / "out")
    ids = torch.from_numpy(draw("multihop", 512, np.random.default_rng(0), facts=16).ids)
    with silent():
        theirs = hf.GlmMoeDsaForCausalLM.from_pretrained(
            tmp_path / "out", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        ).eval()
    with our_tie_rule():
        expected = theirs(ids[None], use_cache=False).logits[0]
    found = nanoglm.load(tmp_path / "out", latent_norm_eps=1e-6).logits([ids.tolist()])[0]
    assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) <= 1e-5


def test_the_commands_take_it_when_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    main(["indexcache", "overlap", "--sequences", "4", "--tasks", "recall"])
    assert "256 to 511" in capsys.readouterr().out
