"""Time and memory of ranking N queries against N candidates, in u: the time of the blocked GEMM alone.

    python benchmarks/ranking.py [--n 100000] [--dim 256] [--k 10] [--rounds 2]

u makes the same blocks of products in the same process and does nothing with them. A sample of rows is checked against
float64 before anything is timed. Memory is how far the resident peak rises during one call, its result included.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import features, interleaved, provenance, quantile
from fused_contrastive import rank, target_ranks
from fused_contrastive.ops import ranking
from memory import resident

SAMPLE = 64  # rows that are checked
ROUNDING = 1e-5  # of a float32 product of unit features, generously


def gemm(x: Tensor, y: Tensor) -> None:
    """The products of every block, overwritten one by one."""
    height, width = ranking.BLOCK
    room = x.new_empty(height, width)
    for row in range(0, len(x), height):
        for column in range(0, len(y), width):
            a, b = x[row : row + height], y[column : column + width]
            torch.mm(a, b.T, out=room.flatten()[: len(a) * len(b)].view(len(a), len(b)))


def check(x: Tensor, y: Tensor, k: int) -> None:
    """A sample of the rows against float64."""
    rows = torch.randperm(len(x))[:SAMPLE]
    exact = x[rows].double() @ y.double().T
    own = exact.gather(1, rows[:, None])
    scores, indices = rank(x[rows], y, k)
    right = (scores - exact.topk(k, dim=1).values).abs().max() < ROUNDING
    right &= (scores - exact.gather(1, indices)).abs().max() < ROUNDING
    ranks = target_ranks(x[rows], y, targets=rows)
    right &= ((exact > own + ROUNDING).sum(dim=1) <= ranks).all()
    right &= (ranks <= (exact > own - ROUNDING).sum(dim=1)).all()
    if not right:
        raise SystemExit("the sample differs from float64; a wrong ranking is not timed")


def extra_memory(run: Callable[[], object]) -> int:
    """Bytes that the resident peak rises by."""
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    result = run()
    del result
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="timed, after one of warm-up that measures memory")
    options = parser.parse_args()

    console = Console(width=120)
    console.print(provenance())
    x, y, _ = (t.detach() for t in features(options.n, options.dim))
    check(x, y, options.k)
    runs: dict[str, Callable[[], object]] = {
        f"rank, k = {options.k}": partial(rank, x, y, options.k),
        "target_ranks": partial(target_ranks, x, y),
    }
    memory = {name: extra_memory(run) for name, run in runs.items()}
    times = interleaved({"u": partial(gemm, x, y)} | runs, seconds=0, least=options.rounds)
    u = quantile(times["u"], 0.5)
    title = f"{options.n} queries x {options.n} candidates, fp32, D = {options.dim}; u = {u:.1f} s"
    table = Table(title=f"{title}; matrix {options.n**2 * 4 / 2**30:.1f} GB")
    for column in ("", "time in u", "each round", "extra peak memory"):
        table.add_column(column, justify="right")
    for name in runs:
        each = ", ".join(f"{t / v:.2f}" for t, v in zip(times[name], times["u"], strict=True))
        table.add_row(name, f"{quantile(times[name], 0.5) / u:.2f}", each, f"{memory[name] / 2**20:.0f} MB")
    console.print(table)


if __name__ == "__main__":
    main()
