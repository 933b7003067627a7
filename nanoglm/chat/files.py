"""The text side of a checkpoint directory: its tokenizer, its chat template, and what other engines read about them.

Source: serving spec 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanoglm.chat.template import FILE as TEMPLATE_FILE
from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.config import GLMConfig
from nanoglm.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE = "generation_config.json"
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}  # without the first, transformers ignores the others


def write_text_files(folder: Path, config: GLMConfig, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer, and beside it what is not there yet: our chat template, tokenizer_config.json and
    generation_config.json with the configuration's tokens.

    Raises:
        InputError: as :meth:`Tokenizer.save`. OSError: another file cannot be written.
    """
    tokenizer.save(folder / TOKENIZER_FILE)
    ids = {"eos_token_id": list(config.eos_token_id) or None, "pad_token_id": config.pad_token_id}
    first = {"eos_token": next(iter(config.eos_token_id), None), "pad_token": config.pad_token_id}
    names = {key: tokenizer.backend.id_to_token(i) for key, i in first.items() if i is not None and i >= 0}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,  # decoding gives the text back as it was
    }
    texts = {
        TEMPLATE_FILE: ChatTemplate().source,
        "tokenizer_config.json": _json(about | names),
        GENERATION_FILE: _json(SAMPLING | ids),
    }
    for file, text in texts.items():
        if not (folder / file).exists():
            (folder / file).write_text(text, encoding="utf-8")


def sampling_defaults(directory: Path | None) -> dict[str, float]:
    """Temperature and the like for requests that say nothing: a checkpoint's own, else GLM-5.2's.

    Raises:
        CheckpointError: the file is damaged.
    """
    found = dict(SAMPLING)
    file = None if directory is None else directory / GENERATION_FILE
    if file is not None and file.is_file():
        try:
            found |= json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}; expected a JSON object") from None
    if not found["do_sample"]:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: found[name] for name in names if isinstance(found.get(name), int | float)}


def _json(fields: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in fields.items() if value is not None}, indent=2) + "\n"
