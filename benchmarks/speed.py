"""Time of the CLIP loss, forward + backward, in u: the time of one N x N x D torch.mm in the same process.

    python benchmarks/speed.py [--sizes 8 32 128 512 1024 4096 8192] [--dim 512] [--no-compile]

Every implementation is checked against the float64 oracle's value before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import eager, features, interleaved, provenance, quantile
from fused_contrastive import clip_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementations(compiled: bool) -> dict[str, Loss]:
    losses: dict[str, Loss] = {
        "ours, auto": clip_loss,
        "ours, budget 0": lambda x, y, scale: clip_loss(x, y, scale, memory_budget=0),
        "eager": eager,
    }
    if compiled:
        losses["torch.compile"] = torch.compile(eager, dynamic=False)
    return losses


def step(loss: Loss, leaves: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    return run


def check(name: str, loss: Loss, leaves: tuple[Tensor, Tensor, Tensor], expected: Tensor) -> None:
    value = loss(*leaves).detach().double()
    if not torch.allclose(value, expected, rtol=1e-5):
        raise SystemExit(f"{name}: loss {value.item()}, expected {expected.item()}; a wrong loss is not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512, 1024, 4096, 8192])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=8.0, help="per size, at least 5 rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile(eager) out")
    options = parser.parse_args()

    console = Console(width=120)
    console.print(provenance())
    table = Table(title=f"CLIP loss, forward + backward, fp32, D = {options.dim}: median u (20%..80%)")
    losses = implementations(not options.no_compile)
    for column in ("N", "u in ms", *losses):
        table.add_column(column, justify="right")
    for n in options.sizes:
        torch._dynamo.reset()
        leaves = features(n, options.dim)
        x, y = leaves[0].detach(), leaves[1].detach()
        with torch.no_grad():
            expected = eager(*(t.double() for t in leaves))
        for name, loss in losses.items():
            check(name, loss, leaves, expected)
        runs: dict[str, Callable[[], object]] = {"u": lambda x=x, y=y: torch.mm(x, y.T)}
        runs |= {name: step(loss, leaves) for name, loss in losses.items()}
        times = interleaved(runs, options.seconds)
        u = quantile(times["u"], 0.5)
        cells = [
            f"{quantile(t, 0.5) / u:.2f} ({quantile(t, 0.2) / u:.2f}..{quantile(t, 0.8) / u:.2f})"
            for name, t in times.items()
            if name != "u"
        ]
        table.add_row(str(n), f"{u * 1e3:.3f}", *cells)
        console.print(f"N = {n}: " + ", ".join(f"{name} {cell}" for name, cell in zip(losses, cells, strict=True)))
    console.print(table)


if __name__ == "__main__":
    main()
