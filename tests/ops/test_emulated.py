"""The kernels' tests again on processors without AVX-512, as qemu-user emulates them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanoglm.ops import cpu

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
SCRIPT = """
import sys, pytest
from nanoglm.ops import cpu
name, tests = sys.argv[1:]
assert "does not support it" in cpu.library("avx512"), cpu.library("avx512")
assert cpu.best().name == name, cpu.best()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", name, tests]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # an emulator is some fifty times slower
@pytest.mark.skipif(QEMU is None or platform.machine() != "x86_64", reason="needs qemu-user for x86_64")
@pytest.mark.parametrize(("processor", "name"), [("Haswell", "avx2"), ("IvyBridge", "portable")])
def test_kernels_without_avx512(processor: str, name: str) -> None:
    if not (cpu.FOLDER / f"kernels_{name}.so").is_file():
        pytest.skip(f"no {name} kernels: there was no compiler at installation")
    tests = str(Path(__file__).with_name("test_cpu.py"))
    done = subprocess.run(
        [str(QEMU), "-cpu", processor, sys.executable, "-c", SCRIPT, name, tests],
        capture_output=True, text=True, env=os.environ | {"DRAWN_CASES": "10", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
