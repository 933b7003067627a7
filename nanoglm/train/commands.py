"""``nanoglm data``, ``train``, ``report``. What they need is imported when they run: no other command waits for it."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from nanoglm.api import load
from nanoglm.errors import InputError
from nanoglm.memory import parse_bytes
from nanoglm.train.recipe import Recipe


def training(default: Recipe) -> Callable[..., None]:
    """The command, with the recipe whose fields it may override."""

    def train(
        out: Path,
        text: Path | None = None,
        conversations: Path | None = None,
        init: Path | None = None,
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = default,
        val: float = 0.1,
        fit: str | None = None,
        device: str = "auto",
        resume: bool = False,
        save_every: int = 500,
        validate_every: int = 200,
        tensorboard: bool = False,
        expert_ranks: int = 1,
        context_ranks: int = 1,
    ) -> None:
        """Train a model: by a recipe (train RECIPE.py ...) or in the usual stages: dense, indexer warm-up, sparse.

        Args:
            out: The checkpoint directory to write; train.jsonl beside it is the log.
            text: A UTF-8 file or a folder of .txt files, read as bytes; or a folder that nanoglm data wrote.
            conversations: For stages that learn from them: a JSONL file of messages, or of question and answer.
            init: A checkpoint directory to start from; random weights in the preset's shape if left out.
            recipe: What is done and when; each field is an option.
            val: Share of the text, from its end, kept for validation; a dataset has its own.
            fit: Memory to stay within, such as 12GB: accumulates a step in passes whose measured peak fits.
            device: cpu, cuda, ...; auto takes a GPU where there is one.
            resume: Go on with the run that out holds, with the same options; the result is the same to the bit.
            save_every: Steps between two savings of the run.
            validate_every: Steps between two validations.
            tensorboard: Write the log for TensorBoard too, into out/tensorboard.
            expert_ranks: Under torchrun, how many processes share a layer's experts.
            context_ranks: Under torchrun, how many processes share a sequence.
        """
        from nanoglm.train.parallel import launched
        from nanoglm.train.run import corpus, run, where_of

        with launched(expert_ranks, context_ranks, where_of(device)) as ranks:
            base = None if init is None else load(init)
            found = corpus(text, val, conversations, None if base is None else base.tokenizer, recipe)
            run(
                found, recipe, out, base, device=device, budget=parse_bytes("fit", fit), resume=resume,
                save_every=save_every, validate_every=validate_every, tensorboard=tensorboard, ranks=ranks,
            )  # fmt: skip

    return train


def recipe_of(path: Path) -> Recipe:
    """What the function ``recipe`` of a Python file returns."""
    try:
        function = runpy.run_path(str(path)).get("recipe")
    except (OSError, SyntaxError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from None
    found = function() if callable(function) else None
    if not isinstance(found, Recipe):
        raise InputError(f"recipe {path} has no function recipe() that returns a Recipe; expected one")
    return found


def data(
    sources: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    tokenizer: str = "bytes",
    val: float = 0.1,
    field: str = "text",
) -> None:
    """Turn text, JSONL and Parquet into a folder of tokens to train on.

    Args:
        sources: Files, folders, or stdlib: the sources of Python's standard library, which need no download.
        out: The folder to make.
        tokenizer: bytes, bpe:SIZE (trained on the text; of the ids 36 are markup), or a tokenizer.json.
        val: Share of the text, from its end, kept for validation.
        field: Of JSONL objects and Parquet tables, where the text is.
    """
    from nanoglm.train.data import write

    for name, split in write(sources, out, tokenizer, val, field).items():
        each = split.bytes / max(1, split.tokens)
        print(f"{name:6} {split.tokens:,} tokens, {split.documents:,} documents, {each:.2f} bytes a token")


def report(run: Annotated[Path, tyro.conf.Positional], /) -> None:
    """Draw the log of a training run: report.png and a report.html that needs nothing beside it.

    Args:
        run: The directory that nanoglm train wrote, finished or not.
    """
    from nanoglm.train.report import report as write

    for path in write(run):
        print(path)
