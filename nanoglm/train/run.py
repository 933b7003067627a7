"""``nanoglm train``: a text and a recipe in, a checkpoint directory out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from nanoglm.api import Model
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.model import GLM
from nanoglm.train.checkpoint import NUMBERS
from nanoglm.train.data import Tokens
from nanoglm.train.recipe import Recipe
from nanoglm.train.trainer import Keep, shared_indexers, train
from nanoglm.train.validate import Validation
from nanoglm.weights import SHARED_INDEXERS

TRAINING = "training"  # of a run that is not finished, inside its directory
LOG = "train.jsonl"
END_OF_TEXT = 256  # <|endoftext|> of the byte tokenizer


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


def corpus(path: Path, val: float = 0.1) -> tuple[Tokens, Tokens, Tokenizer]:
    """What to train on and what to validate with: a dataset of ``nanoglm data``, or text as bytes, cut at ``val``."""
    if (path / "dataset.json").is_file():
        return Tokens(path), Tokens(path, "val"), Tokenizer.from_file(path / "tokenizer.json")
    if not 0 <= val < 1:
        raise InputError(f"val is {val}; expected a share, 0 or more and below 1")
    ids = read_text(path)
    border = len(ids) - round(len(ids) * val)
    return Tokens.of(ids[:border]), Tokens.of(ids[border:]), byte_tokenizer()


def config_of(recipe: Recipe, tokenizer: Tokenizer) -> GLMConfig:
    """The recipe's shape with the tokenizer's vocabulary. Raises InputError if a byte vocabulary does not fit."""
    config = GLMConfig.preset(recipe.preset)
    if not tokenizer.is_bytes:
        return config.replace(vocab_size=tokenizer.vocab_size)
    if config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"preset {recipe.preset} has vocabulary {config.vocab_size}; expected the byte tokenizer's 320"
        )
    return config


def run(
    text: Tokens, val: Tokens | None, recipe: Recipe, out: Path, tokenizer: Tokenizer | None = None, *,
    resume: bool = False, save_every: int = 500, validate_every: int = 200,
) -> None:  # fmt: skip
    """Trains a recipe and writes checkpoint directory, log and shared indexers into ``out``.

    Until the end the run is kept in ``out/training``.

    Args:
        val: what to validate with; nothing if it holds no window of the last stage.
        tokenizer: of the text, bytes if left out. The model gets its vocabulary, if that is larger than bytes.
        resume: go on with the run that ``out`` holds.

    Raises:
        InputError: the preset's vocabulary is not the byte tokenizer's, the text is too short, ``out`` is not empty or,
            to resume, holds no run or that of another recipe.
    """
    tokenizer = tokenizer or byte_tokenizer()
    config = config_of(recipe, tokenizer)
    longest = max(stage.length for stage in recipe.stages)
    if len(text) <= longest:  # found now, not when the last stage begins
        raise InputError(f"text holds {len(text)} tokens; expected more than one window of {longest}")
    training = out / TRAINING
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out {out} exists and is not empty; expected a new directory, nothing is overwritten")
    if resume and not (training / NUMBERS).is_file():
        raise InputError(f"out {out} holds no unfinished run; expected {TRAINING}/{NUMBERS} in it")
    model = GLM(config).initialise(recipe.seed)
    length = recipe.stages[0].length
    validation = Validation(val, length, depths=recipe.mtp_depths) if val is not None and len(val) > length else None
    train(model, text, recipe, Keep(out / LOG, 20, training, save_every, validation, validate_every))
    Model(model, tokenizer).save(out)
    extra = shared_indexers(model, text, recipe)
    if extra:
        partial = out / f".{SHARED_INDEXERS}"
        save_file(extra, partial, metadata={"format": "pt"})
        partial.chmod((out / "config.json").stat().st_mode)  # safetensors writes 0600
        os.replace(partial, out / SHARED_INDEXERS)
    shutil.rmtree(training)
