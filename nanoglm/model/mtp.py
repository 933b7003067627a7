"""Multi-token prediction: one more decoder layer that drafts the token after next.

The layer sits at ``model.layers.{num_hidden_layers}`` and borrows the main model's embedding and
head. One physical layer is used for several draft steps (architecture spec 3):

* step 0 runs over verified tokens with the main model's hidden states, writes its own keys and
  selects with its own indexer;
* later steps reuse the Selection row of the last accepted token unchanged and attend only to keys
  written at step 0 (IndexShare and KVShare): the draft tokens' own keys are never read, also when
  fewer than k tokens are cached;
* what is recycled from step to step is the hidden state *after* ``shared_head.norm`` (trap 11).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoglm.config import GLMConfig
from nanoglm.model.block import DecoderLayer
from nanoglm.model.layers import Linear, RMSNorm
from nanoglm.model.step import Pass


class SharedHead(nn.Module):
    """The norm before the main model's head; the checkpoint stores no head here."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """The MTP layer: a decoder layer over the next token's embedding and the present hidden state."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def draft(
        self, next_TD: Tensor, hidden_TD: Tensor, step: Pass, selection: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One draft step (architecture spec 3.1).

        Args:
            next_TD: embedding of the token that follows each position.
            hidden_TD: step 0: the main model's hidden after its final norm; later: what this returned.
            step: step 0 writes keys; later steps come from :meth:`Pass.draft`.
            selection: None at step 0, later the reused rows.

        Returns:
            m [T, D], which feeds both the head and the next step, and the Selection.
        """
        z_TD = self.eh_proj(torch.cat([self.enorm(next_TD), self.hnorm(hidden_TD)], -1))  # embedding first
        y_TD, selection = self(z_TD, step, selection)
        return self.shared_head.norm(y_TD), selection
