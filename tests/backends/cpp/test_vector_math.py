"""The exponential functions of the vector kernels are as accurate as csrc/kernels/math.inl says."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from snippets import ROOT

from fused_contrastive.backends import cpp

LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
BUILDS = {  # bytes of a vector, and the compiler's flags, as in csrc/kernels/levels.cpp
    "baseline": ["-DFC_VECTOR_BYTES=16"],
    "avx2": ["-DFC_VECTOR_BYTES=32", "-mavx2", "-mfma"],
    "avx512": ["-DFC_VECTOR_BYTES=64", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"],
}


def compiler() -> list[str]:
    for command in [os.environ.get("CXX", ""), "c++", "g++", "clang++"]:
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    pytest.skip("no C++ compiler on PATH: the kernels' functions cannot be compiled alone")


# At this CPU's own vector width all blocks of numbers are measured. Lower levels take longer: there it is every 16th.
@pytest.mark.parametrize("level", BUILDS)
def test_accuracy_is_as_stated(level: str, tmp_path: Path) -> None:
    here = cpp.vector_level()
    if LEVELS.index(level) > LEVELS.index(here):
        pytest.skip(f"this CPU has {here} at most")
    every = "1" if level == min(here, "avx512", key=LEVELS.index) else "16"
    source, program = ROOT / "tests/backends/cpp/vector_math.cpp", tmp_path / "vector_math"
    flags = ["-std=c++20", "-O3", "-Wno-psabi", "-pthread", f"-I{ROOT / 'csrc'}", *BUILDS[level]]
    built = subprocess.run([*compiler(), *flags, source, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    measured = subprocess.run([program, every], capture_output=True, text=True, timeout=300)
    print(measured.stdout)
    assert measured.returncode == 0, measured.stdout
