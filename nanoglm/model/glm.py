"""GLM-5.2, the whole model. Read this file first.

Token ids packed into one ragged batch ``[T]`` become logits ``[T, V]``:

    embedding -> 78 decoder layers -> final norm -> head

Each layer attends only to k selected tokens. A *Full* layer runs the lightning indexer and returns
its Selection, an int32 tensor [T, K] of logical positions; a *Shared* layer receives the one of the
last Full layer. That is IndexShare, and it is one variable in the loop below. Behind the last layer
sits the MTP layer, which drafts further tokens from the final hidden states.

Parameters carry the checkpoint's names. Shape legend: T tokens of the ragged batch, D hidden,
K selected, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model.block import DecoderLayer
from nanoglm.model.layers import LayerNorm, Linear, RMSNorm, Rotary
from nanoglm.model.mtp import MTPLayer
from nanoglm.model.step import Attention, Pass, Tape
from nanoglm.model.store import Store
from nanoglm.ops import Batch


class Output(NamedTuple):
    """Result of one pass of the main model."""

    hidden: Tensor  # [T, D], after the final norm: feeds the head and the MTP layer; of the rows asked for
    selections: list[Tensor | None]  # one int32 [T, K] a layer; a Shared layer's is its source's object (not at a tail)
    step: Pass  # the pass itself, which MTP drafting continues


class Backbone(nn.Module):
    """Everything under ``model.`` in the checkpoint."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        # Not drawn here: on the meta device PyTorch would load its whole compiler for that.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        layers: list[DecoderLayer] = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        if config.num_nextn_predict_layers:
            layers.append(MTPLayer(config))  # its index is num_hidden_layers, as in the checkpoint
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GLM(nn.Module):
    """The model as an ``nn.Module``. Weights are uninitialised until loaded or :meth:`initialise` runs."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)

    def forward(
        self,
        ids_T: Tensor,
        batch: Batch,
        store: Store,
        *,
        attention: Attention = "sparse",
        selections: Sequence[Tensor] | None = None,
        routes: Mapping[int, Tensor] | None = None,
        tape: Tape | None = None,
        tail: Sequence[int] | None = None,
        topk: int | None = None,
        keep_selections: bool = True,
    ) -> Output:
        """Runs the decoder layers over one ragged batch.

        Args:
            ids_T: int64 [T] token ids.
            batch: where the rows stand and where their keys lie.
            store: keeps the keys; a ``BatchStore`` for whole sequences, a ``PagedCache`` otherwise.
            attention: "sparse" (default), or "masked" and "dense" for training and comparison.
            selections: one int32 [T, K] a layer, replayed instead of the indexers' own.
            routes: per MoE layer expert ids int64 [T, k], replayed instead of the routers' choice.
            tape: collects what training losses need.
            tail: of how many of each request's last rows the hidden states are wanted (default: of all). The
                last layer then writes every row's keys and works at those rows only; nothing else reads it.
            topk: tokens that each row selects, if not the configuration's ``index_topk``.
            keep_selections: False lets each go once the next Full layer has its own, and returns none: k positions
                a row and Full layer are more memory than the rows.

        Raises:
            ValueError: an expanded form asked for on a paged batch, whose keys are not the batch's rows.
        """
        if attention != "sparse" and batch.page_size != 1:
            raise ValueError(f"attention is {attention!r} on a paged batch; expected 'sparse'")
        replayed = selections is not None
        step = Pass(batch, self.rotary(batch.turns), store, attention, replayed, tape=tape, routes=routes, topk=topk)
        x_TD = self.model.embed_tokens(ids_T)
        selection: Tensor | None = None
        used: list[Tensor | None] = []
        layers = self.layers
        for i, layer in enumerate(layers):
            if selections is not None:
                selection = selections[i]
            if tail is not None and layer is layers[-1]:
                layer.write_keys(x_TD, step)
                asked, rows = step.tail(tail)
                x_TD, selection = layer(x_TD[rows], asked, None if selection is None else selection[rows])
            else:
                x_TD, selection = layer(x_TD, step, selection)  # Full: its own; Shared: the one it received
            if keep_selections:
                used.append(selection)
        return Output(self.model.norm(x_TD), used, step)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] from hidden states after the final norm (or from the MTP layer's m)."""
        return self.lm_head(hidden_TD)

    def draft(
        self, next_ids_T: Tensor, hidden_TD: Tensor, step: Pass, *, depth: int = 0, selection: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """MTP step ``depth`` (architecture spec 3.1, 3.3).

        Depth 0 takes the main model's hidden states and that pass; position t sees token t + 1.
        Depth j > 0 takes what depth j - 1 returned, tokens t + 1 + j, and stands at position t + j.

        Returns:
            m [T, D] (``logits(m)`` predicts token t + 2 + depth) and the Selection to pass on.
        """
        step = replace(step, replay=False, routes=None)  # a recording holds the decoder layers only
        step = step.draft(self.rotary(step.batch.turns + depth)) if depth else step
        return self.mtp.draft(self.model.embed_tokens(next_ids_T), hidden_TD, step, selection)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers proper, without the MTP layer."""
        layers = list(self.model.layers)[: self.config.num_hidden_layers]
        return cast(list[DecoderLayer], layers)

    @property
    def mtp(self) -> MTPLayer:
        """The MTP layer. Raises InputError if this checkpoint has none."""
        last = self.model.layers[-1]
        if not isinstance(last, MTPLayer):
            raise InputError(f"model has no MTP layer; expected tensors model.layers.{len(self.model.layers)}.*")
        return last

    def rotary(self, positions: Tensor) -> Rotary:
        """RoPE at int64 positions [T]."""
        return Rotary.at(positions, self.config.qk_rope_head_dim, self.config.rope_theta)

    @torch.no_grad()
    def initialise(self, seed: int = 0, shared: float = 0.0) -> GLM:
        """Random weights: normal with ``initializer_range``, norms 1, biases 0. Returns self.

        What writes to the residual stream starts smaller by sqrt(2 * layers), so that depth does not
        drown the embedding (GPT-2's rule; measured in docs/log.md).

        Args:
            shared: added to every embedding. There are no biases, so attention by position alone (to the token before,
                whatever it is) needs a direction that all tokens have; else it has to be learnt first.
        """
        generator = torch.Generator(device=self.lm_head.weight.device).manual_seed(seed)
        smaller = (2 * self.config.num_hidden_layers) ** -0.5
        for path, module in self.named_modules():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if value.ndim > 1:
                    residual = f"{path}.{name}".endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                    deviation = self.config.initializer_range * (smaller if residual else 1.0)
                    nn.init.normal_(value, 0.0, deviation, generator=generator)
                else:
                    value.fill_(1.0 if name == "weight" and isinstance(module, RMSNorm | LayerNorm) else 0.0)
        self.model.embed_tokens.weight += shared
        return self
