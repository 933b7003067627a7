"""``nanoglm train``: a text and a recipe in, a checkpoint directory out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from nanoglm.api import Model
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer
from nanoglm.config import PRESETS, GLMConfig
from nanoglm.engine import SamplingParams, generate
from nanoglm.errors import InputError
from nanoglm.memory import peak_memory
from nanoglm.model import GLM
from nanoglm.tasks import VOCABULARY
from nanoglm.train.assistant import Assistant
from nanoglm.train.checkpoint import NUMBERS, kept_recipe
from nanoglm.train.data import END_OF_TEXT, Source, Tokens, Windows
from nanoglm.train.fit import fit
from nanoglm.train.parallel import Ranks, gathered, parallelise
from nanoglm.train.recall import Recall
from nanoglm.train.recipe import Recipe
from nanoglm.train.sft import Conversations, Document, samples
from nanoglm.train.sft import conversations as read_conversations
from nanoglm.train.trainer import Keep, shared_indexers, train
from nanoglm.train.validate import Validation
from nanoglm.weights import SHARED_INDEXERS

TRAINING = "training"  # of a run that is not finished, inside its directory
LOG = "train.jsonl"
VALIDATION_TOKENS = 1 << 17  # of the unseen text, from its beginning: a validation is no second run
ENDS = (END_OF_TEXT, "<|user|>", "<|observation|>")  # generation stops there (serving spec 1.1)


def read_text(path: Path) -> np.ndarray:
    """All ``*.txt`` under ``path`` (or the one file) as byte ids with <|endoftext|> between, uint16."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    parts, end = list[np.ndarray](), np.array(byte_tokenizer().encode(END_OF_TEXT), np.uint16)
    for file in files:
        try:
            data = file.read_text(encoding="utf-8-sig").encode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text {file} cannot be read as UTF-8: {error}") from None
        parts += [np.frombuffer(data, np.uint8).astype(np.uint16), end]
    if not parts:
        raise InputError(f"text {path} holds no .txt file; expected a UTF-8 text file or a folder of them")
    return np.concatenate(parts)


@dataclass(frozen=True)
class Corpus:
    """What a run learns from and is validated with, in one tokenizer's ids."""

    tokenizer: Tokenizer
    text: Tokens | None = None
    val: Tokens | None = None
    conversations: list[Document] | None = None

    def sources(self, recipe: Recipe) -> dict[str, Source]:
        """By what a stage calls its data."""
        found: dict[str, Source] = {"assistant": Assistant(self.tokenizer, recipe.seed)}
        if self.text is not None:
            found["text"] = Windows(self.text, recipe.seed)
            found["recall"] = Recall(self.text, recipe.seed, recipe.skip_positions, recipe.hops)
        if self.conversations is not None:
            found["conversations"] = Conversations(self.conversations, recipe.seed)
        return found


def corpus(
    text: Path | None, val: float = 0.1, conversations: Path | None = None, tokenizer: Tokenizer | None = None,
    recipe: Recipe | None = None,
) -> Corpus:  # fmt: skip
    """Reads a dataset of ``nanoglm data`` or text as bytes, whose last share ``val`` is held out; and conversations.

    Args:
        tokenizer: of the model to go on with; else the dataset's, or bytes.
        recipe: what is to be done with it; one that generates all it learns from needs neither.

    Raises:
        InputError: neither is given, one cannot be read, or the dataset is another tokenizer's.
    """
    generates = recipe is not None and all(stage.data == "assistant" for stage in recipe.stages)
    if text is None and conversations is None and not generates:
        raise InputError("text and conversations are both missing; expected one of them")
    own, held, found = None, None, tokenizer
    if text is not None and (text / "dataset.json").is_file():
        own, held, found = Tokens(text), Tokens(text, "val"), Tokenizer.from_file(text / "tokenizer.json")
    elif text is not None:
        if not 0 <= val < 1:
            raise InputError(f"val is {val}; expected a share, 0 or more and below 1")
        ids, found = read_text(text), byte_tokenizer()
        border = len(ids) - round(len(ids) * val)
        own, held = Tokens.of(ids[:border]), Tokens.of(ids[border:])
    found = found or byte_tokenizer()
    if tokenizer is not None and found.vocab_size != tokenizer.vocab_size:
        raise InputError(f"text has {found.vocab_size} tokens; expected the model's {tokenizer.vocab_size}")
    documents = None
    if conversations is not None:
        documents = [d for c in read_conversations(conversations) for d in samples(c, found)]
    return Corpus(found, own, held, documents)


def config_of(recipe: Recipe, tokenizer: Tokenizer) -> GLMConfig:
    """The recipe's shape with the tokenizer's vocabulary and the tokens that end its texts.

    Raises:
        InputError: bytes, with a preset whose vocabulary is another.
    """
    changes = {"num_hidden_layers": recipe.depth} if recipe.depth else {}
    config = GLMConfig.preset(recipe.preset, **changes)
    if recipe.pattern is not None:
        config = config.with_pattern(recipe.pattern)
    if recipe.reads("recall"):
        return config.replace(vocab_size=VOCABULARY)
    if tokenizer.is_bytes and recipe.preset in PRESETS and config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"preset {recipe.preset} has vocabulary {config.vocab_size}; expected the byte tokenizer's 320"
        )
    ends = [tokenizer.encode(token) for token in ENDS]
    return config.replace(
        vocab_size=tokenizer.vocab_size, eos_token_id=tuple(ids[0] for ids in ends if len(ids) == 1),
        pad_token_id=ends[0][0] if len(ends[0]) == 1 else None,
    )  # fmt: skip


