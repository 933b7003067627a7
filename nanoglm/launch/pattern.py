"""How engines that know Full/Shared patterns are told about one. Source: indexcache spec 6.1."""

from __future__ import annotations

import json
from pathlib import Path

from nanoglm.config import SHARED, GLMConfig, types_from_rule


def starting(engine: str, model: str | Path, pattern: GLMConfig | None = None) -> list[str]:
    """The words that start vLLM or SGLang on a model; with the pattern of a configuration, if one is given."""
    start, option = {
        "vllm": (["vllm", "serve"], "--hf-overrides"),
        "sglang": (["python", "-m", "sglang.launch_server", "--model-path"], "--json-model-override-args"),
    }[engine]
    return [*start, str(model), *([] if pattern is None else [option, _override(pattern)])]


def searched(config: GLMConfig) -> bool:
    """Whether the pattern is neither all Full nor GLM-5.2's rule, which engines follow by themselves."""
    types = config.indexer_types
    return SHARED in types and types != types_from_rule(len(types), 4, 3)


def _override(config: GLMConfig) -> str:
    written = config.to_dict()
    keys = {name: value for name, value in written.items() if name.startswith("index_topk_pattern")}
    if not keys:
        keys = {name: written[name] for name in ("index_topk_freq", "index_skip_topk_offset")}
    return json.dumps({"use_index_cache": True} | keys)
