"""A pattern written into a checkpoint, and how engines that know patterns are told about it.

Source: indexcache spec 6.1, 6.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
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
    keys = {name: value for name, value in config.to_dict().items() if name.startswith("index_topk_pattern")}
    if not keys:
        names = ("index_topk_freq", "index_skip_topk_offset")
        keys = {name: config.to_dict()[name] for name in names}
    overrides = json.dumps({"use_index_cache": True} | keys)
    return {
        "vLLM": f"vllm serve {directory} --hf-overrides '{overrides}'",
        "SGLang": f"python -m sglang.launch_server --model-path {directory} --json-model-override-args '{overrides}'",
        "transformers": f'AutoModelForCausalLM.from_pretrained("{directory}")  # 5.23.0 reads indexer_types',
    }
