"""Times implementations in turns, so that all meet the same noise, and with them the product that is the unit u."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.implementations import failure
from benchmarks.workloads import WORKLOADS, BenchProblem, Loss

AHEAD = 4_000_000  # clocks that the GPU waits, about 2 ms, while the host queues what is timed
FITS = 16 * 2**30  # a larger product, in bytes, is made in parts

Step = Callable[[], tuple[float, float]]  # seconds forward, seconds backward


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


class Watch:
    """Seconds between marks: by the host's clock on a CPU; on a GPU by the device's, while the host queues ahead."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.marks: list[Any] = []  # events, or seconds

    def start(self) -> None:
        self.marks = []
        if self.gpu:  # otherwise a small problem's time would be the time of its launches
            torch.cuda._sleep(AHEAD)
        self.mark()

    def mark(self) -> None:
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def stop(self) -> list[float]:
        self.mark()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not self.gpu:
            return [b - a for a, b in pairs]
        self.marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def product(problem: BenchProblem) -> Callable[[], float]:
    """A function that returns the seconds of one u, the vendor's product of all similarities."""
    m, k, n = WORKLOADS[problem.loss].unit(problem)
    parts = max(1, -(-m * n * problem.torch_dtype.itemsize // FITS))
    x, y = (torch.randn(rows, k, device=problem.device).to(problem.torch_dtype) for rows in (-(-m // parts), n))
    watch = Watch(problem.device)

    def run() -> float:
        watch.start()
        torch.mm(x, y.T)
        return parts * watch.stop()[0]

    return run


def step(loss: Loss, leaves: dict[str, Tensor], device: str) -> Step:
    """A function that times forward and backward of one call."""
    watch, inputs = Watch(device), list(leaves.values())

    def run() -> tuple[float, float]:
        watch.start()
        value = loss(*inputs)
        watch.mark()
        torch.autograd.grad(value, inputs, allow_unused=True)
        forward, backward = watch.stop()
        return forward, backward

    return run


class Rounds(NamedTuple):
    """Seconds of u and of each step (forward, backward), round by round; a step that failed has a reason, no times."""

    u: list[float]
    times: dict[str, list[tuple[float, float]]]
    failed: dict[str, str]


def interleaved(unit: Callable[[], float], steps: dict[str, Step], seconds: float, fewest: int) -> Rounds:
    """Rounds of one call each, until ``seconds`` and ``fewest`` rounds have passed.

    Each round has another order, and before u the product runs once untimed, so that no step always finds the caches
    as the same other one left them. A step that raises is left out from then on.
    """
    found = Rounds([], {name: [] for name in steps}, {})
    started = time.perf_counter()
    while found.times and (len(found.u) < fewest or time.perf_counter() - started < seconds):
        unit()
        found.u.append(unit())
        for name in random.Random(len(found.u)).sample(list(found.times), len(found.times)):
            try:
                found.times[name].append(steps[name]())
            except Exception as error:
                found.failed[name] = failure(error)
                del found.times[name]
    return found
