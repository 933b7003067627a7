"""What each part of a GLM-5.2 earns at small scale: the effects table of training spec 4.1, over several seeds.

python recipes/effects.py --text NOVELS --out runs/effects.jsonl

Each line of the file is one run; runs that are in it already are not done again. At the end the table is printed: mean
over the seeds, and of a difference also its standard error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro

from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM, Attention
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse
from nanoglm.train.run import Corpus, config_of, corpus
from nanoglm.train.trainer import Keep, train
from nanoglm.train.validate import Validation

STAGES = (dense(0.6, 256), indexer_warmup(0.2, 256), sparse(0.2, 256, indexer_every=2))  # fifths
DENSE = (*STAGES[:2], dense(0.2, 256))  # the backbone learns from the same tokens
VALIDATION_TOKENS = 32_768
BASE = Recipe("nano", steps=400, tokens=1024, warmup=20, stages=STAGES)


def all_full(config: GLMConfig) -> GLMConfig:
    """An indexer in every layer."""
    return config.replace(indexer_types=(FULL,) * config.num_hidden_layers)


def transformer(config: GLMConfig, more: int = 0) -> GLMConfig:
    """No experts, no MTP: as many parameters as a token visits in ``config``, and ``more`` of width in each layer."""
    layers, active = config.num_hidden_layers, config.num_experts_per_tok + config.n_shared_experts
    dense = config.mlp_layer_types.count("dense")
    width = (dense * config.intermediate_size + (layers - dense) * active * config.moe_intermediate_size) // layers
    changes = {"mlp_layer_types": ("dense",) * layers, "intermediate_size": width + more}
    return no_mtp(config).replace(**changes)


def as_costly(config: GLMConfig) -> GLMConfig:
    """The same with what two uses of the MTP layer cost in training, paid in width."""
    model = GLM(transformer(config))
    layer = sum(p.numel() for n, p in model.layers[1].named_parameters() if p.ndim == 2 and ".indexer." not in n)
    use = layer + 2 * config.hidden_size**2 + config.vocab_size * config.hidden_size
    return transformer(config, 2 * use // (3 * config.hidden_size * config.num_hidden_layers))


def no_mtp(config: GLMConfig) -> GLMConfig:
    """Without the MTP layer."""
    return config.replace(num_nextn_predict_layers=0)


# Name: changes of the recipe, and of the shape.
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[GLMConfig], GLMConfig]]] = {
    "base": ({}, lambda config: config),
    "dense": ({"stages": DENSE}, lambda config: config),
    "all-Full": ({}, all_full),
    "own-layer KL": ({"own_layer_kl": True}, lambda config: config),
    "MTP depth 1": ({"mtp_depths": 1}, lambda config: config),
    "no balance": ({"balance_rate": 0.0, "balance_weight": 0.0}, lambda config: config),
    "no MTP": ({}, no_mtp),
    "transformer": ({"stages": DENSE}, transformer),
    "transformer of equal FLOPs": ({"stages": DENSE}, as_costly),
}


@dataclass(frozen=True)
class Both(Validation):
    """Validates dense and under Selections in every stage, which at a border shows what the switch costs; keeps all."""

    kept: list[dict[str, float]] = field(default_factory=list)

    def run(self, model: GLM, attention: Attention) -> dict[str, float]:
        self.kept.append(super().run(model, "masked"))
        return self.kept[-1]


def run(name: str, seed: int, data: Corpus, base: Recipe) -> dict[str, Any]:
    """One variant with one seed: what validations at the stages' ends found."""
    changes, shape = VARIANTS[name]
    recipe = replace(base, seed=seed, **changes)
    if data.text is None or data.val is None or recipe.steps % 5:
        raise InputError(f"steps is {recipe.steps}; expected a multiple of 5, and a text")
    model = begin(config_of(recipe, data.tokenizer), shape, seed)
    validation, began = Both(data.val, 256, VALIDATION_TOKENS), time.perf_counter()
    train(model, data.text, recipe, Keep(validation=validation, validate_every=recipe.steps // 5, quiet=True))
    fifths = (round(5 * share) for share in accumulate(stage.share for stage in recipe.stages))
    at = {stage.name: validation.kept[end - 1] for stage, end in zip(recipe.stages, fifths, strict=True)}
    seconds = round(time.perf_counter() - began, 1)
    return {"variant": name, "seed": seed, "steps": recipe.steps, "seconds": seconds, "at": at}


def begin(config: GLMConfig, shape: Callable[[GLMConfig], GLMConfig], seed: int) -> GLM:
    """A variant's model: what the base model has too begins alike, so that differences are the variant's."""
    model, base = GLM(shape(config)).initialise(seed), GLM(config).initialise(seed).state_dict()
    own = model.state_dict()
    alike = {name: value for name, value in base.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(alike, strict=False)
    return model


Runs = dict[int, dict[str, Any]]  # by seed


def of(runs: dict[str, Runs], variant: str, stage: str, *names: str) -> dict[int, float]:
    """By seed a value at a stage's end; of two names, the second less the first."""
    found = {}
    for seed, run in runs.get(variant, {}).items():
        values = [run["at"][stage].get(name, float("nan")) for name in names]
        found[seed] = values[-1] - values[0] if len(values) == 2 else values[0]
    return found


def less(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    """Seed by seed."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def rows(runs: dict[str, Runs]) -> list[tuple[str, str, dict[int, float]]]:
    """Effect, measure and its value by seed (losses: nats a token of unseen text)."""
    gap = ("val_dense", "val_sparse")
    final = of(runs, "base", "sparse", "val_sparse")
    plain, costly = (of(runs, f"transformer{name}", "dense", "val_dense") for name in ("", " of equal FLOPs"))
    return [
        ("warm-up", "sparse - dense loss with random indexers", of(runs, "base", "dense", *gap)),
        ("", "the same after the warm-up", of(runs, "base", "indexer_warmup", *gap)),
        ("", "attention inside the top-k, least", of(runs, "base", "sparse", "mass")),
        ("DSA", "sparse - dense training, equal tokens", less(final, of(runs, "dense", "dense", "val_dense"))),
        ("IndexShare", "4 indexers - 12", less(final, of(runs, "all-Full", "sparse", "val_sparse"))),
        (
            "multi-layer KL", "loss - own-layer KL's, after the warm-up",
            less(of(runs, "base", "indexer_warmup", *gap), of(runs, "own-layer KL", "indexer_warmup", *gap)),
        ),
        ("", "the same at the end", less(final, of(runs, "own-layer KL", "sparse", "val_sparse"))),
        ("MTP", "tokens a verification, 2 drafts, trained at 1 and 2", of(runs, "base", "sparse", "accepted")),
        ("", "the same, trained at depth 1", of(runs, "MTP depth 1", "sparse", "accepted")),
        ("", "loss - loss without MTP", less(final, of(runs, "no MTP", "sparse", "val_sparse"))),
        ("balance", "busiest / mean expert, worst layer", of(runs, "base", "sparse", "load")),
        ("", "the same without", of(runs, "no balance", "sparse", "load")),
        ("", "loss - loss without", less(final, of(runs, "no balance", "sparse", "val_sparse"))),
        ("all of it", "loss - dense transformer's of equal active parameters", less(final, plain)),
        ("", "loss - dense transformer's of equal FLOPs", less(final, costly)),
    ]  # fmt: skip


def main(
    text: Path, out: Path, seeds: int = 3, variants: tuple[str, ...] = tuple(VARIANTS), steps: int = BASE.steps
) -> None:
    """Runs what ``out`` lacks, then prints the table.

    Args:
        text: A UTF-8 file or a folder of .txt files; the last tenth is unseen.
        out: JSON lines, one a run.
        seeds: Of each variant.
        variants: Those to run; the table shows all in the file that have so many steps.
        steps: Of a run, a multiple of 5.
    """
    data = corpus(text)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in range(seeds):
        for name in variants:
            if not any((run["variant"], run["seed"], run["steps"]) == (name, seed, steps) for run in done):
                done.append(run(name, seed, data, replace(BASE, steps=steps)))
                with out.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(name, seed, done[-1]["seconds"], list(done[-1]["at"].values())[-1], flush=True)
    runs: dict[str, Runs] = {}
    for found in done:
        if found["steps"] == steps:
            runs.setdefault(found["variant"], {})[found["seed"]] = found
    print("| effect | measure | mean | standard error | seeds |\n| --- | --- | ---: | ---: | ---: |")
    for effect, measure, values in rows(runs):
        if values:
            error = stdev(values.values()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            print(f"| {effect} | {measure} | {mean(values.values()):.4f} | {error:.4f} | {len(values)} |")


if __name__ == "__main__":
    tyro.cli(main)
