"""Training-aware sharing: a model learns to live with a pattern, and the indexers that stay to serve several layers.

From a model that was pre-trained densely: the indexers alone learn from dense attention (warm-up), then all of it
trains under their Selections. A Full layer's indexer learns the mean attention of all that it serves (multi-layer
loss) or, for comparison, its own layer's. The pattern of all F gives the ordinary model, on which training-free search
works; a pattern put onto that one without training shares at inference only.

Source: indexcache spec 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nanoglm.api import Model
from nanoglm.errors import InputError
from nanoglm.indexcache.pattern import sources
from nanoglm.model import GLM
from nanoglm.tasks import VOCABULARY
from nanoglm.train.recipe import Recipe, indexer_warmup, sparse, tasks
from nanoglm.train.run import Corpus, run


def recipe_of(alone: int, together: int, length: int, on_tasks: bool, **changes: Any) -> Recipe:
    """The two stages of distillation.

    Args:
        alone, together: steps of the indexers alone, and of all under their Selections.
        length: tokens of a sequence. on_tasks: learn from the tasks of long context, not from text.
        changes: other fields of the recipe.

    Raises:
        InputError: a number out of range.
    """
    if alone < 1 or together < 0:
        raise InputError(f"warmup is {alone} and steps {together}; expected at least 1 and 0")
    total = alone + together
    stages = indexer_warmup(alone / total, length), sparse(together / total, length, 1)
    return Recipe(steps=total, stages=tasks(*stages) if on_tasks else stages, **changes)


@torch.no_grad()
def scheduled(model: GLM, pattern: str, topk: int | None = None) -> GLM:
    """The same weights under a pattern; an indexer that the model lacks begins as the copy of its source's.

    Args:
        topk: tokens that each selects, if another number.

    Raises:
        ConfigError: letters other than F and S, another number of them, S first.
    """
    config = model.config.with_pattern(pattern).replace(index_topk=topk or model.config.index_topk)
    other = GLM(config).to(model.lm_head.weight)
    state, own = model.state_dict(), sources(model.config.pattern)
    for layer in config.full_layers:
        if not model.config.has_indexer(layer):
            here, there = (f"model.layers.{i}.self_attn.indexer." for i in (layer, own[layer]))
            state |= {here + name.removeprefix(there): t for name, t in state.items() if name.startswith(there)}
    wanted = other.state_dict()
    other.load_state_dict({name: state[name] for name in wanted})
    return other


def distil(
    model: GLM, pattern: str, data: Corpus, recipe: Recipe, out: Path, *, topk: int | None = None, resume: bool = False
) -> None:
    """Trains ``model`` under ``pattern`` by a recipe of :func:`recipe_of` and writes the checkpoint directory ``out``.

    As after every training on text, the Shared layers then get indexers of their own, for comparison, in a file beside
    the weights; that takes as many steps as the first stage.

    Args:
        topk: tokens that each selects, if not the model's own number.

    Raises:
        ConfigError: no such pattern. InputError: as :func:`nanoglm.train.run.run`.
    """
    if recipe.reads("recall") and model.config.vocab_size != VOCABULARY:
        raise InputError(f"model has vocabulary {model.config.vocab_size}; expected the tasks' {VOCABULARY}")
    run(data, recipe, out, Model(scheduled(model, pattern, topk), None), resume=resume)
