"""Long context from short sequences: 512 tokens in training, 64K and more at test.

nanoglm train recipes/recall.py --text NOVELS --out runs/recall
"""

from dataclasses import replace

from nanoglm.train.recipe import Recipe, Stage, dense, indexer_warmup, sparse, tasks

STEPS = 2900


def recipe() -> Recipe:
    """Pairs alone until matching works, then all tasks; selecting 16 of 512, where the test selects 64 of 64K.

    Rotation serves the token before alone here: of base 1e4 five of its eight pairs tell near distances from far ones,
    of 8e6 two. At the end attention is sharpened, for a softmax over 128 times as many keys (docs/log.md).
    """
    begin = replace(dense(200 / STEPS, 16), rope_theta=1e4)
    return Recipe(
        "recall", steps=STEPS, tokens=1024, warmup=20, optimizer="muon", rate=1e-3, floor=1.0, weight_decay=0.01,
        shared=0.06, late=1.0, sharpen=1.3,
        stages=tasks(
            at(3.0, begin), at(3.0, dense(150 / STEPS, 32)), at(2.5, dense(200 / STEPS, 128)),
            at(2.0, dense(500 / STEPS, 512)), at(0.8, dense(700 / STEPS, 512)), indexer_warmup(400 / STEPS, 512),
            at(0.5, sparse(350 / STEPS, 512, 1)), at(0.2, sparse(400 / STEPS, 512, 1)), topk=16,
        ),
    )  # fmt: skip


def at(rate: float, stage: Stage) -> Stage:
    """The stage at so many times the recipe's rate."""
    return replace(stage, rate=rate)
