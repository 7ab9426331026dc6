"""What ``monitor`` adds to a step: the time of a call that is only counted, and of one that is measured.

    python -m benchmarks.monitoring [--every 100]

A step here is a loss's forward and backward alone, without encoders, so each share is the largest that a training can
see. Plain steps, counted steps and measured steps are timed in turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.provenance import line, provenance
from benchmarks.report import table
from fused_contrastive import clip_loss, monitor, nt_xent_loss

SHAPES = ((256, 128), (1024, 512), (4096, 512), (8192, 512))
LOSSES = {
    "clip_loss": lambda x, y: clip_loss(x, y, 20.0),
    "nt_xent_loss": lambda x, y: nt_xent_loss(x, y, 0.1, normalize=True),
}
SECONDS = 6.0  # of each row of the table


def medians(name: str, n: int, d: int) -> list[float]:
    """Seconds of a plain step, and what a counted and a measured call add to it: medians of the differences."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (F.normalize(torch.randn(n, d, device=device), dim=1).requires_grad_() for _ in range(2))

    def step() -> float:
        start = time.perf_counter()
        torch.autograd.grad(LOSSES[name](x, y), (x, y))
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: list[tuple[float, float, float]] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 8 or time.perf_counter() < end:
        plain = step()
        with monitor(every=2):
            measured = step()
            counted = step()
        times.append((plain, counted - plain, measured - plain))
    return [statistics.median(each) for each in zip(*times[3:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=100)
    every = parser.parse_args().every
    print(line(provenance()), "\n")
    rows = []
    for name in LOSSES:
        for n, d in SHAPES:
            plain, counted, measured = medians(name, n, d)
            share = (measured + (every - 1) * counted) / every / plain
            times = f"{1e3 * plain:.2f} ms", f"{1e3 * measured:.2f} ms", f"{1e6 * counted:.0f} us"
            rows.append([f"{name}, N = {n}, D = {d}", *times, f"{share:.2%}"])
    print("\n".join(table(["", "step", "measured call adds", "counted call adds", f"every={every} adds"], rows)))


if __name__ == "__main__":
    main()
