"""A small trainer: dense, then indexer warm-up, then sparse under the pattern (training spec 4.1).

One process. It exists to make the bundled default model and to show the
stages in one file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from nanoglm.api import Model
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer
from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM, BatchStore, Output, Tape
from nanoglm.model.moe import MoE
from nanoglm.ops import Batch
from nanoglm.train import losses, optim
from nanoglm.train.checkpoint import NUMBERS, Progress, restore, write
from nanoglm.train.data import Loader, Tokens
from nanoglm.weights import SHARED_INDEXERS

TRAINING = "training"  # of a run that is not finished, inside its directory
END_OF_TEXT = 256  # <|endoftext|> of the byte tokenizer
Stage = Literal["dense", "warmup", "sparse"]


@dataclass(frozen=True)
class Recipe:
    """Every number of a run. Fractions are of all steps; rates are peaks."""

    steps: int = 2000
    batch: int = 16  # sequences a step
    length: int = 256  # tokens a sequence
    sparse_length: int = 512  # tokens a sequence in the last stage, at the same tokens a step
    dense: float = 0.75
    warmup: float = 0.07  # the rest is sparse
    indexer_every: int = 4  # sparse stage: steps between two of the indexers' own
    rate: float = 3e-3
    indexer_rate: float = 5e-3
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices it is for, see optim.groups
    weight_decay: float = 0.1
    mtp_depths: int = 2
    late_drafts: Literal["likelihood", "total_variation"] = "likelihood"  # what MTP learns from `late` on
    balance_rate: float = 3e-3
    late: float = 0.65  # from here on the balance bias rests and the MTP weight falls from 0.3 to 0.1
    seed: int = 0

    def stage(self, step: int) -> Stage:
        done = step / self.steps
        return "dense" if done < self.dense else "warmup" if done < self.dense + self.warmup else "sparse"

    def rates(self, step: int) -> tuple[float, float]:
        """(backbone, indexer): 50 steps up, cosine to 10 %; the backbone rests while the indexer warms up."""
        stage, done = self.stage(step), step / self.steps
        if stage == "warmup":
            return 0.0, self.indexer_rate
        active = done if stage == "dense" else done - self.warmup
        shape = min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * active / (1 - self.warmup)))
        return self.rate * shape, self.rate * shape


def read_text(path: Path) -> np.ndarray:
    """All ``*.txt`` under ``path`` (or the one file) as byte ids with <|endoftext|> between, uint16."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    parts: list[np.ndarray] = []
    for file in files:
        try:
            data = file.read_text(encoding="utf-8-sig").encode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text {file} cannot be read as UTF-8: {error}") from None
        parts += [np.frombuffer(data, np.uint8).astype(np.uint16), np.array([END_OF_TEXT], np.uint16)]
    if not parts:
        raise InputError(f"text {path} holds no .txt file; expected a UTF-8 text file or a folder of them")
    return np.concatenate(parts)


def corpus(path: Path) -> tuple[Tokens, Tokenizer]:
    """What to train on: a dataset of ``nanoglm data`` with its tokenizer, or text as bytes."""
    if (path / "dataset.json").is_file():
        return Tokens(path), Tokenizer.from_file(path / "tokenizer.json")
    return Tokens.of(read_text(path)), byte_tokenizer()


def windows(text: Tokens, recipe: Recipe, progress: Progress | None = None) -> Iterator[Tensor]:
    """One int64 [B, L + 1] tensor a step; the same for the same seed. Goes on from ``progress`` and keeps it up."""
    progress = progress or Progress()
    loaders: dict[int, Loader] = {}
    for step in range(progress.step, recipe.steps):
        length = recipe.sparse_length if recipe.stage(step) == "sparse" else recipe.length
        if length not in loaders:
            loaders[length] = Loader(text, length, recipe.seed, **progress.loaders.get(length, {}))
        ids = loaders[length].take(recipe.batch * recipe.length // length)
        progress.step, progress.loaders[length] = step + 1, loaders[length].state_dict()
        yield ids


def optimizers(model: GLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW in three groups (matrices, the rest of the backbone without decay, indexers) and, if asked for, Muon for
    the matrices that it is for. A group says in ``indexer`` whether it is the indexers', which have their own rate."""
    found = optim.groups(model)
    muon = recipe.optimizer == "muon"
    matrices = found.matrices + ([] if muon else [p for group in found.cut.values() for p in group])
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay, "indexer": False},
            {"params": found.vectors, "weight_decay": 0.0, "indexer": False},
            {"params": found.indexers, "weight_decay": 0.0, "indexer": True},
        ],
        betas=(0.9, 0.95),
        foreach=True,
    )
    if not muon:
        return [adamw]
    pieces = [{"params": group, "cut": cut, "indexer": False} for cut, group in found.cut.items()]
    return [adamw, optim.Muon(pieces, weight_decay=recipe.weight_decay)]


