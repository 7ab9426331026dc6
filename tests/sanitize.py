"""`make sanitize`: the C++ backend under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds the package in build/sanitize, makes two bad calls to show that both sanitizers report errors in csrc, and runs
the tests of the C++ backend and the fuzzer. Leaks are not looked for, because Python itself is not instrumented and
keeps memory until it ends; tests/core/test_trust.py watches memory instead.

    python tests/sanitize.py [arguments for pytest in place of the usual ones]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from apart import ROOT, WARNINGS, build, importing

CHECKS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# -fno-wrapv: Python builds extensions with -fwrapv, which defines signed overflow, so that UBSan would not report it.
# _GLIBCXX_ASSERTIONS: an index beyond a std::vector's size aborts, even if it is within the vector's capacity.
SEEN = "-O1 -g -fno-omit-frame-pointer -fno-wrapv -D_GLIBCXX_ASSERTIONS"
FLAGS = f"{WARNINGS} {CHECKS} -fsanitize=float-cast-overflow {SEEN}"

FUZZED = "5"  # minutes

# Calls that bypass Python's checks, by the report that they must cause, which needs csrc's own code instrumented.
CANARIES = {
    "heap-use-after-free": """
import ctypes  # the bindings check sizes and indices, but cannot see that memory was freed
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = libc.malloc(64)
scores = torch.frombuffer((ctypes.c_float * 16).from_address(block), dtype=torch.float32).view(4, 4)
libc.free(ctypes.c_void_p(block))
columns = torch.zeros(4, dtype=torch.int64)
_C.count_ahead(scores, 0, torch.zeros(4), columns, columns.clone())
""",
    "signed integer overflow": """
columns = torch.zeros(1, 4, dtype=torch.int64)
_C.merge_top_k(torch.ones(1, 4), 2**63 - 1, torch.zeros(1, 4), columns)
""",
}

TESTS = [
    "ops/test_stats",
    "losses/test_near_and_far",
    "ops/test_row_loss",
    "ops/test_limits",
    "losses/test_any_ids",
    "losses/test_corrections",
    "losses/test_related",
    "losses/test_distillation",
    "losses/test_groups",
    "losses/test_matryoshka",
    "losses/test_metrics",
    "losses/test_metrics_of_groups",
    "ops/test_mined",
    "ops/test_packed",
    "ops/test_row_dots",
    "losses/test_losses",
    "ops/test_max_sim",
    "ops/test_rank",
    "ops/test_cross_entropy",
    "ops/test_normalize",
    "losses/test_nan_payloads",
    "losses/test_adversarial",
    "losses/test_adversarial_primitives",
    "ops/test_changed_inputs",
    "ops/test_operators",
    "backends/cpp/test_vector_levels",
]
# Tests of the C++ backend; memory_does_not_grow is left out, because the sanitizer's own memory would count.
CHOSEN = "not reference and not triton and not compile and not memory_does_not_grow"
# --capture=sys: by default pytest would capture the sanitizer's report in a file.
SELECTION = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-k", CHOSEN]


def runtime(name: str) -> str:
    """The path of a library of the compiler."""
    compiler = os.environ.get("CXX", "c++")
    path = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: {compiler} has no {name}")
    return os.path.realpath(path)


def environment(built: Path) -> dict[str, str]:
    # The runtimes must be loaded first, because Python is not linked with them, with libstdc++, whose exceptions they
    # intercept.
    preloaded = [runtime("libasan.so"), runtime("libubsan.so"), runtime("libstdc++.so.6")]
    return {
        **importing(built),
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main(arguments: list[str]) -> int:
    built = build("sanitize", {"FUSED_CONTRASTIVE_CFLAGS": FLAGS, "LDFLAGS": CHECKS})
    env = environment(built)
    for report, call in CANARIES.items():
        code = f"import torch\nfrom fused_contrastive import _C\nprint(_C.__file__)\n{call}"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        if result.returncode == 0 or report not in result.stderr or str(built) not in result.stdout:
            sys.exit(f"sanitize: a call that must end in {report!r} did not\n{result.stdout}{result.stderr}")
        print(f"sanitize: {report} in csrc is seen", flush=True)
    chosen = arguments or [*SELECTION, *(f"tests/{name}.py" for name in TESTS)]
    tested = subprocess.run([sys.executable, "-m", "pytest", *chosen], cwd=ROOT, env=env).returncode
    if tested or arguments:
        return tested
    return subprocess.run([sys.executable, "tests/fuzz.py", "--minutes", FUZZED], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
