"""Errors that are the user's to mend: one clear sentence each."""

from __future__ import annotations


class NanoglmError(Exception):
    """A mistake in the input: the message names the field, the value found and what was expected."""


class ConfigError(NanoglmError):
    """A configuration that describes no model of this family."""


class CheckpointError(NanoglmError):
    """Files of a checkpoint that are missing, damaged or do not fit the model."""


class InputError(NanoglmError):
    """Prompts, options or other arguments that cannot be used."""
