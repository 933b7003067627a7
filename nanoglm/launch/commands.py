"""``nanoglm launch`` as a command."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import tyro

from nanoglm.errors import InputError
from nanoglm.launch.engines import ENGINES
from nanoglm.launch.engines import launch as launched
from nanoglm.launch.target import Format, Platform, Wish, target
from nanoglm.memory import parse_bytes


def launch(
    engine: Annotated[str, tyro.conf.Positional],
    model: Annotated[str, tyro.conf.Positional],
    /,
    gpus: int | None = None,
    memory: str | None = None,
    ram: str | None = None,
    platform: Platform | None = None,
    length: int | None = None,
    drafts: int | None = None,
    kv_cache: Literal["bf16", "fp8"] | None = None,
    format: Format | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_env: str | None = None,
    strict: bool = False,
) -> None:
    """Print the line that serves a checkpoint with another engine, and beside it what one must know.

    Lines can be pasted into a shell; what begins with # is a note. Nothing is started or downloaded.

    Args:
        engine: vllm, sglang, llama.cpp, ktransformers or ollama.
        model: A checkpoint directory (config.json and the index file are enough), a GGUF file, or a preset.
        gpus: GPUs; 8 for large weights, else 1, if left out. 0 for llama.cpp without one.
        memory: Of each GPU, such as 141GB; then what fits is checked, and the length chosen by it if left out.
        ram: Of the machine, such as 768GB, for ktransformers and llama.cpp.
        platform: Of the GPUs; what the format was made for, else hopper, if left out.
        length: Tokens of context; the recipe's or the model's longest if left out.
        drafts: MTP drafts a step, 0 for none; the recipe's if left out.
        kv_cache: Number format of the cache; the recipe's if left out.
        format: Of a preset's published weights; fp8 if left out.
        host: Address to listen on; 0.0.0.0 is every one of the machine's.
        port: Port to listen on.
        api_key_env: The environment variable that holds the key clients must send.
        strict: Exit with 1 if it does not fit.
    """
    wish = Wish(
        gpus, parse_bytes("memory", memory), parse_bytes("ram", ram), platform, length, drafts, kv_cache, host, port,
        api_key_env,
    )  # fmt: skip
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    out = launched(engine, target(model, format), wish)
    if strict and out.fits is None and engine != "ollama":
        raise InputError("strict has nothing to check; expected memory, or ram for llama.cpp and ktransformers")
    print(out)
    if strict and out.fits is False:
        sys.exit(1)
