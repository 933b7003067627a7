"""Builds the CPU kernels: csrc/*.cpp once per instruction set, as plain shared libraries for ctypes.

Setuptools and a C++ compiler, nothing else: no Python.h, no torch headers. What the compiler refuses is left
out; without a compiler there is no library at all and nanoglm runs on its PyTorch ops. `nanoglm doctor`
tells which. CXX names the compiler (default g++), CXXFLAGS adds to its flags.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SOURCES = (
    "select",
    "sparse_attention",
    "sparse_attention_backward",
    "indexer_kl",
    "experts",
    "experts_int8",
    "linear",
    "rows",
)
X86 = {
    "avx512": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
}
# Contraction to fused multiply-add is asked for: a standard's name in -std would switch it off.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fopenmp", "-fvisibility=hidden"]


def build(folder: Path) -> None:
    """Writes ``kernels_<set>.so`` into ``folder``; says in one line what could not be built."""

    def compile_(*arguments: str) -> None:
        command = [os.environ.get("CXX", "g++"), *arguments, *os.environ.get("CXXFLAGS", "").split()]
        subprocess.run(command, check=True, capture_output=True, text=True)

    sets = {"portable": []} | (X86 if platform.machine() in ("x86_64", "AMD64") else {})
    folder.mkdir(parents=True, exist_ok=True)
    for name, flags in sets.items():
        with tempfile.TemporaryDirectory() as scratch:
            objects = []
            try:
                for source in ("cpu", *SOURCES):
                    own = [] if source == "cpu" else flags  # cpu asks the processor before any of them may be used
                    objects.append(f"{scratch}/{source}.o")
                    file, define = str(HERE / "csrc" / f"{source}.cpp"), f"-DNANOGLM_{name.upper()}"
                    compile_(*FLAGS, define, *own, "-c", file, "-o", objects[-1])
                compile_("-shared", "-fopenmp", *objects, "-o", f"{scratch}/kernels.so")
                part = folder / f".kernels_{name}.so"
                part.write_bytes(Path(f"{scratch}/kernels.so").read_bytes())
                part.replace(folder / f"kernels_{name}.so")  # never into a library that a process has mapped
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"nanoglm: no {name} kernels: {error}", file=sys.stderr)


class Build(build_py):
    """Python files, then the kernels beside them (in place for an editable install)."""

    def run(self) -> None:
        super().run()
        root = HERE if self.editable_mode else Path(self.build_lib)
        build(root / "nanoglm" / "ops" / "cpu")


class Wheel(bdist_wheel):
    """For this platform and any Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
