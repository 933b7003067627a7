"""Pass: what one forward pass carries past every layer.

State is passed, never global: the batch's geometry, the rotation at its positions, where keys are
kept, and which form attention takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from nanoglm.model.layers import Rotary
from nanoglm.model.store import Store
from nanoglm.ops import Batch

if TYPE_CHECKING:
    from nanoglm.model.indexer import IndexerInputs

# sparse: absorbed, touches selected rows only. masked: expanded, every causal pair, unselected masked
# (cheaper to train near length k). dense: expanded, no Selection (the baseline; contiguous batches only).
Attention = Literal["sparse", "masked", "dense"]


class Tape:
    """What training reads from a pass.

    No dataclass: wrappers that look for tensors in a forward's arguments would rebuild it, and write into a copy.

    Attributes:
        indexers: whether what indexers learn from is kept too, the first three below.
        indexer: by layer, the indexer's inputs. selections: int32 [T, K] where it chose.
        attention: the teacher's queries and keys, detached: expanded [T, H, A] both, or of the absorbed form queries
            [T, H, C + R] and keys [T, C + R], which all heads share (whole sequences only).
        experts: the experts chosen, int64 [T, k]. scores: the router's, [T, E].
    """

    def __init__(self, indexers: bool = True) -> None:
        self.indexers = indexers
        self.indexer: dict[int, IndexerInputs] = {}
        self.selections: dict[int, Tensor] = {}
        self.attention: dict[int, tuple[Tensor, Tensor]] = {}
        self.experts: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}


@dataclass(frozen=True)
class Pass:
    """One forward pass over a ragged batch."""

    batch: Batch
    rotary: Rotary
    store: Store
    attention: Attention = "sparse"
    replay: bool = False  # Full layers take the Selection they are given instead of their own
    reuse_keys: bool = False  # the keys are written already: attend to them, write none
    tape: Tape | None = None
    routes: Mapping[int, Tensor] | None = None  # per MoE layer int64 [T, k]: replayed instead of the router's choice
    topk: int | None = None  # width of the Selections, if not the configuration's

    @property
    def recording(self) -> Tape | None:
        """The tape, if indexers and teachers are to be kept on it. Passes that reuse keys have neither."""
        return self.tape if self.tape is not None and self.tape.indexers and not self.reuse_keys else None

    def draft(self, rotary: Rotary) -> Pass:
        """The same pass for a later MTP step: rotated further, keys and Selection of step 0 (KVShare)."""
        return replace(self, rotary=rotary, reuse_keys=True, replay=True)

    def tail(self, counts: Sequence[int]) -> tuple[Pass, Tensor]:
        """The same pass for the last ``counts`` rows of each request, whose keys are written; and those rows."""
        batch, rows = self.batch.tail(counts)
        routes = self.routes and {layer: ids_Tk[rows] for layer, ids_Tk in self.routes.items()}
        rotary = Rotary(self.rotary.cos[rows], self.rotary.sin[rows])
        return replace(self, batch=batch, rotary=rotary, reuse_keys=True, routes=routes), rows
