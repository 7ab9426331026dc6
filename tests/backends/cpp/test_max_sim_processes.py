"""What only a process of its own shows of max_sim: vector levels, memory, Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from interrupting import seconds_to_end
from snippets import ROOT

from fused_contrastive.backends import cpp

LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
CASES = "cpp and (random_problems or longer or nan_and_inf or by_hand or equal_tokens)"


@pytest.mark.parametrize("level", LEVELS[:2])
def test_lower_vector_levels_pass_the_same_tests(level: str, seed: int) -> None:
    if LEVELS.index(level) >= LEVELS.index(cpp.vector_level()):
        pytest.skip(f"this CPU has {cpp.vector_level()}, which the other tests use")
    environment = {"FUSED_CONTRASTIVE_CPU_LEVEL": level, "FUSED_CONTRASTIVE_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", CASES, ROOT / "tests/ops/test_max_sim.py"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
        cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


def test_memory_does_not_grow_with_the_tokens_products() -> None:
    """M = N = 400, T = P = 40, D = 8: the products would be 1 GB; forward and backward stay under 60 MB."""
    code = """
import resource, torch
from fused_contrastive import max_sim
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def step(n):
    x, y = (torch.randn(n, 40, 8, requires_grad=True) for _ in range(2))
    max_sim(x, y, direction="both").x.sum().backward()
step(2)
before = peak()
step(400)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 60


LONG_CALLS = {
    "forward": """
x = torch.randn(20_000, 64, 64)
print("ready", flush=True)
fused_contrastive.max_sim(x, x, backend="cpp")
""",
    # Given all argmaxima, only the gradients take long.
    "backward": """
x, g = torch.randn(300, 64, 2048), torch.randn(300, 300)
index, none = torch.zeros(300, 300, 64, dtype=torch.uint8), torch.zeros(0, 0, 0, dtype=torch.uint8)
print("ready", flush=True)
torch.ops.fused_contrastive.max_sim_backward(
    g, None, index, none, [True, True], x, x, None, None, False, 300, "cpp"
)
""",
}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("call", LONG_CALLS)
def test_interrupt_ends_a_long_call(call: str) -> None:
    code = f"import torch, fused_contrastive\n{LONG_CALLS[call]}"
    assert seconds_to_end(code) < 1
