"""The models of the pattern lab: twelve layers that answer questions over one and over several hops.

nanoglm train recipes/indexcache.py --text NOVELS --out runs/dense

trains what all arms begin from: dense attention, indexers at rest. An arm then gets its indexers and learns to live
with their Selections (nanoglm indexcache distil), every layer's or a pattern's.
"""

from dataclasses import replace

from nanoglm.train.recipe import Recipe, Stage, dense, tasks

LAYERS = 12
STEPS = 1950
TOPK = 32  # of 512


def recipe() -> Recipe:
    """Pairs until matching works, then mostly chains, whose second hop needs a second layer that matches, then all
    tasks at length (docs/log.md)."""
    begin = replace(dense(200 / STEPS, 16), rope_theta=1e4)
    return Recipe(
        "recall", depth=LAYERS, pattern="F" * LAYERS, steps=STEPS, tokens=1024, warmup=20, optimizer="muon", rate=1e-3,
        floor=0.3, weight_decay=0.01, shared=0.06, late=1.0, hops=0.7, skip_positions=False,
        stages=tasks(
            at(3.0, begin), at(3.0, dense(150 / STEPS, 32)), at(4.0, dense(800 / STEPS, 64)),
            at(3.0, dense(300 / STEPS, 128)), at(2.0, dense(500 / STEPS, 512)), topk=TOPK,
        ),
    )  # fmt: skip


def at(rate: float, stage: Stage) -> Stage:
    """The stage at so many times the recipe's rate."""
    return replace(stage, rate=rate)
