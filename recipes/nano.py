"""The bundled model: 3.85M parameters on 25 novels, two cores, about half an hour.

nanoglm train recipes/nano.py --text NOVELS --out runs/nano
"""

from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse


def recipe() -> Recipe:
    """Three quarters dense at 256 tokens, then the indexers, then 512 tokens of which each attends to 64."""
    return Recipe("nano", steps=2000, stages=(dense(0.75, 256), indexer_warmup(0.07, 256), sparse(0.18, 512)))
