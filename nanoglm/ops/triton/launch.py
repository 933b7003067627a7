"""How kernels are launched: what differs between architectures, and between a GPU and Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
import triton
from torch import Tensor

# Read when kernels are decorated, as triton.jit itself does. The interpreter runs them on CPU tensors; its products
# and sums of bf16 are wrong without a word, so kernels take WIDE, which makes them compute in fp32 there.
INTERPRETED: bool = triton.knobs.runtime.interpret

T = TypeVar("T")


def on(x: Tensor) -> AbstractContextManager[object]:
    """Within: launches go to the device of x, not to whichever is current."""
    return torch.cuda.device_of(x)


def architecture(device: torch.device) -> str:
    """As compilers name it: sm_90, gfx942, ...; "portable" on a CPU."""
    if device.type != "cuda":
        return "portable"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def tuned(table: Mapping[str, T], device: torch.device) -> T:
    """The entry measured for this architecture, else the portable one, which fits any card's shared memory."""
    return table.get(architecture(device), table["portable"])


def power(n: int, least: int = 16) -> int:
    """The next power of two, and at least the narrowest side of a tl.dot."""
    return max(least, triton.next_power_of_2(n))
