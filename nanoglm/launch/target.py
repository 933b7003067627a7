"""What is to be served and on what: a user's words for a model and a machine, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanoglm.api import checkpoint_directory
from nanoglm.config import GLMConfig
from nanoglm.errors import InputError
from nanoglm.launch.published import Published, published
from nanoglm.plan import plan

Platform = Literal["hopper", "blackwell", "amd"]
Format = Literal["bf16", "fp8", "int4"]
MOST_DRAFTS = 16
BY_CONFIG = "by the configuration"
REPOSITORIES = {
    ("glm-5.2", "bf16"): "zai-org/GLM-5.2",
    ("glm-5.2", "fp8"): "zai-org/GLM-5.2-FP8",
    ("glm-5.2", "int4"): "canada-quant/GLM-5.2-W4A16-MTP",
    ("glm-5", "bf16"): "zai-org/GLM-5",
    ("glm-5", "fp8"): "zai-org/GLM-5-FP8",
}  # of the presets that stand for published weights (serving spec 6.1)


@dataclass(frozen=True)
class Wish:
    """What the user asks for; None leaves it to the engine's recipe.

    Raises:
        InputError: a number or a name that cannot be.
    """

    gpus: int | None = None
    memory: float | None = None  # bytes of each GPU
    ram: float | None = None
    platform: Platform | None = None
    length: int | None = None
    drafts: int | None = None
    kv_cache: Literal["bf16", "fp8"] | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        limits = (("gpus", 0, 4096), ("length", 1, 1 << 40), ("drafts", 0, MOST_DRAFTS), ("port", 1, 65_535))
        for name, least, most in limits:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} is {value}; expected {least} to {most}")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise InputError(f"api-key-env is {self.api_key_env!r}; expected the name of an environment variable")


@dataclass(frozen=True)
class Target:
    """A checkpoint, and what a command line calls it.

    Attributes:
        model: the user's word for it. name: the path or the repository to give to an engine.
        weights: bytes of all weights; source: where that figure is from.
        repository: the name is one to download from. unsaved: it is a preset, whose random weights lie nowhere yet.
    """

    model: str
    name: str
    found: Published
    weights: int
    source: str
    repository: bool = False
    unsaved: bool = False

    @property
    def config(self) -> GLMConfig:
        """Its configuration."""
        return self.found.config


def target(model: str, kind: Format | None = None) -> Target:
    """A checkpoint directory, a GGUF file, or a preset in a format (FP8, or bf16 where nothing is published).

    Raises:
        NanoglmError: none of them, damaged, of a size that nothing tells, or a format beside files that have theirs.
    """
    path = Path(model)
    try:
        model.encode()
    except UnicodeEncodeError:
        raise InputError(f"model {model!r} is not UTF-8; expected a path that can be printed") from None
    directory = path if path.suffix == ".gguf" and path.is_file() else checkpoint_directory(model)
    if directory is None:
        kind = kind or ("fp8" if (model, "fp8") in REPOSITORIES else "bf16")
        config, name = GLMConfig.preset(model), REPOSITORIES.get((model, kind))
        if name is None and kind != "bf16":
            raise InputError(f"format is {kind!r}; expected bf16, nothing else is published for preset {model!r}")
        found = Published(config, kind, mtp=config.num_nextn_predict_layers > 0)
        weights = _by_format(found, model)
        return Target(model, name or model, found, weights, BY_CONFIG, name is not None, name is None)
    if kind is not None:
        raise InputError(f"format is {kind!r}; expected none beside {model}, whose config.json names its own")
    found = published(directory)
    name = f"./{model}" if model.startswith("-") else model  # else it would be read as an option
    if found.nbytes is None:
        return Target(model, name, found, _by_format(found, model), BY_CONFIG)
    return Target(model, name, found, found.nbytes, found.source)


def _by_format(found: Published, model: str) -> int:
    kind = {"bf16": "bf16", "fp8": "fp8", "int4": "int4_g64"}.get(found.format)
    if kind is None:
        raise InputError(
            f"model {model!r} has weights in {found.format} and neither files nor total_size in "
            "model.safetensors.index.json; expected one of them, to know their size"
        )
    return int(plan(found.config, 1)["weight_bytes"][kind])
