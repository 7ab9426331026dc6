"""What only a process of its own shows: memory, vector levels, Ctrl-C, the interpreter lock."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from interrupting import seconds_to_end

from fused_contrastive import contrastive_stats
from fused_contrastive.backends import cpp

LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_memory_does_not_grow_with_the_square() -> None:
    """N = 16384, D = 32: the logits alone would be 1 GB; forward and backward stay under 160 MB."""
    code = """
import resource, torch
from fused_contrastive import clip_loss
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def step(n):
    x, y = (torch.randn(n, 32, requires_grad=True) for _ in range(2))
    clip_loss(x, y, 10.0, memory_budget=0).backward()
step(64)
before = peak()
step(16384)
print(peak() - before)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 160


@pytest.mark.parametrize("level", LEVELS)
def test_every_vector_level_keeps_the_budget(level: str, seed: int) -> None:
    if LEVELS.index(level) > LEVELS.index(cpp.vector_level()):
        pytest.skip(f"this CPU has {cpp.vector_level()} at most")
    code = f"""
from fused_contrastive.backends import cpp
from fused_contrastive.testing import cases
from fused_contrastive.verification.run import Report, check, target
assert cpp.vector_level() == {level!r}
report, here = Report(), target("cpu", ["cpp"])
check([*cases.sample_of_grid(150, {seed}), *cases.sample(164, {seed})], here, report)
assert report.breaches == 0, [(cell.worst_case, cell.worst) for cell in report.cells if cell.breaches]
"""
    result = run(code, FUSED_CONTRASTIVE_CPU_LEVEL=level)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("level", LEVELS)
def test_sums_of_equal_terms(level: str, seed: int) -> None:
    """At D = 1, normalised, S has two values: no rounding error of a sum over rows, columns or both averages out."""
    if LEVELS.index(level) > LEVELS.index(cpp.vector_level()):
        pytest.skip(f"this CPU has {cpp.vector_level()} at most")
    code = f"""
import torch
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.registry import Sizes
for n, dtype in ((257, torch.float32), (257, torch.float64), (1500, torch.float32), (2500, torch.float64)):
    for variant, scale in (("plain", 0.5), ("plain", 1.0), ("none", 1.0)):
        case = Case("siglip", variant, Sizes(n, 1, dtype, scale), {seed})
        for deviation in harness.deviations(case, "cpp"):
            assert deviation.share <= 1, f"{{case}}: {{deviation}}"
"""
    result = run(code, FUSED_CONTRASTIVE_CPU_LEVEL=level)
    assert result.returncode == 0, result.stderr


def test_unknown_vector_level() -> None:
    code = "import torch, fused_contrastive as f; f.clip_loss(torch.randn(2, 2), torch.randn(2, 2), 1.0)"
    result = run(code, FUSED_CONTRASTIVE_CPU_LEVEL="mmx")
    assert result.returncode != 0
    assert (
        "FUSED_CONTRASTIVE_CPU_LEVEL: got 'mmx', expected baseline, avx2, avx512, avx512_bf16 or amx_bf16"
        in result.stderr
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_ends_a_long_call() -> None:
    code = """
import torch
from fused_contrastive import contrastive_stats
x = torch.randn(100_000, 256)
print("ready", flush=True)
contrastive_stats(x, x, 0.01, backend="cpp")
"""
    assert seconds_to_end(code) < 1


def test_other_python_threads_run_meanwhile() -> None:
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    x = torch.randn(6000, 256)
    before = ticks
    contrastive_stats(x, x, 0.01, backend="cpp")
    during = ticks - before
    done.set()
    thread.join()
    assert during > 5
