"""The kernels' build: all instruction sets with a compiler, none and no failure without one."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanoglm_setup", Path(__file__).parents[1] / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_compiler_there_are_none_and_it_says_so(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "no portable kernels" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_with_a_compiler_every_set_is_built_and_loads(build: ModuleType, tmp_path: Path) -> None:
    build.build(tmp_path)
    sets = ["portable"] + (["avx2", "avx512"] if platform.machine() == "x86_64" else [])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"kernels_{name}.so" for name in sets)
    for name in sets:
        assert ctypes.CDLL(str(tmp_path / f"kernels_{name}.so")).nanoglm_supported() in (0, 1)
    assert ctypes.CDLL(str(tmp_path / "kernels_portable.so")).nanoglm_supported() == 1
