"""Times in turns, so that all implementations meet the same noise, beside the product that is their unit u."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.bench.workloads import WORKLOADS, Loss, Problem

AHEAD = 4_000_000  # clocks that the GPU waits, about 2 ms, while the host queues what is timed
FITS = 16 * 2**30  # bytes of a product that u is measured on in one piece
SLOW_PEER = 1.2  # times the fastest peer's time
SELDOM = 3  # rounds, of which a slow peer takes part in one

Step = Callable[[], tuple[float, float]]  # seconds forward, seconds backward


class Times(NamedTuple):
    """Seconds, round by round: of u in all rounds, of an implementation in those whose numbers are its ``rounds``."""

    u: list[float]
    rounds: dict[str, list[int]]
    forward: dict[str, list[float]]
    backward: dict[str, list[float]]
    quickest: dict[str, float]

    @classmethod
    def of(cls, names: Iterable[str]) -> Times:
        """No rounds yet, of these implementations."""
        names = list(names)
        return cls([], {name: [] for name in names}, {name: [] for name in names}, {name: [] for name in names}, {})

    def add(self, u: float, found: dict[str, tuple[float, float]]) -> None:
        """A round of these implementations."""
        for name, (forward, backward) in found.items():
            self.rounds[name].append(len(self.u))
            self.forward[name].append(forward)
            self.backward[name].append(backward)
            self.quickest[name] = min(self.quickest.get(name, math.inf), forward + backward)
        self.u.append(u)

    def both(self, name: str) -> list[float]:
        return [a + b for a, b in zip(self.forward[name], self.backward[name], strict=True)]


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


def product(problem: Problem) -> Callable[[], float]:
    """Seconds of one u: the vendor's product of all similarities, in parts where it is larger than FITS."""
    m, k, n = WORKLOADS[problem.loss].unit(problem)
    parts = max(1, -(-m * n * problem.torch_dtype.itemsize // FITS))
    x, y = (torch.randn(rows, k, device=problem.device).to(problem.torch_dtype) for rows in (-(-m // parts), n))
    watch = Watch(problem.device)

    def run() -> float:
        watch.start()
        torch.mm(x, y.T)
        return parts * watch.stop()[0]

    return run


class Watch:
    """Seconds between marks: of the host on a CPU, of the device on a GPU with the host ahead of it."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.marks: list[Any] = []  # events, or seconds

    def start(self) -> None:
        self.marks = []
        if self.gpu:  # else a small problem's time would be that of its launches
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
        if not self.gpu:
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        self.marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]


def step(loss: Loss, leaves: dict[str, Tensor], device: str) -> Step:
    """Forward and backward of one call."""
    watch, inputs = Watch(device), list(leaves.values())

    def run() -> tuple[float, float]:
        watch.start()
        value = loss(*inputs)
        watch.mark()
        torch.autograd.grad(value, inputs, allow_unused=True)
        forward, backward = watch.stop()
        return forward, backward

    return run


class StepError(Exception):
    """An implementation that was called before, and was right, has failed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name, self.error = name, error


def called(steps: dict[str, Step], name: str) -> tuple[float, float]:
    try:
        return steps[name]()
    except Exception as error:
        raise StepError(name, error) from error


def taking_part(times: Times, names: Collection[str], always: Collection[str]) -> list[str]:
    """Who is timed in the next round: all in the first and in each ``SELDOM``-th, and else no slow peer.

    A peer that takes more than ``SLOW_PEER`` times as long as another is no close call, and in each round would take
    most of the time that the close ones need. Those in ``always`` take part in all rounds.
    """
    if len(times.u) % SELDOM == 0:
        return list(names)
    fastest = min((times.quickest[name] for name in names if name not in always), default=math.inf)
    return [name for name in names if name in always or times.quickest[name] <= SLOW_PEER * fastest]


def interleaved(
    times: Times,
    product: Callable[[], float],
    steps: dict[str, Step],
    always: Collection[str],
    seconds: float,
    least: int,
    if_slow: int,
) -> None:
    """Adds rounds of one call each to ``times``.

    Until ``seconds`` and ``least`` rounds have passed, or twice the seconds and ``if_slow`` rounds. In each are the
    steps that ``taking_part`` names, with those of ``always`` among them. Each round has
    another order, and before u the product runs untimed: nobody always runs behind the same one, whose data and code
    are in the caches. Raises StepError, and has added whole rounds.
    """
    started = time.perf_counter()
    rounds = 0
    while True:
        spent = time.perf_counter() - started
        if (rounds >= least and spent >= seconds) or (rounds >= if_slow and spent >= 2 * seconds):
            return
        product()
        u = product()
        names = taking_part(times, steps, always)
        order = random.Random(len(times.u)).sample(names, len(names))
        times.add(u, {name: called(steps, name) for name in order})
        rounds += 1


def in_units(values: list[float], u: float) -> dict[str, float]:
    """Median and the 20% and 80% quantiles."""
    return {
        "median": statistics.median(values) / u, "q20": quantile(values, 0.2) / u, "q80": quantile(values, 0.8) / u
    }  # fmt: skip
