"""A process with a cache keeps the memory of one step for the next."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from nanoglm import GLMConfig
from nanoglm.cache import PagedCache
if sys.argv[1] == "cache":
    PagedCache(GLMConfig.preset("nano"), 1)
torch.set_num_threads(1)
def step():
    first = torch.ones(3 << 20)
    return float(((first + 1) + (first + 2))[0])  # four blocks of 12 MB, together more than is kept of such blocks
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_steps_fault_no_memory_in_again() -> None:
    def faults(what: str) -> int:
        ran = subprocess.run([sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    assert faults("cache") < 30_000 < 60_000 < faults("none")  # ten steps are 122,880 pages
