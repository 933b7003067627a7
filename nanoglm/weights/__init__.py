"""Checkpoints in and out."""

from nanoglm.weights.hf import SHARED_INDEXERS, Checkpoint, Report, checkpoint_tensors, materialise
from nanoglm.weights.slice import copy_companions
from nanoglm.weights.write import replacing, save, write_config

__all__ = [
    "SHARED_INDEXERS",
    "Checkpoint",
    "Report",
    "checkpoint_tensors",
    "copy_companions",
    "materialise",
    "replacing",
    "save",
    "write_config",
]
