"""Sizes of memory as users write them, what this process took at most, and that it keeps what it will need again."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from nanoglm.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(name: str, text: str | None) -> float | None:
    """``12GB``, ``64GiB`` or ``504GB/s`` in bytes. Raises InputError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B(?:/s)?", text.strip())
    if match is None or not float(match[1]) or (match[3] and not match[2]):
        raise InputError(f"{name} is {text!r}; expected a size such as 12GB or 64GiB")
    unit = 1024 ** "KMGT".index(match[2]) * 1024 if match[3] else _UNITS[match[2]]
    return float(match[1]) * unit


def peak_memory() -> float | None:
    """The most memory this process ever held, GB (VmHWM); None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 / 1e9 if found else None


def keep_freed() -> None:
    """Has glibc keep the memory of one step for the next.

    It asks the system for a large block and gives it back each time, until it has once been given a block of that
    size (up to 32 MB); from then on such blocks come from its heaps, of which it keeps what is free, up to 64 MB. A
    prefill of 8K paid up to 50,000 page faults otherwise, 5 % of its time (docs/log.md). This holds for the process.
    """
    torch.empty((32 << 20) - (8 << 10), dtype=torch.uint8, device="cpu")
