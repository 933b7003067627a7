"""Checkpoints in and out."""

from nanoglm.weights.hf import SHARED_INDEXERS, Checkpoint, Report, checkpoint_tensors, materialise
from nanoglm.weights.write import save

__all__ = ["SHARED_INDEXERS", "Checkpoint", "Report", "checkpoint_tensors", "materialise", "save"]
