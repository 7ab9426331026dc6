"""Builds the one extension, fused_contrastive._C (the C++ CPU backend), with torch's extension tools.

No -march=native: csrc/kernels/levels.cpp compiles the vector kernels once per instruction set and picks one at run
time, so one build serves every CPU of its architecture.

Without a C++ compiler the package is installed without the extension, and says so when it is used. The environment
variable FUSED_CONTRASTIVE_EXTENSION: 0 never builds it, 1 makes a missing compiler an error. A compiler that is there
and fails is always one.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

SWITCH = "FUSED_CONTRASTIVE_EXTENSION"
NEED_NO_COMPILER = {"clean", "dist_info", "egg_info", "sdist"}


def missing_compiler() -> str | None:
    """Why there is no compiler to use. One that was found is left in CXX, so that it compiles and links."""
    if sys.platform == "win32":
        return "csrc/ is written for GCC and Clang, on Linux and macOS"
    named = os.environ.get("CXX", "").strip()
    for command in [named] if named else ["c++", "g++", "clang++"]:
        program = shlex.split(command)
        # Asked for its version: on macOS /usr/bin/c++ is there without Apple's tools, and fails.
        if shutil.which(program[0]) and subprocess.run([*program, "--version"], capture_output=True).returncode == 0:
            os.environ["CXX"] = command
            return None
    return f"CXX={named} does not run" if named else "no C++ compiler: none of c++, g++ and clang++ is on PATH"


def wanted() -> bool:
    """Whether to build the extension; says why not, and raises where it must be built and cannot."""
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"{SWITCH}: got {switch!r}, expected 0 (never), 1 (always) or nothing (with a C++ compiler)")
    why = f"{SWITCH}=0" if switch == "0" else missing_compiler()
    if why is None:
        return True
    if not NEED_NO_COMPILER & set(sys.argv):
        if switch == "1":
            raise SystemExit(f"{SWITCH}=1, but the extension cannot be built: {why}. Install g++ or clang++.")
        print(
            f"\nfused_contrastive is built WITHOUT its C++ CPU backend: {why}.\nCPU tensors will take the reference "
            "backend, after a warning; `python -m fused_contrastive info` says how to build it later.\n",
            file=sys.stderr,
        )
    return False


def require_build_packages() -> None:
    """Without build isolation, nobody has installed what pyproject.toml's [build-system] lists."""
    missing = [name for name in ("torch", "ninja", "pybind11", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"fused_contrastive's C++ extension is built with {', '.join(missing)}, which this environment lacks. "
            'First: pip install "torch>=2.8" "setuptools>=77" wheel ninja pybind11 numpy; then repeat this command. '
            f"{SWITCH}=0 installs the package without the extension."
        )


def extension() -> dict[str, object]:
    """The arguments of setup() that build it."""
    require_build_packages()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    version = subprocess.run([*shlex.split(os.environ["CXX"]), "--version"], capture_output=True, text=True).stdout
    # Hidden, as pybind11's own types are: a class may not be more visible than its members.
    compile_args = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    for folder in [*include_paths(), sysconfig.get_path("include")]:  # warnings are of csrc, not of others' headers
        compile_args += ["-isystem", folder]
    if sys.platform.startswith("linux") and "clang" not in version:
        # Compiled with OpenMP but not linked with it: at::parallel_for then runs on the runtime torch has loaded. A
        # second runtime would bring a second pool of threads. That runtime is GCC's, which has none of the functions
        # that Clang's code calls: built by Clang, the backend takes one thread.
        compile_args.append("-fopenmp")
    compile_args += os.environ.get("FUSED_CONTRASTIVE_CFLAGS", "").split()
    module = CppExtension(
        "fused_contrastive._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        include_dirs=[str(Path("csrc").resolve())],
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inl"}),
        extra_compile_args={"cxx": compile_args},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)}}


setup(**(extension() if wanted() else {}))
