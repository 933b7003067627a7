"""The bundled model: 3.85M parameters on 25 novels, two cores, about half an hour.

nanoglm train recipes/nano.py --text NOVELS --out runs/nano
"""

from nanoglm.train.recipe import Recipe, dense, indexer_warmup, long, sparse


def recipe() -> Recipe:
    """Seven tenths dense at 256 tokens, then the indexers, then 512 and at last 2,048, of which each attends to 64."""
    stages = (dense(0.7, 256), indexer_warmup(0.07, 256), sparse(0.15, 512), long(0.08, 2048))
    return Recipe("nano", steps=4000, tokens=2048, stages=stages)
