"""Late interaction, forward + backward, against the einsum: time in one process, peak memory in fresh ones.

    python benchmarks/max_sim.py [--items 256] [--tokens 32 49] [--dim 128]

Scores and gradients are checked against float64 before anything is timed. Memory is what the peak of resident memory
rises above inputs and gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import interleaved, provenance, quantile
from fused_contrastive import max_sim
from memory import resident

Scores = Callable[[Tensor, Tensor], Tensor]


def einsum(x: Tensor, y: Tensor) -> Tensor:
    """As training code writes it."""
    return torch.einsum("mtd,npd->mntp", x, y).amax(dim=3).sum(dim=2)


IMPLEMENTATIONS: dict[str, Scores] = {
    "einsum": einsum,
    "ours, auto": max_sim,
    "ours, budget 0": lambda x, y: max_sim(x, y, memory_budget=0),
}


def unit_tokens(items: int, tokens: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(items, tokens, dim), dim=2).requires_grad_()


def step(scores: Scores, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward and backward of a contrastive loss on the scores."""

    def run() -> None:
        x.grad = y.grad = None
        F.cross_entropy(scores(x, y), torch.arange(len(x))).backward()

    return run


def check(x: Tensor, y: Tensor) -> None:
    """Against float64, a few items of x at a time.

    Two of the millions of products may tie within float32's rounding, and their gradient go to the other token: one
    token in a thousand may be off.
    """
    wide_x, wide_y = (t.detach().double().requires_grad_() for t in (x, y))
    expected = torch.cat([einsum(wide_x[i : i + 8], wide_y) for i in range(0, len(x), 8)])
    F.cross_entropy(expected, torch.arange(len(x))).backward()
    for name, scores in IMPLEMENTATIONS.items():
        step(scores, x, y)()
        with torch.no_grad():
            value = scores(x, y).double()
        pairs = ((value, expected, 0.0), (x.grad.double(), wide_x.grad, 1e-3), (y.grad.double(), wide_y.grad, 1e-3))
        for ours, exact, may_be_off in pairs:
            off = (ours - exact).abs().amax(dim=-1) > 1e-5 * exact.abs().max()
            if off.double().mean() > may_be_off:
                raise SystemExit(f"{name}: off by {(ours - exact).abs().max()}; what is wrong is not timed")


def measure(name: str, items: int, tokens: list[int], dim: int) -> None:
    """Prints how far the peak rose above what was resident before, less the gradients."""
    small = [unit_tokens(4, length, dim) for length in tokens]
    step(IMPLEMENTATIONS[name], *small)()  # libraries loaded, threads started
    x, y = (unit_tokens(items, length, dim) for length in tokens)
    ctypes.CDLL(None).malloc_trim(0)  # nothing freed is left to take without being seen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(IMPLEMENTATIONS[name], x, y)()
    print(resident("VmHWM") - before - 4 * (x.numel() + y.numel()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=256, help="M = N")
    parser.add_argument("--tokens", type=int, nargs=2, default=[32, 49], metavar=("T", "P"))
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, at least 5 rounds")
    parser.add_argument("--measure", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.items, options.tokens, options.dim)
        return

    x, y = (unit_tokens(options.items, length, options.dim) for length in options.tokens)
    check(x, y)
    times = interleaved({name: step(scores, x, y) for name, scores in IMPLEMENTATIONS.items()}, options.seconds)
    peaks = {}
    for name in IMPLEMENTATIONS:
        command = [sys.executable, __file__, "--measure", name, "--items", str(options.items)]
        command += ["--tokens", *map(str, options.tokens), "--dim", str(options.dim)]
        peaks[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    console = Console(width=120)
    console.print(provenance())
    t, p = options.tokens
    table = Table(
        title=f"max_sim, forward + backward, fp32, M = N = {options.items}, T = {t}, P = {p}, D = {options.dim}"
    )
    for column in ("", "ms: median (20%..80%)", "einsum's time / this", "extra peak memory", "this / einsum's memory"):
        table.add_column(column, justify="right")
    reference = quantile(times["einsum"], 0.5)
    for name, values in times.items():
        low, middle, high = (1e3 * quantile(values, q) for q in (0.2, 0.5, 0.8))
        table.add_row(
            name,
            f"{middle:.0f} ({low:.0f}..{high:.0f})",
            f"{1e3 * reference / middle:.1f}",
            f"{peaks[name] / 2**20:.1f} MB",
            f"1/{peaks['einsum'] / peaks[name]:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