def train_step(model: GLM, ids: Tensor, recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Forward and backward of one batch [B, L + 1]; returns the mean losses by name."""
    stage, late = recipe.stage(step), step / recipe.steps >= recipe.late
    index = stage == "warmup" or (stage == "sparse" and step % recipe.indexer_every == 0)
    inputs, targets = ids[:, :-1], ids[:, 1:].flatten()
    batch = Batch.contiguous([inputs.shape[1]] * inputs.shape[0], ids.device)
    tape = Tape(indexers=index)
    output = model(
        inputs.flatten(), batch, BatchStore(), attention="masked" if stage == "sparse" else "dense", tape=tape
    )
    terms: dict[str, Tensor] = {}
    total, count = losses.cross_entropy(model, output.hidden, targets)
    terms["loss"] = total / count
    if model.config.num_nextn_predict_layers:
        drafting = losses.total_variation if late and recipe.late_drafts == "total_variation" else losses.mtp
        total, count = drafting(model, output, inputs, 1 if stage == "warmup" else recipe.mtp_depths)
        terms["mtp"] = total / count
    if index:
        terms["kl"] = indexer_loss(model, output, tape, inputs.shape[1], sparse=stage == "sparse")
    if stage == "warmup":
        terms["kl"].backward()
    else:
        objective = terms["loss"] + (0.1 if late else 0.3) * terms.get("mtp", 0.0) + terms.get("kl", 0.0)
        objective.backward()
    if not late and stage == "dense":
        balance(model, tape, recipe.balance_rate)
    return {name: term.detach() for name, term in terms.items()}


def indexer_loss(model: GLM, output: Output, tape: Tape, length: int, *, sparse: bool) -> Tensor:
    """Mean KL over all indexers, the MTP layer's included."""
    config = model.config
    served = losses.groups(config.full_layers, config.num_hidden_layers)
    if config.num_nextn_predict_layers:
        served[config.num_hidden_layers] = range(config.num_hidden_layers, config.num_hidden_layers + 1)
    terms = []
    for first, layers in served.items():
        selection = output.selections[first] if sparse and first < config.num_hidden_layers else None
        teachers = [tape.attention[layer] for layer in layers]
        total, count = losses.indexer_kl(tape.indexer[first], teachers, length, config.qk_head_dim**-0.5, selection)
        terms.append(total / count)
    return torch.stack(terms).mean()


@torch.no_grad()
def balance(model: GLM, tape: Tape, rate: float) -> None:
    """Auxiliary-loss-free balance: the bias of an overloaded expert falls, of an idle one rises."""
    for layer, ids in tape.experts.items():
        moe = model.model.layers[layer].get_submodule("mlp")
        assert isinstance(moe, MoE)
        bias = moe.gate.e_score_correction_bias
        load = torch.bincount(ids.flatten(), minlength=bias.numel()).float()
        bias += rate * (load.mean() - load).sign()


def train(
    model: GLM, text: Tokens, recipe: Recipe, log: Path | None = None, checkpoint: Path | None = None, every: int = 500
) -> None:
    """Trains ``model`` in place. One JSON line every 20 steps to ``log``.

    Args:
        checkpoint: a directory to keep the run in, before the first step, every ``every`` steps and at the end. If it
            holds this run already, the run goes on from there, bit by bit as if it had not stopped (on the same
            machine with as many threads).

    Raises:
        InputError, CheckpointError: the checkpoint cannot be written, or is of another run.
    """
    movers, parts = optimizers(model, recipe), optim.groups(model)
    progress = Progress()
    if checkpoint is not None:
        if (checkpoint / NUMBERS).is_file():
            progress = restore(checkpoint, model, movers, recipe)
            _forget(log, progress.step)
        else:  # an unwritable directory is found now, not after an hour
            write(checkpoint, model, movers, progress, recipe)
    console, began = Console(stderr=True, highlight=False), time.perf_counter()
    for ids in windows(text, recipe, progress):
        step = progress.step - 1
        for parameter in parts.backbone:
            parameter.requires_grad_(recipe.stage(step) != "warmup")
        rate, indexer_rate = recipe.rates(step)
        for group in (group for mover in movers for group in mover.param_groups):
            group["lr"] = indexer_rate if group["indexer"] else rate
        terms = train_step(model, ids, recipe, step)
        torch.nn.utils.clip_grad_norm_(parts.backbone, 1.0)
        torch.nn.utils.clip_grad_norm_(parts.indexers, 1.0)  # apart, or a large KL would slow the backbone
        for mover in movers:
            mover.step()
            mover.zero_grad()
        if step % 20 == 0 or step == recipe.steps - 1:
            line = {"step": step, "stage": recipe.stage(step), "seconds": round(time.perf_counter() - began, 1)}
            line |= {name: round(float(term), 4) for name, term in terms.items()}
            console.print(" ".join(f"{name} {value}" for name, value in line.items()))
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        if checkpoint is not None and (progress.step % every == 0 or progress.step == recipe.steps):
            write(checkpoint, model, movers, progress, recipe)


def _forget(log: Path | None, step: int) -> None:
    """Takes the lines of steps that are done again out of a log."""
    if log is not None and log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        log.write_text("".join(kept), encoding="utf-8")


def shared_indexers(model: GLM, text: Tokens, recipe: Recipe) -> dict[str, Tensor]:
    """Indexers for the Shared layers, for comparison with all-Full: the backbone rests, each starts as
    its source's copy and learns its own layer's attention. Returns their tensors by name."""
    config = model.config.replace(indexer_types=(FULL,) * model.config.num_hidden_layers)
    full = GLM(config).initialise(recipe.seed)
    full.load_state_dict(model.state_dict(), strict=False)
    sources = losses.groups(model.config.full_layers, config.num_hidden_layers)
    wanted: dict[str, Tensor] = {}
    for source, layers in sources.items():
        for layer in layers[1:]:
            indexer = full.layers[layer].self_attn.indexer
            original = model.layers[source].self_attn.indexer
            assert indexer is not None and original is not None
            indexer.load_state_dict(original.state_dict())
            prefix = f"model.layers.{layer}.self_attn.indexer."
            wanted |= {prefix + name: parameter for name, parameter in indexer.named_parameters()}
    steps = max(1, int(recipe.steps * recipe.warmup))
    train(full, text, replace(recipe, steps=steps, dense=0.0, warmup=1.0, seed=recipe.seed + 1))
    return {name: parameter.detach().to(torch.bfloat16) for name, parameter in wanted.items()}


def run(
    preset: str, text: Tokens, recipe: Recipe, out: Path, tokenizer: Tokenizer | None = None, *, resume: bool = False,
    every: int = 500,
) -> None:  # fmt: skip
    """Trains a preset and writes its checkpoint directory, log and shared indexers into ``out``.

    Until the end the run is kept in ``out/training``, every ``every`` steps.

    Args:
        tokenizer: of the text, bytes if left out. The model gets its vocabulary, if that is larger than bytes.
        resume: go on with the run that ``out`` holds.

    Raises:
        InputError: the preset's vocabulary is not the byte tokenizer's, the text is too short, ``out`` is not empty or,
            to resume, holds no run or that of another recipe.
    """
    config, tokenizer = GLMConfig.preset(preset), tokenizer or byte_tokenizer()
    if not tokenizer.is_bytes:
        config = config.replace(vocab_size=tokenizer.vocab_size)
    elif config.vocab_size != tokenizer.vocab_size:
        raise InputError(f"preset {preset} has vocabulary {config.vocab_size}; expected the byte tokenizer's 320")
    if recipe.steps < 1:
        raise InputError(f"steps is {recipe.steps}; expected at least 1")
    if not 0 <= recipe.seed < 2**63:
        raise InputError(f"seed is {recipe.seed}; expected 0 to 2**63 - 1")
    longest = max(recipe.length, recipe.sparse_length)
    if len(text) <= longest:  # found now, not when the last stage begins
        raise InputError(f"text holds {len(text)} tokens; expected more than one window of {longest}")
    training = out / TRAINING
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out {out} exists and is not empty; expected a new directory, nothing is overwritten")
    if resume and not (training / NUMBERS).is_file():
        raise InputError(f"out {out} holds no unfinished run; expected {TRAINING}/{NUMBERS} in it")
    model = GLM(config).initialise(recipe.seed)
    train(model, text, recipe, out / "train.jsonl", training, every)
    Model(model, tokenizer).save(out)
    extra = shared_indexers(model, text, recipe)
    if extra:
        partial = out / f".{SHARED_INDEXERS}"
        save_file(extra, partial, metadata={"format": "pt"})
        partial.chmod((out / "config.json").stat().st_mode)  # safetensors writes 0600
        os.replace(partial, out / SHARED_INDEXERS)
    shutil.rmtree(training)
