"""`make clang`: the C++ backend built by Clang, with warnings as errors, and its tests.

Clang comes from the PyPI package ziglang, or CXX names it. The extension that it builds uses one thread
(docs/packaging.md).

    python tests/clang.py [arguments for pytest in place of the usual ones]
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

from apart import ROOT, WARNINGS, build, importing

# Clang's -Wconversion includes the signs of indices; GCC's does not in C++.
FLAGS = f"{WARNINGS} -Wno-sign-conversion"

TESTS = [
    "ops/test_stats",
    "losses/test_near_and_far",
    "ops/test_row_dots",
    "ops/test_max_sim",
    "ops/test_changed_inputs",
    "losses/test_nan_payloads",
    "ops/test_operators",
    "core/test_trust",
    "backends/cpp/test_vector_levels",
]
# The tests of the C++ backend; of test_operators and test_trust only a part.
CHOSEN = "not reference and not triton and not compile and (not test_operators or cpp) and (not test_trust or threads)"
SELECTION = ["-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN]


def clang_of_zig() -> str:
    """Writes a script that runs `zig clang` with the system's headers and libraries, and returns its path."""
    package = importlib.util.find_spec("ziglang")
    if package is None or not package.submodule_search_locations:
        sys.exit("clang: CXX names no Clang, and ziglang is not installed: `make clang`, or pip install ziglang")
    zig = Path(package.submodule_search_locations[0])
    script = ROOT / "build" / "clang++"
    script.parent.mkdir(exist_ok=True)
    target = f"--driver-mode=g++ --target={platform.machine()}-linux-gnu"  # its own default is musl
    script.write_text(f'#!/bin/sh\nexec "{zig}/zig" clang {target} -idirafter "{zig}/lib/include" "$@"\n')
    script.chmod(0o755)
    return str(script)


def main(arguments: list[str]) -> int:
    compiler = os.environ.get("CXX") or clang_of_zig()
    version = subprocess.check_output([compiler, "--version"], text=True).splitlines()[0]
    if "clang" not in version:
        sys.exit(f"clang: {compiler} is {version}")
    built = build("clang", {"CXX": compiler, "FUSED_CONTRASTIVE_CFLAGS": FLAGS})
    env = importing(built)
    code = "import torch\nfrom fused_contrastive import _C\nprint(_C.__file__, _C.vector_level())"
    shown = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    if str(built) not in shown:
        sys.exit(f"clang: another extension was imported: {shown}")
    print(f"{version}: {shown}", end="", flush=True)
    chosen = arguments or [*SELECTION, *(f"tests/{name}.py" for name in TESTS)]
    return subprocess.run([sys.executable, "-m", "pytest", *chosen], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
