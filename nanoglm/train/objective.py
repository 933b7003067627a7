"""What one step minimises: a stage's loss terms over a sample, each as (sum, count), weighted and added exactly over
the parts of a step (and, beyond one machine, over its ranks).

Shape legend: T tokens of the packed sample, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import Tensor

from nanoglm.model import GLM, Tape
from nanoglm.model.indexer import IndexerInputs
from nanoglm.model.moe import MoE
from nanoglm.ops import Batch
from nanoglm.train import losses
from nanoglm.train.data import Sample
from nanoglm.train.recipe import Recipe

Sum = tuple[Tensor, int]
Total = Callable[[Tensor], Tensor]  # of a tensor over all ranks


@dataclass
class Done:
    """What a step found: mean losses by name, and how often each expert of a layer was chosen, [E]."""

    means: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)


def backward(
    model: GLM, sample: Sample, recipe: Recipe, step: int, total: Total = lambda x: x, sharded: bool = False
) -> Done:  # fmt: skip
    """Forward and backward of one step's sample, part by part; the gradients are those of the whole at once.

    Args:
        total: adds a tensor over the ranks that share the step.
        sharded: the model's gradients are reduced by hooks on the graph of its hidden states, which must have one even
            where the backbone rests.
    """
    stage = recipe.stage(step)
    weights = {
        "loss": 1.0,
        "mtp": recipe.late_mtp_weight if recipe.is_late(step) else recipe.mtp_weight,
        "balance": recipe.balance_weight,
        "kl": 1.0,
    }
    parts, done = sample.split(recipe.pass_tokens), Done()
    counts = _counts(parts, recipe, step, total)
    for part in parts:
        found, tape = terms(model, part, recipe, step)
        means = {name: value / counts[name] for name, (value, _) in found.items()}
        if not stage.backbone:
            means |= {name: _still(mean, sharded) for name, mean in means.items() if name != "kl"}
        objective = torch.stack([weights[name] * mean for name, mean in means.items() if mean.requires_grad]).sum()
        objective.backward()
        for name, mean in means.items():
            done.means[name] = done.means.get(name, 0.0) + mean.detach()
        for layer, ids in tape.experts.items():
            experts = tape.scores[layer].shape[1]
            done.loads[layer] = done.loads.get(layer, 0) + torch.bincount(ids.flatten(), minlength=experts)
    done.means = {name: total(mean) for name, mean in done.means.items()}
    done.loads = {layer: total(load) for layer, load in done.loads.items()}
    return done


def _still(mean: Tensor, graph: bool) -> Tensor:
    """The same value, from which nothing is learnt: without a graph, or with one through which only zeros flow."""
    return mean.detach() + 0.0 * mean if graph else mean.detach()


def _counts(parts: list[Sample], recipe: Recipe, step: int, total: Total) -> dict[str, int]:
    """Of each term over the whole step; at least 1, so that a step without a target divides by something."""
    each = [losses.counts(part, recipe.mtp_depths, recipe.drafts(step)) for part in parts]
    names = list(each[0])
    sums = total(torch.tensor([sum(count[name] for count in each) for name in names]))
    return {name: max(1, int(n)) for name, n in zip(names, sums, strict=True)}


def terms(model: GLM, sample: Sample, recipe: Recipe, step: int) -> tuple[dict[str, Sum], Tape]:
    """One forward pass with the loss terms of the step's stage; what nothing is to learn from has no gradient."""
    stage = recipe.stage(step)
    index = stage.indexer_every > 0 and step % stage.indexer_every == 0
    tape = Tape(indexers=index)
    output = model(
        sample.ids, sample.batch, sample.store(), attention=stage.attention, tape=tape, topk=stage.topk
    )  # fmt: skip
    found = {"loss": losses.cross_entropy(model, output.hidden, sample.targets)}
    if model.config.num_nextn_predict_layers:
        found["mtp"] = losses.DRAFTS[recipe.drafts(step)](model, output, sample, recipe.mtp_depths)
    if stage.backbone and tape.experts and recipe.balance_weight:
        found["balance"] = balance_loss(tape, sample)
    if index:
        sparse = stage.attention != "dense" and stage.kl_of == "selected"
        found["kl"] = indexer_loss(model, tape, sample, sparse=sparse, own=recipe.own_layer_kl)
    return found, tape


def balance_loss(tape: Tape, sample: Sample) -> Sum:
    """Mean over the layers that have experts."""
    found = [losses.balance(tape.scores[layer], ids, sample) for layer, ids in tape.experts.items()]
    return torch.stack([value for value, _ in found]).mean(), found[0][1]


def indexer_loss(model: GLM, tape: Tape, sample: Sample, *, sparse: bool, own: bool = False) -> Sum:
    """Mean KL over all indexers, the MTP layer's included, each against the layers it serves (``own``: its own).

    ``sparse``: over what each selected (training spec 1.3), not over all that it sees.
    """
    config = model.config
    served = losses.groups(config.full_layers, config.num_hidden_layers)
    if config.num_nextn_predict_layers:
        served[config.num_hidden_layers] = range(config.num_hidden_layers, config.num_hidden_layers + 1)
    sums: list[Tensor] = []
    for first, layers in served.items():
        layers = layers[:1] if own else layers
        selection = tape.selections[first] if sparse else None
        for rows, seen, length, before in _runs(sample.batch):
            q_TJI, weights_TJ, keys_SI = tape.indexer[first]
            inputs = IndexerInputs(q_TJI[rows], weights_TJ[rows], keys_SI[seen])
            teachers = [(q[rows], k[seen]) for q, k in (tape.attention[layer] for layer in layers)]
            chosen = None if selection is None else selection[rows]
            sums.append(losses.indexer_kl(inputs, teachers, length, config.qk_head_dim**-0.5, chosen, before)[0])
    return torch.stack(sums).sum() / len(served), len(sample.ids)


def _runs(batch: Batch) -> Iterator[tuple[slice, slice, int, int]]:
    """Of neighbouring sequences alike in length: their rows, their keys, rows of each, and tokens before these."""
    counts = [end - begin for begin, end in pairwise(batch.borders)]
    row = key = 0
    for (count, length), run in groupby(zip(counts, batch.lengths, strict=True)):
        n = len(list(run))
        if count:
            yield slice(row, row + n * count), slice(key, key + n * length), count, length - count
        row, key = row + n * count, key + n * length


@torch.no_grad()
def balance(model: GLM, loads: dict[int, Tensor], rate: float) -> None:
    """Auxiliary-loss-free balance: the bias of an overloaded expert falls, of an idle one rises."""
    for layer, load in loads.items():
        moe = model.model.layers[layer].get_submodule("mlp")
        assert isinstance(moe, MoE)
        load = load.float()
        moe.gate.e_score_correction_bias += rate * (load.mean() - load).sign()
