"""Builds the one extension, fused_contrastive._C (the C++ CPU backend), with torch's extension tools.

No -march=native: csrc/levels.cpp compiles the vector kernels once per instruction set and picks one at run time, so
one build serves every CPU of its architecture.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").iterdir() if path.suffix in {".h", ".inl"})

compile_args = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
if sys.platform.startswith("linux"):
    # Compiled with OpenMP but not linked with it: at::parallel_for then runs on the runtime torch has loaded. A second
    # runtime would bring a second pool of threads.
    compile_args.append("-fopenmp")
compile_args += os.environ.get("FUSED_CONTRASTIVE_CFLAGS", "").split()

setup(
    ext_modules=[
        CppExtension(
            "fused_contrastive._C",
            SOURCES,
            depends=HEADERS,
            extra_compile_args={"cxx": compile_args},
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
