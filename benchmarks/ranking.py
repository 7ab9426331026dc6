"""Time and memory of ranking N queries against N candidates, in u: the time of the blocked GEMM alone.

    python -m benchmarks.ranking [--n 100000] [--dim 256] [--k 10]

u makes the same blocks of products in the same process and does nothing with them. Every function is timed on one strip
of queries after another, in turns, so that a busy machine slows all alike; a ratio is of the times of one strip. A
sample of rows is checked against float64 before anything is timed. Memory is how far the resident peak rises during one
call with all queries, its result included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import rise
from benchmarks.provenance import line, provenance
from benchmarks.report import table
from benchmarks.timing import quantile
from fused_contrastive import rank, target_ranks
from fused_contrastive.ops import ranking

SAMPLE = 64  # rows that are checked
ROUNDING = 1e-5  # a generous bound on the rounding of a float32 product of unit features


def gemm(x: Tensor, y: Tensor, scratch: Tensor) -> None:
    """The products of one strip with every block of candidates, overwritten one by one."""
    for b in y.split(ranking.BLOCK[1]):
        torch.mm(x, b.T, out=scratch[: len(x) * len(b)].view(len(x), len(b)))


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


def by_strips(x: Tensor, y: Tensor, k: int) -> dict[str, list[float]]:
    """Seconds of each strip of queries against all candidates."""
    height, width = ranking.BLOCK
    scratch = x.new_empty(height * width)
    times: dict[str, list[float]] = {}
    for rows in torch.arange(len(x)).split(height):
        strip = x[rows[0] : rows[-1] + 1]
        runs: dict[str, Callable[[], object]] = {
            "u": partial(gemm, strip, y, scratch),
            "rank": partial(rank, strip, y, k),
            "target_ranks": partial(target_ranks, strip, y, targets=rows),
        }
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times.setdefault(name, []).append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=10)
    options = parser.parse_args()
    print(line(provenance()))
    x, y = (F.normalize(torch.randn(options.n, options.dim), dim=1) for _ in range(2))
    check(x, y, options.k)
    runs: dict[str, Callable[[], object]] = {
        f"rank, k = {options.k}": partial(rank, x, y, options.k),
        "target_ranks": partial(target_ranks, x, y),
    }
    memory = {name: rise(run, "cpu")[0] for name, run in runs.items()}
    times = by_strips(x, y, options.k)
    u = times.pop("u")
    rows = []
    for (name, extra), strips in zip(memory.items(), times.values(), strict=True):
        ratios = [t / v for t, v in zip(strips, u, strict=True)]
        low, median, high = (f"{quantile(ratios, q):.2f}" for q in (0.2, 0.5, 0.8))
        rows.append([name, f"{median} ({low}..{high})", f"{sum(strips) / sum(u):.2f}", f"{extra / 2**20:.0f} MB"])
    matrix = options.n**2 * 4 / 2**30
    print(f"\nN = {options.n}, fp32, D = {options.dim}; u = {sum(u):.1f} s; the matrix has {matrix:.1f} GB\n")
    print("\n".join(table(["", "median u (20%..80%)", "sum of all in u", "extra peak memory"], rows)))


if __name__ == "__main__":
    main()
