"""Tests that need a separate process: memory, Ctrl-C; and that other Python threads run during a call."""

from __future__ import annotations

import sys
import threading
import time

import processes
import pytest
import torch
from interrupting import SOON, seconds_to_end

from fused_contrastive import contrastive_stats


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
    result = processes.run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 160


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_ends_a_long_call() -> None:
    code = """
import torch
from fused_contrastive import contrastive_stats
x = torch.randn(100_000, 256)
print("ready", flush=True)
contrastive_stats(x, x, 0.01, backend="cpp")
"""
    assert seconds_to_end(code) < SOON


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
