"""Checkpoints in and out."""

from nanoglm.weights.hf import SHARED_INDEXERS, Checkpoint, Report, checkpoint_tensors, materialise, save

__all__ = ["SHARED_INDEXERS", "Checkpoint", "Report", "checkpoint_tensors", "materialise", "save"]
