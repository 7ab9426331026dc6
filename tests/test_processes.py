"""What only a process of its own shows: memory, vector levels, Ctrl-C, the interpreter lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fused_contrastive import contrastive_stats
from fused_contrastive.backends import cpp

LEVELS = ["baseline", "avx2", "avx512"]


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
from fused_contrastive.testing.cases import sample
from fused_contrastive.verify.run import check, target
assert cpp.vector_level() == {level!r}
report = check(((case, case.inputs()) for case in sample(150, {seed})), target("cpu", ["cpp"]))
assert report.breaches == 0, [(cell.worst_case, cell.worst) for cell in report.cells if cell.breaches]
"""
    result = run(code, FUSED_CONTRASTIVE_CPU_LEVEL=level)
    assert result.returncode == 0, result.stderr


def test_unknown_vector_level() -> None:
    code = "import torch, fused_contrastive as f; f.clip_loss(torch.randn(2, 2), torch.randn(2, 2), 1.0)"
    result = run(code, FUSED_CONTRASTIVE_CPU_LEVEL="mmx")
    assert result.returncode != 0
    assert "FUSED_CONTRASTIVE_CPU_LEVEL: got 'mmx', expected baseline, avx2 or avx512" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_ends_a_long_call() -> None:
    code = """
import signal, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so do children
from fused_contrastive import contrastive_stats
x = torch.randn(100_000, 256)
print("ready", flush=True)
contrastive_stats(x, x, 0.01, backend="cpp")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    time.sleep(1.0)
    assert process.poll() is None, "the call was too short to interrupt"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - start < 5


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
