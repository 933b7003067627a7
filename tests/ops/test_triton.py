"""Triton kernels without a GPU: their tests in its interpreter, and compilation for cards that are not here."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent / "triton"
TESTS = sorted(path.name for path in HERE.glob("test_*.py"))
LISTS = sorted(path.stem for path in HERE.glob("compile_*.py"))
# Compute capability or architecture, warp size, and the shared memory that one program may take.
TARGETS = {"sm_89": ("cuda", 89, 32, 99), "sm_90": ("cuda", 90, 32, 227), "gfx942": ("hip", "gfx942", 64, 64)}
pytest.importorskip("triton")


@pytest.mark.parametrize("name", TESTS)
def test_kernels_in_the_interpreter(name: str) -> None:
    """In a process of its own: kernels are interpreted or compiled as the environment said when they were imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / name)],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("name", LISTS)
def test_kernels_compile(name: str, architecture: str) -> None:
    """At GLM-5.2's shape and with the tiles of the architecture: to machine code, within its shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    backend, kind, warp, kilobytes = TARGETS[architecture]
    sys.path.insert(0, str(HERE))
    try:
        cases: list[tuple[Any, ...]] = importlib.import_module(name).cases(architecture)
    finally:
        sys.path.remove(str(HERE))
    assert cases
    for kernel, types, constants, options in cases:
        names = list(kernel.arg_names)
        signature = {name: types.get(name, "constexpr") for name in names}
        aligned = {  # as pointers and most sizes are at run time
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind_ in types.items() if kind_.startswith("*") or kind_ == "i32"
        }  # fmt: skip
        language = GluonASTSource if kernel.is_gluon() else ASTSource
        source = language(
            kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
        )
        done = triton.compile(source, target=GPUTarget(backend, kind, warp), options=options)
        assert done.metadata.shared <= kilobytes * 1024, kernel.__name__
        code = done.asm["cubin" if backend == "cuda" else "amdgcn"]
        assert len(code) > 1000
        if backend == "hip":
            spilled = [line for line in code.splitlines() if ".vgpr_spill_count:" in line]
            assert spilled and all(line.split()[-1] == "0" for line in spilled), kernel.__name__


def test_nothing_imports_triton_before_it_is_needed() -> None:
    check = "import sys, nanoglm, nanoglm.bench.gpu, nanoglm.cli; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_without_triton_a_gpu_runs_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoglm import ops

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("nanoglm.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    ops._triton.cache_clear()
    assert ops._triton() is None
    assert ops._gpu("experts", lambda *given: given)(torch.ones(1)) == (torch.ones(1),)
    ops._triton.cache_clear()
