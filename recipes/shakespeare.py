"""Tiny Shakespeare, character by character, beside nanoGPT's CPU configuration: four layers, two cores, two minutes.

nanoglm train recipes/shakespeare.py --text input.txt --out runs/shakespeare

Everything a GLM-5.2 has is in it: MLA, experts, an MTP layer, and at the end indexers whose choice two layers share.
"""

from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse


def recipe() -> Recipe:
    """Short sequences and small steps, for most of what there is to learn is near; Muon at a high rate."""
    return Recipe(
        "nano", depth=4, steps=1000, tokens=1024, warmup=20, mtp_depths=1,
        stages=(dense(0.8, 128), indexer_warmup(0.05, 128), sparse(0.15, 128, indexer_every=2)),
    )  # fmt: skip
