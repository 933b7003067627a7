"""Errors that are the user's to mend: one clear sentence each."""

from __future__ import annotations


class NanoglmError(Exception):
    """A mistake in the input: the message names the field, the value found and what was expected.

    One line, and where a value found is endless its middle is left out.
    """

    def __init__(self, message: str) -> None:
        message = " ".join(message.splitlines())
        super().__init__(message if len(message) <= 1000 else f"{message[:600]} ... {message[-300:]}")


class ConfigError(NanoglmError):
    """A configuration that describes no model of this family."""


class CheckpointError(NanoglmError):
    """Files of a checkpoint that are missing, damaged or do not fit the model."""


class InputError(NanoglmError):
    """Prompts, options or other arguments that cannot be used."""
