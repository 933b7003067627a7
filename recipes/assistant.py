"""The bundled assistant: 1.2M parameters on conversations that are generated as it learns, one core, about an hour.

nanoglm train recipes/assistant.py --out runs/assistant
"""

from dataclasses import replace

from nanoglm.train.recipe import Recipe, Stage, assistant, dense, indexer_warmup, long

STEPS = 6200


def recipe() -> Recipe:
    """Short conversations first, whose every third token teaches; then tools and texts; then under Selections of 64."""
    return Recipe(
        "assistant", steps=STEPS, tokens=2048, warmup=50, rate=4e-3, floor=0.05, weight_decay=0.05, shared=0.06,
        indexer_rate=3e-3, late=0.8,
        stages=assistant(
            dense(2700 / STEPS, 256), at(1.8, dense(850 / STEPS, 1024)), indexer_warmup(110 / STEPS, 512),
            at(0.9, long(640 / STEPS, 1024)), at(0.9, long(1900 / STEPS, 2048)),
        ),
    )  # fmt: skip


def at(rate: float, stage: Stage) -> Stage:
    """The stage at so many times the rate; its indexers, where they do not rest, learn at every fifth step."""
    return replace(stage, rate=rate, indexer_every=5 * (stage.indexer_every > 0))
