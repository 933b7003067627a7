"""What GLM-5.2's changes to MTP earn on a small model: tokens a verification at 3 to 7 drafts, rung by rung.

python recipes/mtp_ladder.py --text NOVELS --out runs/mtp_ladder

Of each seed one backbone is trained, with its MTP layer at depth 1. From there each rung trains that layer alone, the
backbone and all indexers rest, for equal steps on equal data. Then drafts are counted as decoding goes, behind prompts
of unseen text; where each depth was trained with keys of its own, with and without. ``runs.jsonl`` holds each run; what
is there already is not done again. At the end there is a table for each way to draft and verify.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoglm.cache import PAGE, PagedCache
from nanoglm.eval.acceptance import greedy, reached, rejection_sampling, target_only
from nanoglm.model import GLM, BatchStore, Output
from nanoglm.train import losses
from nanoglm.train.data import Sample, Windows
from nanoglm.train.recipe import Recipe, dense, indexer_warmup, sparse
from nanoglm.train.run import Corpus, config_of, corpus
from nanoglm.train.trainer import Keep, optimizers, train

DRAFTS = 7  # in training and, at most, in decoding
PROMPTS, LENGTH, EACH = 512, 120, 128  # of the measurement, and how many prompts at once
TRAINED, BEGUN = 256, 32  # tokens of a window that is learnt; of what the model says, those that begin it
WAYS = "greedy", "target only", "rejection sampling"
BACKBONE = Recipe(
    "nano", depth=4, steps=500, tokens=1024, warmup=20, optimizer="muon", rate=8e-3, mtp_depths=1,
    stages=(dense(0.7, 256), indexer_warmup(0.1, 256), sparse(0.2, 256, indexer_every=2)),
)  # fmt: skip
LADDER = replace(BACKBONE, steps=200, rate=4e-3, stages=(sparse(1.0, 256),))  # of the MTP layer alone

Loss = Callable[[GLM, Output, Sample, int], tuple[Tensor, int]]


def own_keys(model: GLM, output: Output, sample: Sample, depths: int) -> tuple[Tensor, int]:
    """Next-token loss with each depth's own keys and Selection, as before GLM-5.2."""
    hidden, total, count = output.hidden, output.hidden.new_zeros(()), 0
    for depth, targets in enumerate(losses.draft_targets(sample, depths)):
        following = losses.ahead(sample, sample.ids, 1 + depth, 0)
        hidden, _ = model.draft(following, hidden, output.step)
        loss, n = losses.cross_entropy(model, hidden, targets)
        total, count = total + loss, count + n
    return total, count


@dataclass(frozen=True)
class Rung:
    """What the layer learns, over how many depths, and whether later drafts share keys and Selection of the first."""

    loss: Loss
    depths: int = DRAFTS
    share: bool = True


RUNGS = {
    "depth 1": Rung(losses.mtp, depths=1, share=False),
    "7 depths": Rung(own_keys, share=False),
    "+ IndexShare + KVShare": Rung(losses.mtp),
    "+ rejection sampling": Rung(losses.rejection),
    "+ TV loss": Rung(losses.total_variation),
}


def backbone(seed: int, data: Corpus, out: Path, steps: int) -> GLM:
    """The seed's, trained or read."""
    recipe, file = replace(BACKBONE, seed=seed, steps=steps), out / f"backbone-{seed}-{steps}.safetensors"
    model = GLM(config_of(recipe, data.tokenizer)).initialise(seed)
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        assert data.text is not None
        train(model, data.text, recipe, Keep(log=out / f"backbone-{seed}.jsonl", quiet=True))
        save_file(model.state_dict(), file)
    return model


