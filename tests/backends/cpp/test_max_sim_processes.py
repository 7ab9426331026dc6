"""Tests of max_sim that need a separate process: memory, Ctrl-C."""

from __future__ import annotations

import sys

import processes
import pytest
from interrupting import SOON, seconds_to_end


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
    result = processes.run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 60


LONG_CALLS = {
    "forward": """
x = torch.randn(20_000, 64, 64)
print("ready", flush=True)
fused_contrastive.max_sim(x, x, backend="cpp")
""",
    # The argmaxima are given, so that only the gradients take long.
    "backward": """
x, g = torch.randn(300, 64, 2048), torch.randn(300, 300)
index, none = torch.zeros(300, 300, 64, dtype=torch.uint8), torch.zeros(0, 0, 0, dtype=torch.uint8)
print("ready", flush=True)
torch.ops.fused_contrastive.max_sim_backward(
    g, None, index, none, [True, True], x, x, None, None, False, 0.0, 300, "cpp"
)
""",
}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("call", LONG_CALLS)
def test_interrupt_ends_a_long_call(call: str) -> None:
    code = f"import torch, fused_contrastive\n{LONG_CALLS[call]}"
    assert seconds_to_end(code) < SOON
