"""The loss of a batch spread over processes: time and bytes, compared with open_clip's.

    python -m benchmarks.distributed [--world 4] [--n 1024] [--dim 512]

``eager`` is open_clip's ClipLoss(local_loss=True, gather_with_grad=True), written out: both feature matrices gathered
with gradients, each process's images against all texts and texts against all images. Values and gradients are compared
before anything is timed. Processes have one thread each; bytes are what one process sends, counted at the collectives.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import line, provenance
from benchmarks.report import table
from benchmarks.timing import quantile
from fused_contrastive import GlobalBatch, clip_loss
from fused_contrastive.distributed import collectives

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class SentBytes:
    """In its ``with`` block, ``total`` counts bytes that this process sends, if collectives use ring algorithms."""

    def __enter__(self) -> SentBytes:
        self.total = 0.0
        self._originals: list[tuple[Any, str, Any]] = []
        world = dist.get_world_size()
        share = (world - 1) / world
        self._count(dist, "all_gather", lambda _, t, **__: t.nbytes * (world - 1))
        self._count(collectives, "all_gather_single", lambda _, t, **__: t.nbytes * (world - 1))
        self._count(dist, "all_reduce", lambda t, *_, **__: 2 * t.nbytes * share)
        self._count(dist, "all_to_all_single", lambda _, t, *__, **___: t.nbytes * share)
        self._count(dist, "scatter", lambda _, ts=None, *__, **___: sum(t.nbytes for t in ts or ()) * share)
        self._count(dist, "batch_isend_irecv", self._sends)
        return self

    @staticmethod
    def _sends(operations: list[dist.P2POp]) -> float:
        return sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)

    def _count(self, owner: Any, name: str, bytes_of: Callable[..., float]) -> None:
        original = getattr(owner, name)
        self._originals.append((owner, name, original))

        def call(*args: Any, **options: Any) -> Any:
            self.total += bytes_of(*args, **options)
            return original(*args, **options)

        setattr(owner, name, call)

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)


def as_open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss(local_loss=True, gather_with_grad=True), written out."""
    everyone_x = torch.cat(torch.distributed.nn.all_gather(x))
    everyone_y = torch.cat(torch.distributed.nn.all_gather(y))
    labels = torch.arange(len(x)) + dist.get_rank() * len(x)
    return (F.cross_entropy(scale * x @ everyone_y.T, labels) + F.cross_entropy(scale * y @ everyone_x.T, labels)) / 2


def ours(exchange: str, **options: Any) -> Loss:
    return functools.partial(clip_loss, group=GlobalBatch(exchange=exchange), **options)  # type: ignore[arg-type]


LOSSES: dict[str, Loss] = {
    "eager": as_open_clip,
    "ours, gather": ours("gather"),
    "ours, gather, memory_budget=0": ours("gather", memory_budget=0),
    "ours, ring": ours("ring"),
}


def step(loss: Loss, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def work(rank: int, world: int, n: int, dim: int, rounds: int, folder: str) -> None:
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
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            dist.barrier()
            before = time.perf_counter()
            step(loss, leaves)
            dist.barrier()
            times[name].append(time.perf_counter() - before)
    if rank == 0:
        torch.save((times, sent), f"{folder}/result.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=4, help="processes")
    parser.add_argument("--n", type=int, default=1024, help="rows of each process")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.world, options.n, options.dim, options.rounds, folder)
        torch.multiprocessing.spawn(work, arguments, nprocs=options.world)  # type: ignore[attr-defined, no-untyped-call]
        times, sent = torch.load(f"{folder}/result.pt")
    print(line(provenance()))
    rows = []
    for name in LOSSES:
        low, middle, high = (1e3 * quantile(times[name], q) for q in (0.2, 0.5, 0.8))
        ratios = 1e3 * quantile(times["eager"], 0.5) / middle, sent[name] / sent["eager"]
        ms, bytes_ = f"{middle:.0f} ({low:.0f}..{high:.0f})", f"{sent[name] / 1e6:.2f}"
        rows.append([name, ms, f"{ratios[0]:.2f}", bytes_, f"{ratios[1]:.2f}"])
    print(f"\n{options.world} processes of {options.n} rows, D = {options.dim}, fp32, forward + backward\n")
    print("\n".join(table(["", "ms: median (20%..80%)", "eager's time / this", "MB sent", "of eager's"], rows)))


if __name__ == "__main__":
    main()
