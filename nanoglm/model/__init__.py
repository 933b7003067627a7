"""GLM-5.2, written once: read glm.py first, then block, mla, indexer, moe, mtp, layers."""

from nanoglm.model.glm import GLM, Output
from nanoglm.model.step import Attention, Pass, Tape
from nanoglm.model.store import BatchStore, Store

__all__ = ["GLM", "Attention", "BatchStore", "Output", "Pass", "Store", "Tape"]
