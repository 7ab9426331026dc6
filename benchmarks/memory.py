"""Peak resident memory of the CLIP loss, forward + backward, above inputs and gradients. Each in a fresh process.

python benchmarks/memory.py [--sizes 4096 8192 32768] [--dim 256] [--eager-up-to 8192]
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from common import eager, features, provenance
from fused_contrastive import clip_loss

LOSSES = {
    "ours, budget 0": lambda x, y, scale: clip_loss(x, y, scale, memory_budget=0),
    "ours, auto": clip_loss,
    "eager": eager,
}


def resident(field: str) -> int:
    """VmRSS, resident bytes now, or VmHWM, their peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


def measure(name: str, n: int, d: int) -> None:
    """Prints how far the peak rose above what was resident before, less the gradients."""
    small = features(64, d)
    LOSSES[name](*small).backward()  # libraries loaded, threads started
    leaves = features(n, d)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    torch.mm(leaves[0][:64], leaves[1].T)
    ctypes.CDLL(None).malloc_trim(0)  # nothing freed is left for the loss to take without being seen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    LOSSES[name](*leaves).backward()
    print(resident("VmHWM") - before - gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--eager-up-to", type=int, default=8192, help="largest N at which eager is run")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], int(options.measure[1]), options.dim)
        return

    console = Console(width=120)
    console.print(provenance())
    table = Table(title=f"CLIP loss, forward + backward, fp32, D = {options.dim}: extra peak memory in MB")
    for column in ("N", *LOSSES, "one N x N matrix"):
        table.add_column(column, justify="right")
    for n in options.sizes:
        row = []
        for name in LOSSES:
            if name == "eager" and n > options.eager_up_to:
                row.append("not run")
                continue
            command = [sys.executable, __file__, "--dim", str(options.dim), "--measure", name, str(n)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            row.append(f"{int(result.stdout) / 2**20:.0f}")
        table.add_row(str(n), *row, f"{n * n * 4 / 2**20:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