@torch.no_grad()
def said(model: GLM, data: Corpus, recipe: Recipe) -> Tensor:
    """What the model itself says behind beginnings of the text, a rung's windows of it: int64 [N, TRAINED + 1]."""
    assert data.text is not None
    count, generator = recipe.steps * recipe.tokens // TRAINED, torch.Generator().manual_seed(recipe.seed)
    begun = Windows(data.text, recipe.seed + 1000).take(BEGUN, count).ids.view(count, BEGUN)
    found = []
    for ids_BL in begun.split(EACH):
        requests, given = len(ids_BL), ids_BL
        cache = PagedCache(model.config, requests * -(-TRAINED // PAGE))
        opened = [cache.open() for _ in range(requests)]
        while ids_BL.shape[1] <= TRAINED:
            batch = cache.extend(opened, [given.shape[1]] * requests)
            hidden = model(given.flatten(), batch, cache, tail=[1] * requests).hidden
            given = torch.multinomial(model.logits(hidden).softmax(-1), 1, generator=generator)
            ids_BL = torch.cat([ids_BL, given], 1)
        found.append(ids_BL)
    return torch.cat(found)


def climb(model: GLM, rung: Rung, take: Callable[[], Sample], recipe: Recipe) -> float:
    """Trains the MTP layer of a rung in place; returns the mean of the last tenth's loss."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"model.layers.{len(model.layers)}."))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    movers, seen = optimizers(model, recipe), list[float]()
    for step in range(recipe.steps):
        sample = take()
        with torch.no_grad():
            output = model(sample.ids, sample.batch, BatchStore(), attention="masked")
        total, count = rung.loss(model, output, sample, rung.depths)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        for mover in movers:
            for group in mover.param_groups:
                group["lr"] = recipe.rates(step)[0]
            mover.step()
            mover.zero_grad()
        seen.append(float(total.detach()) / count)
    return mean(seen[-max(1, recipe.steps // 10) :])


def measure(model: GLM, data: Corpus, share: bool, prompts: int) -> dict[str, list[float]]:
    """By how drafts are made and verified, the share of prompts whose first 1, 2, ... drafts are all accepted."""
    assert data.val is not None
    apart = (len(data.val) - LENGTH - 1) // prompts
    ids = torch.stack([torch.from_numpy(data.val.read(i * apart, LENGTH + 1).astype("int64")) for i in range(prompts)])
    ways = [greedy, target_only, rejection_sampling(torch.Generator().manual_seed(0))]
    chains = torch.cat([reached(model, part, DRAFTS, ways, share) for part in ids.split(EACH)], 1)
    return {name: [round(x, 5) for x in row] for name, row in zip(WAYS, chains.mean(1).tolist(), strict=True)}


def tokens(accepted: list[float], drafts: int) -> float:
    """A verification yields, the one that it adds itself included."""
    return 1 + sum(accepted[:drafts])


def table(done: list[dict[str, Any]], way: str) -> list[str]:
    """Mean and standard error over seeds of the tokens a verification, and of the gain over the first rung at most."""
    heads = [f"{n} drafts" for n in range(3, DRAFTS + 1)]
    lines = ["| rung | " + " | ".join([*heads, f"gain at {DRAFTS}"]) + " |", "| --- |" + " ---: |" * (len(heads) + 1)]
    by = {(run["rung"], run["share"], run["seed"]): run["accepted"][way] for run in done}
    base = next((name, rung.share) for name, rung in RUNGS.items())
    for name, share in dict.fromkeys((run["rung"], run["share"]) for run in done):
        runs = {seed: accepted for (n, s, seed), accepted in by.items() if (n, s) == (name, share)}
        cells = [_cell([tokens(a, n) for a in runs.values()]) for n in range(3, DRAFTS + 1)]
        gains = [
            100 * (tokens(a, DRAFTS) / tokens(by[*base, seed], DRAFTS) - 1)
            for seed, a in runs.items()
            if (*base, seed) in by
        ]
        label = name if share == RUNGS[name].share else f"{name}, decoded {'shared' if share else 'with own keys'}"
        lines.append(f"| {label} | " + " | ".join([*cells, _cell(gains, 1) + " %" if gains else ""]) + " |")
    return lines


def _cell(values: list[float], digits: int = 3) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def main(
    text: Path,
    out: Path,
    seeds: int = 3,
    rungs: tuple[str, ...] = tuple(RUNGS),
    backbone_steps: int = BACKBONE.steps,
    steps: int = LADDER.steps,
    prompts: int = PROMPTS,
    own: bool = False,
    report: Path | None = None,
) -> None:
    """Runs what ``out`` lacks, then prints a table for each way to draft and verify.

    Args:
        text: A UTF-8 file or a folder of .txt files; the last tenth is unseen.
        out: Folder of the backbones and of runs.jsonl.
        seeds: Of each rung.
        rungs: Those to run.
        backbone_steps: Of a backbone. steps: Of a rung. prompts: Of the measurement.
        own: Rungs learn from what the backbone itself says, not from the text. A folder holds runs of both.
        report: Where to write all runs as one JSON file.
    """
    data, file = corpus(text), out / "runs.jsonl"
    assert data.text is not None
    out.mkdir(parents=True, exist_ok=True)
    size = {"backbone_steps": backbone_steps, "steps": steps, "prompts": prompts}
    lines = file.read_text().splitlines() if file.exists() else []
    done = [run for run in map(json.loads, lines) if {name: run[name] for name in size} == size]
    for seed in range(seeds):
        spoken: Tensor | None = None
        for name in rungs:
            if any((run["rung"], run["seed"], run["own"]) == (name, seed, own) for run in done):
                continue
            rung, model, began = RUNGS[name], backbone(seed, data, out, backbone_steps), time.perf_counter()
            recipe = replace(LADDER, steps=steps, seed=seed)
            count = recipe.tokens // TRAINED  # windows a step
            if own:
                spoken = said(model, data, recipe) if spoken is None else spoken
                loss = climb(model, rung, map(Sample.of, spoken.split(count)).__next__, recipe)
            else:
                loss = climb(model, rung, partial(Windows(data.text, seed + 1000).take, TRAINED, count), recipe)
            seconds = round(time.perf_counter() - began, 1)
            both = {share: measure(model, data, share, prompts) for share in sorted({rung.share, True})}
            about = {"rung": name, "seed": seed, "own": own, **size, "seconds": seconds, "loss": round(loss, 4)}
            new = [{**about, "share": share, "accepted": accepted} for share, accepted in both.items()]
            done += new
            with file.open("a") as f:
                f.write("".join(json.dumps(run) + "\n" for run in new))
            print(name, seed, seconds, [round(tokens(a["rejection sampling"], DRAFTS), 3) for a in both.values()])
    for way in WAYS:
        print(f"\n{way}, tokens a verification\n\n" + "\n".join(table([r for r in done if r["own"] == own], way)))
    if report is not None:
        report.write_text(json.dumps({"drafts": DRAFTS, "runs": done}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