def run(
    data: Corpus,
    recipe: Recipe,
    out: Path,
    init: Model | None = None,
    *,
    device: str = "auto",
    budget: float | None = None,
    resume: bool = False,
    save_every: int = 500,
    validate_every: int = 200,
    tensorboard: bool = False,
    ranks: Ranks | None = None,
) -> None:
    """Trains a recipe and writes checkpoint directory, log and shared indexers into ``out``.

    Until the end the run is kept in ``out/training``.

    Args:
        init: a model to start from, instead of random weights in the preset's shape.
        device: auto takes CUDA (or ROCm) where it is.
        budget: bytes of memory to stay within, see :mod:`fit`; a resumed run keeps what was measured when it began.
        resume: go on with the run that ``out`` holds.
        ranks: the processes that share the run; ``out`` is on a file system that all of them see. They write no text
            when they validate and no shared indexers at the end.

    Raises:
        InputError: the preset's vocabulary is not the byte tokenizer's, a stage's data is missing or too short, ``out``
            is not empty or, to resume, holds no run or that of another recipe; a budget for several processes.
    """
    sources = data.sources(recipe)
    for stage in recipe.stages:  # found now, not when the last stage begins
        if stage.data not in sources:
            raise InputError(f"{stage.data} is missing; expected some for stage {stage.name}")
        if stage.data == "text" and data.text is not None and len(data.text) <= stage.length:
            raise InputError(
                f"text holds {len(data.text)} tokens; expected more than one window of {stage.length} for stage "
                f"{stage.name}"
            )
    training = out / TRAINING
    if ranks is None:
        _check(out, resume)
    else:
        ranks.first_does(lambda: _check(out, resume))
    if ranks is not None and budget is not None:
        raise InputError(f"fit is {budget / 1e9:g} GB; expected none on several processes, where nothing is measured")
    where = where_of(device)
    console = Console(stderr=True, highlight=False, quiet=ranks is not None and not ranks.first)
    model = (
        init.module.train() if init else GLM(config_of(recipe, data.tokenizer)).initialise(recipe.seed, recipe.shared)
    )
    if budget is not None and resume:
        recipe = replace(recipe, pass_tokens=kept_recipe(training)["pass_tokens"])
    elif budget is not None:
        recipe = fit(recipe, model.config, budget, where, console.print)
    model = model.to(where) if ranks is None else parallelise(model.to(where), ranks)
    length, tasks = recipe.stages[0].length, recipe.reads("recall")  # what answers tasks speaks no text
    val = Validation(data.val, length, VALIDATION_TOKENS, recipe.mtp_depths) if data.val is not None else None
    val = val if val is not None and val.windows and not tasks else None
    board = out / "tensorboard" if tensorboard else None
    sampler = _sampler(model, data.tokenizer) if ranks is None else None
    keep = Keep(out / LOG, 20, training, save_every, val, validate_every, sampler, board)
    train(model, sources, recipe, keep, ranks)
    peak = torch.cuda.max_memory_allocated() / 1e9 if where != "cpu" else peak_memory()
    console.print(f"peak memory {peak:.2f} GB" if peak else "peak memory unknown")
    whole = model if ranks is None else gathered(model, ranks)
    if whole is None:
        return
    sharpen(whole, recipe.sharpen)
    Model(whole, None if tasks else data.tokenizer).save(out)
    extra = {} if data.text is None or ranks is not None or tasks else shared_indexers(model, data.text, recipe)
    if extra:
        partial = out / f".{SHARED_INDEXERS}"
        save_file(extra, partial, metadata={"format": "pt"})
        partial.chmod((out / "config.json").stat().st_mode)  # safetensors writes 0600
        os.replace(partial, out / SHARED_INDEXERS)
    shutil.rmtree(training)


@torch.no_grad()
def sharpen(model: GLM, factor: float) -> None:
    """Multiplies all attention's scores, by the queries' projections. Among many more keys than in training the softmax
    leaves less to the one it looks for; a lower temperature gives it back (YaRN, arXiv 2309.00071, section 3.4)."""
    for name, weight in model.named_parameters():
        if name.endswith("q_b_proj.weight"):
            weight.mul_(factor)


def where_of(device: str) -> str:
    """The device that ``auto`` stands for."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _check(out: Path, resume: bool) -> None:
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out {out} exists and is not empty; expected a new directory, nothing is overwritten")
    if resume and not (out / TRAINING / NUMBERS).is_file():
        raise InputError(f"out {out} holds no unfinished run; expected {TRAINING}/{NUMBERS} in it")


def _sampler(model: GLM, tokenizer: Tokenizer) -> Callable[[], str]:
    """Writes a text of at most k tokens: all of them are attended to, so untrained indexers spoil nothing."""
    begin = tokenizer.encode(END_OF_TEXT)
    params = SamplingParams(max(1, min(128, model.config.index_topk - len(begin))), 0.8)
    return lambda: tokenizer.decode(list(generate(model, begin, params)))
