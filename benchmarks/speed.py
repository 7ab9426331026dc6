"""Time of a loss, forward + backward, in u: the time of one product of all its similarities in the same process.

    python benchmarks/speed.py [--sizes 8 32 128 512 1024 4096 8192] [--dim 512] [--no-compile]
    python benchmarks/speed.py --loss nt_xent --sizes 4096 8192     # or info_nce, siglip

u is one N x N x D torch.mm, where N counts the rows of the matrix: for NT-Xent both views' of N / 2 samples. Every
implementation is checked against the float64 oracle's value before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import eager, features, interleaved, provenance, quantile
from fused_contrastive import clip_loss, info_nce_loss, nt_xent_loss, siglip_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Workload(NamedTuple):
    """One loss: the fused one, with options, and as training code writes it. (N, D), (N, D), scale -> loss."""

    ours: Callable[..., Tensor]
    eager: Loss


def nt_xent(x: Tensor, _: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """The rows of x are two views."""
    half = len(x) // 2
    return nt_xent_loss(x[:half], x[half:], 1 / scale, normalize=False, **options)


def nt_xent_eager(x: Tensor, _: Tensor, scale: Tensor) -> Tensor:
    own = torch.eye(len(x), dtype=torch.bool)
    logits = (scale * x @ x.T).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(x)).roll(len(x) // 2))


def info_nce(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return info_nce_loss(x, y, logit_scale=scale, **options)


def info_nce_eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)))


def siglip(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return siglip_loss(x, y, scale, -scale / 2, **options)


def siglip_eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(signs * (scale * x @ y.T - scale / 2)).sum() / len(x)


WORKLOADS = {
    "clip": Workload(clip_loss, eager),
    "info_nce": Workload(info_nce, info_nce_eager),
    "nt_xent": Workload(nt_xent, nt_xent_eager),
    "siglip": Workload(siglip, siglip_eager),
}


def implementations(work: Workload, compiled: bool) -> dict[str, Loss]:
    losses: dict[str, Loss] = {
        "ours, auto": work.ours,
        "ours, budget 0": lambda x, y, scale: work.ours(x, y, scale, memory_budget=0),
        "eager": work.eager,
    }
    if compiled:
        losses["torch.compile"] = torch.compile(work.eager, dynamic=False)
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
    parser.add_argument("--loss", choices=list(WORKLOADS), default="clip")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512, 1024, 4096, 8192])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=8.0, help="per size, at least 5 rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile(eager) out")
    options = parser.parse_args()

    console = Console(width=120)
    console.print(provenance())
    table = Table(title=f"{options.loss}, forward + backward, fp32, D = {options.dim}: median u (20%..80%)")
    work = WORKLOADS[options.loss]
    losses = implementations(work, not options.no_compile)
    for column in ("N", "u in ms", *losses):
        table.add_column(column, justify="right")
    for n in options.sizes:
        torch._dynamo.reset()
        leaves = features(n, options.dim)
        x, y = leaves[0].detach(), leaves[1].detach()
        with torch.no_grad():
            expected = work.eager(*(t.double() for t in leaves))
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
