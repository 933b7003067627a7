"""A pattern written into a checkpoint, and how engines that know patterns are told about it.

Source: indexcache spec 6.1, 6.2.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.launch import starting
from nanoglm.weights.slice import slice_checkpoint


def apply(
    source: Path, pattern: str, out: Path, progress: Callable[[float], None] = lambda share: None
) -> GLMConfig:  # fmt: skip
    """Copies a checkpoint, every tensor as it lies, without the indexers of the layers that become Shared.

    No model is made of it, so its size does not matter. The configuration holds ``indexer_types`` and the second
    spelling that fits: freq and offset where they describe the pattern, else ``index_topk_pattern``.

    Returns:
        The configuration written.

    Raises:
        ConfigError: letters other than F and S, another number of them, S first.
        InputError: F where the checkpoint has no indexer, or ``out`` exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out {out} exists and is not empty; expected a new directory, nothing is overwritten")
    return slice_checkpoint(source, out, pattern=pattern, progress=progress)


def launch_lines(directory: Path, config: GLMConfig) -> dict[str, str]:
    """By engine what to type; the configuration says the pattern too, the flags make it plain (spec 6.1)."""
    path = json.dumps(str(directory), ensure_ascii=False)
    return {
        "vLLM": shlex.join(starting("vllm", directory, config)),
        "SGLang": shlex.join(starting("sglang", directory, config)),
        "transformers": f"AutoModelForCausalLM.from_pretrained({path})  # 5.23.0 reads indexer_types",
    }
