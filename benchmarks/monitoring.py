"""What ``monitor`` adds to a step: the time of a call that is only counted, and of one that is measured.

    python -m benchmarks.monitoring [--every 100]

A step here is a loss's forward and backward alone, without encoders, so each share is the largest that a training can
see. On a CPU, times are of all threads together (``time.process_time``), which a busy machine changes least. Plain and
measured steps are timed in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import line, provenance
from benchmarks.report import table
from fused_contrastive import clip_loss, monitor, nt_xent_loss

SHAPES = ((256, 128), (1024, 512), (4096, 512))
LOSSES = {
    "clip_loss": lambda x, y: clip_loss(x, y, 20.0),
    "nt_xent_loss": lambda x, y: nt_xent_loss(x, y, 0.1, normalize=True),
}
SECONDS = 6.0  # of each row of the table
CALLS = 1000  # of a small problem, in which counting shows
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> float:
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def features(n: int, d: int) -> list[Tensor]:
    return [F.normalize(torch.randn(n, d, device=DEVICE), dim=1).requires_grad_() for _ in range(2)]


def counted() -> float:
    """Seconds that a counted call adds: it does not look at the features."""
    x, y = features(8, 8)

    def calls() -> float:
        start = clock()
        for _ in range(CALLS):
            clip_loss(x, y, 20.0)
        return (clock() - start) / CALLS

    added = []
    for _ in range(5):
        plain = calls()
        with monitor(every=10**9):
            added.append(calls() - plain)
    return statistics.median(added)


def measured(name: str, n: int, d: int) -> tuple[float, float]:
    """Seconds of a plain step, and what a measured call adds to it: medians."""
    x, y = features(n, d)

    def step() -> float:
        start = clock()
        torch.autograd.grad(LOSSES[name](x, y), (x, y))
        return clock() - start

    times: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 8 or time.perf_counter() < end:
        step()  # so that both begin with the same in the caches
        plain = step()
        with monitor():
            times.append((plain, step() - plain))
    of_plain, added = zip(*times[3:], strict=True)
    return statistics.median(of_plain), statistics.median(added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=100)
    every = parser.parse_args().every
    print(line(provenance()))
    count = counted()
    print(f"\na counted call adds {1e6 * count:.0f} us\n")
    rows = []
    for name in LOSSES:
        for n, d in SHAPES:
            plain, added = measured(name, n, d)
            mean = (added + (every - 1) * count) / every
            shown = f"{1e3 * plain:.2f} ms", f"{1e3 * added:.2f} ms", f"{1e6 * mean:.0f} us", f"{mean / plain:.2%}"
            rows.append([f"{name}, N = {n}, D = {d}", *shown])
    print("\n".join(table(["", "step", "a measured call adds", f"every = {every} adds", "of the step"], rows)))


if __name__ == "__main__":
    main()
