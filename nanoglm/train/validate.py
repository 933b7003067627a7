"""Validation of a model in training: its loss on unseen text, and the monitors that show what a loss hides.

The monitors of training spec 6: attention mass inside the top-k, active share of the indexers' ReLU (a head at 0 learns
no more), load of the experts, drafts that verification would accept.

Shape legend: T tokens, J indexer heads, S keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nanoglm import ops
from nanoglm.model import GLM, Attention, BatchStore, Tape
from nanoglm.train import losses
from nanoglm.train.data import Sample, Tokens

PASS_TOKENS = 4096


@dataclass(frozen=True)
class Validation:
    """A text cut into windows side by side, every token but the first of a window predicted once.

    Attributes:
        tokens: the text. length: tokens of a window. limit: use only the first so many tokens.
        depths: drafts in a row, for the share that is accepted.
    """

    tokens: Tokens
    length: int = 256
    limit: int | None = None
    depths: int = 2

    @property
    def windows(self) -> int:
        """How many there are."""
        usable = min(len(self.tokens), (self.limit or len(self.tokens)) + 1)
        return max(0, usable - 1) // self.length

    def samples(self) -> list[Sample]:
        """Its windows, as many in one pass as fit."""
        windows = self.windows
        each = max(1, PASS_TOKENS // self.length)
        found = []
        for begin in range(0, windows, each):
            n = min(each, windows - begin)
            ids = torch.from_numpy(self.tokens.read(begin * self.length, n * self.length + 1).astype("int64"))
            found.append(Sample.of(ids.unfold(0, self.length + 1, self.length)))
        return found

    @torch.no_grad()
    def run(self, model: GLM, attention: Attention) -> dict[str, float]:
        """Losses in nats a token with dense attention and, unless that is the stage's, under Selections; bits per byte
        of the stage's; monitors."""
        samples = [sample.to(model.lm_head.weight.device) for sample in self.samples()]
        forms: list[Attention] = ["dense"] if attention == "dense" else ["dense", attention]
        found: dict[str, float] = {}
        for form in forms:
            total, count = 0.0, 0
            for sample in samples:
                output = model(sample.ids, sample.batch, BatchStore(), attention=form)
                value, n = losses.cross_entropy(model, output.hidden, sample.targets)
                total, count = total + float(value), count + n
            found["val_dense" if form == "dense" else "val_sparse"] = round(total / count, 4)
            found["bits_per_byte"] = round(total / count / math.log(2) / self.tokens.bytes_per_token, 4)
        return found | monitors(model, samples[0], self.depths)


@torch.no_grad()
def monitors(model: GLM, sample: Sample, depths: int = 2) -> dict[str, float]:
    """What one forward pass over a sample shows.

    Returns:
        mass: of dense attention, what lies inside the top-k, least of all indexers, over the rows that see more than k.
        active: of the indexers' products, the share above 0, least of all heads.
        load: of the busiest expert over the mean, most of all layers. dead: experts that no token chose.
        accepted: tokens a verification yields, 1 to 1 + depths, when drafts are sampled.
    """
    tape = Tape()
    output = model(sample.ids, sample.batch, BatchStore(), attention="dense", tape=tape)
    found: dict[str, float] = {}
    if model.config.num_nextn_predict_layers:
        lost, count = losses.total_variation(model, output, sample, depths)
        found["accepted"] = 1 + depths * (1 - float(lost) / max(1, count))
    if tape.experts:
        loads = [torch.bincount(i.flatten(), minlength=tape.scores[n].shape[1]) for n, i in tape.experts.items()]
        found["load"] = max(float(load.max() / load.float().mean()) for load in loads)
        found["dead"] = float(sum(int((load == 0).sum()) for load in loads))
    masses, active = _indexers(model, tape, sample)
    if masses:
        found["mass"] = min(masses)
    if active:
        found["active"] = min(active)
    return {name: round(value, 4) for name, value in found.items()}


def _indexers(model: GLM, tape: Tape, sample: Sample) -> tuple[list[float], list[float]]:
    """Mass inside the top-k and active share, of each decoder layer's indexer, on the first sequence."""
    config, length = model.config, sample.counts[0]
    first = Sample(sample.ids[:length], sample.targets[:length], (length,)).batch
    masses, active = [], []
    for layer, served in losses.groups(config.full_layers, config.num_hidden_layers).items():
        q_TJI, weights_TJ, keys_SI = (x[:length] for x in tape.indexer[layer])
        visible_TS = first.positions[None] <= first.positions[:, None]
        dots_TJS = q_TJI @ keys_SI.mT
        active.append(float(((dots_TJS > 0) & visible_TS[:, None]).sum((0, 2)).min() / visible_TS.sum()))
        if length > config.index_topk:
            selection_TK = ops.select(q_TJI, weights_TJ, keys_SI, first, config.index_topk)
            rows = selection_TK[config.index_topk :].long()
            for other in served:
                q_THA, k_SHA = (x[None, :length] for x in tape.attention[other])
                (p_TS,) = ops.attention_of(
                    [(q_THA, k_SHA)], 0, length, config.qk_head_dim**-0.5, visible_TS[None], None
                )
                masses.append(float(p_TS[config.index_topk :].gather(1, rows).sum(1).mean()))
    return masses, active
