"""The kernels' tests again under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three instruction sets, each several times slower than without
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_no_kernel_reads_or_writes_beyond_its_tensors(tmp_path: Path) -> None:
    build = "import sys, runpy, pathlib; runpy.run_path(sys.argv[1])['build'](pathlib.Path(sys.argv[2]))"
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    arguments = [sys.executable, "-c", build, str(ROOT / "setup.py"), str(tmp_path)]
    subprocess.run(arguments, check=True, env=os.environ | {"CXXFLAGS": flags})
    script = textwrap.dedent(f"""
        import pathlib, sys, pytest
        from nanoglm.ops import cpu
        cpu.FOLDER = pathlib.Path({str(tmp_path)!r})
        assert not any(isinstance(cpu.library(name), str) and "loaded" in cpu.library(name) for name in cpu.SETS)
        tests = {str(ROOT / "tests" / "ops" / "test_cpu.py")!r}
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", tests]))
    """)
    runtime = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    options = {"LD_PRELOAD": ":".join(runtime), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=os.environ | options
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
