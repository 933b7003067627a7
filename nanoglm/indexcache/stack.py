"""Models as their layers, one after the other: what comparing many schedules at once asks of them.

Shape legend: T tokens of the ragged batch, D width, K selected, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nanoglm.model import GLM, BatchStore
from nanoglm.model.block import DecoderLayer
from nanoglm.model.step import Pass
from nanoglm.ops import Batch
from nanoglm.weights import Checkpoint

# As DecoderLayer: x [T, D], the pass, the Selection received -> x [T, D] and the one it attended under. With
# ``step.replay`` a layer takes the one received, else it chooses.
Layer = Callable[[Tensor, Pass, Tensor | None], tuple[Tensor, Tensor | None]]


class Stack(Protocol):
    """A decoder."""

    pattern: str  # F where a layer can choose, else S
    width: int  # bytes of a token between two layers: its state and its Selection

    def begin(self, ids_T: Tensor, batch: Batch) -> tuple[Tensor, Pass]:
        """The state before the first layer, [T, D], and the pass."""
        ...

    def layer(self, index: int) -> Layer:
        """A layer; its weights are in memory as long as it is held."""
        ...

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, V] from the state behind the last layer."""
        ...


class GLMStack:
    """A GLM, with production's ops in absorbed form.

    Args:
        model: what is held in memory. checkpoint: where the layers are read from, one at a time, if they are not.
        dtype: of layers that are read.
    """

    def __init__(self, model: GLM, checkpoint: Checkpoint | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.checkpoint, self.dtype = model.eval(), checkpoint, dtype
        config = model.config
        self.pattern = config.pattern
        self.width = config.hidden_size * dtype.itemsize + 4 * config.index_topk
        self.layers_read = 0

    @classmethod
    def streamed(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, all_full: bool = False
    ) -> GLMStack:  # fmt: skip
        """A checkpoint of which embedding and head are held, and each layer is read when it is needed.

        Args:
            all_full: with the Shared layers' own indexers, see :class:`nanoglm.weights.Checkpoint`.
        """
        checkpoint = Checkpoint(directory, all_full=all_full)
        model, _ = checkpoint.load(dtype=dtype, layers=())
        return cls(model, checkpoint, dtype)

    def begin(self, ids_T: Tensor, batch: Batch) -> tuple[Tensor, Pass]:
        step = Pass(batch, self.model.rotary(batch.turns), BatchStore())
        return self.model.model.embed_tokens(ids_T), step

    def layer(self, index: int) -> DecoderLayer:
        if self.checkpoint is None:
            return self.model.layers[index]
        self.layers_read += 1
        return self.checkpoint.layer(index, dtype=self.dtype)

    def logits(self, x_TD: Tensor) -> Tensor:
        return self.model.logits(self.model.model.norm(x_TD))


def run(layer: Layer, x_TD: Tensor, step: Pass, received: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A layer that takes the Selection received or, without one, chooses; its keys are let go afterwards."""
    return layer(x_TD, replace(step, replay=received is not None, store=BatchStore()), received)
