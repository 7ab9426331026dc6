"""Rehearses the Triton backend without a GPU: ``python tests/rehearsal``.

Triton's own JIT compiles every kernel and its own launcher launches it, on CPU tensors and a stand-in for libcuda
(``stand_in.c``), which checks grids, shared memory and descriptors and computes nothing. Exits with 1 if a launch was
illegal or a call raised, with 2 if the rehearsal cannot begin.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PLANTS = ("grid", "descriptor", "memory", "shared")


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/rehearsal", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, help="default: all; with --quick, sm_90")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a few losses and options")
    extent.add_argument("--every", action="store_true", help="every combination: 660 kernels for an architecture")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", action="store_true", help="print what is in the machine code of each kernel")
    parser.add_argument("--plant", nargs="+", choices=PLANTS, help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)  # of a child: kinds of features
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # the file where it writes them
    return parser.parse_args(arguments)


def build(folder: Path) -> str | None:
    """Builds the stand-in in ``folder``. Returns why that fails, or None."""
    named = os.environ.get("CC")
    compiler = next((found for name in (named, "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "the stand-in for libcuda needs a C compiler: found none of $CC, cc, gcc and clang"
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", library, HERE / "stand_in.c"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"{compiler} could not build the stand-in for libcuda:\n{done.stderr}"
    (folder / "libcuda.so").symlink_to(library.name)  # for Triton's -lcuda
    return None


def environment(arch: str, folder: Path) -> dict[str, str]:
    """The environment of a rehearsing process, with this checkout, Triton's compiler and the stand-in."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def first(path: Path, name: str) -> str:
        return os.pathsep.join([str(path), *filter(None, [os.environ.get(name)])])

    return {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        **given,
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": first(folder, "LD_LIBRARY_PATH"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), first(ROOT, "PYTHONPATH")]),
        "STAND_IN_CAPABILITY": arch.removeprefix("sm_"),
        "OMP_NUM_THREADS": "1",
    }


def processes(arch: str, given: argparse.Namespace) -> list[list[str]]:
    """The kinds of features for each process, so that all have about as much work."""
    if given.quick:
        return [["bf16"]] if given.plant else [["bf16"], ["fp32"]]
    if given.every or arch == "sm_90":
        return [["bf16"], ["fp16", "fp32", "tf32"]]
    return [["bf16", "fp16", "fp32", "tf32"]]


def child(arch: str, kinds: Sequence[str], folder: Path, given: Sequence[str]) -> dict[str, Any]:
    """Runs a process that rehearses some kinds of features for one architecture, and returns its results."""
    start, results = time.monotonic(), folder / f"{arch}-{'-'.join(kinds)}.json"
    command = [sys.executable, str(HERE), *given, "--arch", arch, "--job", *kinds, "--results", str(results)]
    done = subprocess.run(command, env=environment(arch, folder), capture_output=True, text=True)
    found: dict[str, Any] = {"calls": 0, "launches": 0, "descriptors": 0, "illegal": 0, "kernels": []}
    if results.is_file():
        found = json.loads(results.read_text())
    else:
        found["failures"] = [f"{arch}: exit status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"]
    print(f"{arch}, {', '.join(kinds)}: {found['calls']} calls in {time.monotonic() - start:.0f} s", flush=True)
    for failure in found["failures"]:
        print(f"FAILED {failure}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    if importlib.util.find_spec("triton") is None:
        print("the package triton is not installed", file=sys.stderr)
        return 2
    if given.job:
        import rehearse

        given.results.write_text(json.dumps(rehearse.run(given)))
        return 0
    passed = [f"--{name}" for name in ("quick", "every", "json") if getattr(given, name)]
    passed += [f"--only={given.only}", *(["--plant", *given.plant] if given.plant else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if (reason := build(folder)) is not None:
            print(reason, file=sys.stderr)
            return 2
        architectures = given.arch or (["sm_90"] if given.quick else ARCHITECTURES)
        jobs = [(arch, kinds) for arch in architectures for kinds in processes(arch, given)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda job: child(*job, folder, passed), jobs))
    if given.json:
        print(json.dumps([kernel for one in found for kernel in one["kernels"]]))
    launches, descriptors, illegal = (sum(one[key] for one in found) for key in ("launches", "descriptors", "illegal"))
    print(f"{launches} launches, {descriptors} descriptors, {illegal} illegal")
    return 1 if illegal or not launches or any(one["failures"] for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
