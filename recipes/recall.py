"""Long context from short sequences: 512 tokens in training, 64K and more at test.

nanoglm train recipes/recall.py --text NOVELS --out runs/recall
"""

from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse, tasks


def recipe() -> Recipe:
    """Pairs alone until matching works, then all tasks at 512, selecting 16, where the test selects 64 of 64K."""
    return Recipe(
        "recall", steps=4000, tokens=1024, warmup=20, optimizer="muon", rate=4e-3, weight_decay=0.01,
        stages=tasks(
            dense(0.1, 16), dense(0.15, 32), dense(0.15, 128), dense(0.1, 512), indexer_warmup(0.1, 512),
            sparse(0.4, 512, 2), topk=16,
        ),
    )  # fmt: skip
