"""The loss of a batch spread over processes: time and bytes, beside what open_clip's flags compute.

    python benchmarks/distributed.py [--world 4] [--n 1024] [--dim 512]

``eager`` is open_clip's ClipLoss(local_loss=True, gather_with_grad=True), written out: both feature matrices gathered
with gradients, each process's images against all texts and texts against all images. Values and gradients are compared
before anything is timed. Processes have one thread each; bytes are what one process sends, counted at the collectives.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_contrastive import GlobalBatch, clip_loss
from fused_contrastive.bench.provenance import line, provenance
from fused_contrastive.bench.timing import quantile
from traffic import SentBytes, as_open_clip

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(exchange: str, **options: Any) -> Loss:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return clip_loss(x, y, scale, group=GlobalBatch(exchange=exchange), **options)  # type: ignore[arg-type]

    return loss


LOSSES: dict[str, Loss] = {
    "eager": as_open_clip,
    "ours, gather": ours("gather"),
    "ours, gather, memory_budget=0": ours("gather", memory_budget=0),
    "ours, ring": ours("ring"),
}


def step(loss: Loss, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def work(rank: int, world: int, n: int, dim: int, seconds: float, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)
    leaves = [F.normalize(torch.randn(n, dim), dim=1).requires_grad_() for _ in range(2)]
    leaves.append(torch.tensor(20.0, requires_grad=True))
    expected = step(as_open_clip, leaves)
    mean = torch.stack([expected[0], expected[3]])
    dist.all_reduce(mean)
    sent: dict[str, float] = {}
    for name, loss in LOSSES.items():
        with SentBytes() as counter:
            found = step(loss, leaves)
        sent[name] = counter.total
        if loss is not as_open_clip:
            scale = found[3].clone()
            dist.all_reduce(scale)
            torch.testing.assert_close(found[0], mean[0] / world, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scale, mean[1], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found[1:3], expected[1:3], rtol=1e-3, atol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    rounds = torch.tensor(0)
    start = time.perf_counter()
    while rounds < 5 or bool(_from_first(torch.tensor(time.perf_counter() - start < seconds))):
        for name, loss in LOSSES.items():
            dist.barrier()
            before = time.perf_counter()
            step(loss, leaves)
            dist.barrier()
            times[name].append(time.perf_counter() - before)
        rounds += 1
    if rank == 0:
        torch.save((times, sent), f"{folder}/result.pt")
    dist.destroy_process_group()


def _from_first(value: Tensor) -> Tensor:
    value = value.to(torch.uint8)
    dist.broadcast(value, 0)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=4, help="processes")
    parser.add_argument("--n", type=int, default=1024, help="rows of each")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.world, options.n, options.dim, options.seconds, folder)
        torch.multiprocessing.spawn(work, arguments, nprocs=options.world)
        times, sent = torch.load(f"{folder}/result.pt")
    console = Console()
    console.print(line(provenance()))
    table = Table(title=f"{options.world} processes of {options.n} rows, D = {options.dim}, fp32, forward + backward")
    for heading in ("", "ms: median (20%..80%)", "eager's time / this", "MB sent", "of eager's"):
        table.add_column(heading, justify="right")
    first = next(iter(LOSSES))
    for name in LOSSES:
        low, middle, high = (1e3 * quantile(times[name], q) for q in (0.2, 0.5, 0.8))
        ratio = 1e3 * quantile(times[first], 0.5) / middle
        table.add_row(
            name, f"{middle:.0f} ({low:.0f}..{high:.0f})", f"{ratio:.2f}", f"{sent[name] / 1e6:.2f}",
            f"{sent[name] / sent[first]:.2f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
