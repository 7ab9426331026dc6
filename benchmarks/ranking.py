"""Time and memory of ranking N queries against N candidates, of mining and of sampling negatives.

    python -m benchmarks.ranking [--n 100000] [--dim 256] [--k 10]

The unit u is the time of the same blocks of products in the same process, with which nothing is done. Mining leaves out
the right answer, ids that two candidates share, and scores above 95% of the right answer's; sampling draws from the
softmax of one direction. Eager does both on the matrix of one strip, by torch.topk and torch.multinomial. Every
function is timed on one strip of queries after another, in turns, so that a busy machine slows all alike; a ratio is of
the times of one strip. A sample of rows is checked against float64 before anything is timed. Memory is how far the
resident peak rises during one call with all queries, its result included.
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
from fused_contrastive import rank, sample_negatives, target_ranks
from fused_contrastive.ops import ranking

SAMPLE = 64  # rows that are checked
ROUNDING = 1e-5  # a generous bound on the rounding of a float32 product of unit features
MARGIN = 0.05  # of mining, relative
SCALE = 20.0  # of sampling


def gemm(x: Tensor, y: Tensor, scratch: Tensor) -> None:
    """The products of one strip with every block of candidates, overwritten one by one."""
    for b in y.split(ranking.BLOCK[1]):
        torch.mm(x, b.T, out=scratch[: len(x) * len(b)].view(len(x), len(b)))


def mined(x: Tensor, y: Tensor, k: int, rows: Tensor) -> Tensor:
    ids = torch.arange(len(y)) // 2
    return rank(x, y, k, targets=rows, exclude_ids=(ids[rows], ids), relative_margin=MARGIN).scores


def eager_mined(x: Tensor, y: Tensor, k: int, rows: Tensor) -> Tensor:
    ids, scores = torch.arange(len(y)) // 2, x @ y.T
    positive = scores.gather(1, rows[:, None])
    scores.masked_fill_(scores > positive - MARGIN * positive.abs(), -torch.inf)
    return scores.masked_fill_(ids[rows, None] == ids, -torch.inf).topk(k, dim=1).values


def sampled(x: Tensor, y: Tensor, k: int, rows: Tensor) -> Tensor | None:
    return sample_negatives(x, y, SCALE, k, targets=rows, directions=("row",)).row


def eager_sampled(x: Tensor, y: Tensor, k: int, rows: Tensor) -> Tensor:
    shares = (SCALE * x @ y.T).softmax(dim=1)
    return shares.scatter_(1, rows[:, None], 0).multinomial(k)


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
    right &= (mined(x[rows], y, k, rows) - eager_mined(x[rows], y, k, rows)).abs().max() < ROUNDING
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
            "mined": partial(mined, strip, y, k, rows),
            "sampled": partial(sampled, strip, y, k, rows),
            "eager_mined": partial(eager_mined, strip, y, k, rows),
            "eager_sampled": partial(eager_sampled, strip, y, k, rows),
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
    everything = x, y, options.k, torch.arange(len(x))
    runs: dict[str, Callable[[], object]] = {
        f"rank, k = {options.k}": partial(rank, x, y, options.k),
        "target_ranks": partial(target_ranks, x, y),
        "rank, mining": partial(mined, *everything),
        "sample_negatives": partial(sampled, *everything),
    }
    memory = {name: f"{rise(run, 'cpu')[0] / 2**20:.0f} MB" for name, run in runs.items()}
    memory |= {"eager, mining": "the matrix", "eager, sampling": "the matrix"}
    times = by_strips(x, y, options.k)
    u = times.pop("u")
    rows = []
    for (name, extra), strips in zip(memory.items(), times.values(), strict=True):
        ratios = [t / v for t, v in zip(strips, u, strict=True)]
        low, median, high = (f"{quantile(ratios, q):.2f}" for q in (0.2, 0.5, 0.8))
        rows.append([name, f"{median} ({low}..{high})", f"{sum(strips) / sum(u):.2f}", extra])
    matrix = options.n**2 * 4 / 2**30
    print(f"\nN = {options.n}, fp32, D = {options.dim}; u = {sum(u):.1f} s; the matrix has {matrix:.1f} GB\n")
    print("\n".join(table(["", "median u (20%..80%)", "sum of all in u", "extra peak memory"], rows)))


if __name__ == "__main__":
    main()
