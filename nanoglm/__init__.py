"""nanoglm: the complete GLM-5.2 system in PyTorch that one person can read."""

from nanoglm.api import Model, load
from nanoglm.config import GLMConfig
from nanoglm.engine import SamplingParams
from nanoglm.errors import CheckpointError, ConfigError, InputError, NanoglmError

__version__ = "0.1.0"
__all__ = [
    "CheckpointError", "ConfigError", "GLMConfig", "InputError", "Model", "NanoglmError", "SamplingParams", "load",
]  # fmt: skip
