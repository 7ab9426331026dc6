"""cached() over two processes: the gradients of the whole batch, reduced once a step."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spread import start
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fused_contrastive import GlobalBatch, cached, clip_loss

WORLD, STEPS, CHUNK = 2, 3, 3
SIZES = {"even": (6, 6), "ragged": (4, 11), "one empty": (7, 0)}  # rows of each process


class Encoder(nn.Module):
    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.extra = nn.Linear(5, 4) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        """The extra layer is used by some chunks only."""
        features = self.layers(x)
        if self.extra is not None and len(x) == CHUNK:
            features = features + self.extra(x)
        return F.normalize(features, dim=-1)


class Model(nn.Module):
    def __init__(self, encoders: int = 2, unused: bool = False) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(Encoder(unused) for _ in range(encoders))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.double()


Wrap = Callable[[nn.Module], nn.Module]
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {  # how many encoders, rows of the processes, options of DDP
    "two": (2, "even", {}),
    "two, ragged": (2, "ragged", {}),
    "one for both": (1, "ragged", {}),
    "one empty": (2, "one empty", {}),
    "unused parameters": (2, "ragged", {"find_unused_parameters": True}),
    "static graph": (2, "ragged", {"static_graph": True}),
}


def batches(sizes: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(STEPS):
        yield torch.randn(sum(sizes), 5, dtype=torch.float64), torch.randn(sum(sizes), 5, dtype=torch.float64)


def features(encoder: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([encoder(chunk) for chunk in x.split(CHUNK)])


def train(model: Model, encoders: Sequence[nn.Module], rank: int, sizes: tuple[int, ...], one_graph: bool) -> Any:
    """The parameters after each step; all chunks are kept in one graph, or it is ``cached``."""
    torch.manual_seed(0)
    data = list(batches(sizes))
    torch.manual_seed(rank)  # of the dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    history = []
    for batch in data:
        own = [t.split(sizes)[rank] for t in batch]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return clip_loss(x, y, model.log_scale.exp(), group=GlobalBatch())

        if one_graph:
            value = loss(*(features(encoder, x) for encoder, x in zip(encoders, own, strict=True)))
        else:
            value = cached(encoders, own, loss, CHUNK)
        optimizer.zero_grad()
        value.backward()
        for p in model.parameters() if one_graph else [model.log_scale]:
            dist.all_reduce(p.grad)
            p.grad /= WORLD
        optimizer.step()
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        history.append([value.item(), *(p.detach().clone() for p in whole)])
    return history


def replicas(model: Model, options: dict[str, Any], reductions: list[int]) -> list[DistributedDataParallel]:
    """Each encoder in DDP; every reduction of a bucket is noted."""

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, which are strings here
        reductions.append(bucket.index())
        return allreduce_hook(None, bucket)

    wrapped = [DistributedDataParallel(encoder, **options) for encoder in model.encoders]
    for replica in wrapped:
        replica.register_comm_hook(None, hook)
    return wrapped


def work(rank: int, folder: str) -> None:
    start(rank, WORLD, folder)
    results: dict[str, Any] = {}
    for name, (encoders, split, options) in CASES.items():
        torch.manual_seed(1)
        model = Model(encoders, "find_unused_parameters" in options)
        alone, reductions = copy.deepcopy(model), []
        wrapped = replicas(model, options, reductions)
        towers = 2 // encoders
        wanted = train(alone, [*alone.encoders] * towers, rank, SIZES[split], True)
        results[name] = train(model, wrapped * towers, rank, SIZES[split], False), wanted, len(reductions)

    torch.manual_seed(1)
    model = Model()
    alone, reductions = copy.deepcopy(model), []
    inner = replicas(model, {}, reductions)
    wanted = train(alone, alone.encoders, rank, SIZES["ragged"], True)
    nested = [nn.Sequential(replica, nn.Identity()) for replica in inner]
    results["inside a module"] = train(model, nested, rank, SIZES["ragged"], False), wanted, len(reductions)

    torch.manual_seed(1)
    model = Model()
    alone, mesh = copy.deepcopy(model), init_device_mesh("cpu", (WORLD,))
    for encoder in model.encoders:
        fully_shard(encoder, mesh=mesh)
    wanted = train(alone, alone.encoders, rank, SIZES["even"], True)
    results["FSDP2"] = train(model, model.encoders, rank, SIZES["even"], False), wanted, None

    torch.manual_seed(1)
    model, reductions = Model(), []
    wrapped = replicas(model, {}, reductions)
    with ExitStack() as stack:
        for replica in wrapped:
            stack.enter_context(replica.no_sync())
        own = [torch.randn(5, 5, dtype=torch.float64) for _ in range(2)]
        cached(wrapped, own, lambda x, y: clip_loss(x, y, 2.0, group=GlobalBatch()), CHUNK).backward()
    results["outer no_sync"] = len(reductions)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder,), nprocs=WORLD)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", [*CASES, "inside a module", "FSDP2"])
def test_training(case: str, results: list[dict[str, Any]]) -> None:
    """Three steps agree with a training that keeps all chunks in one graph and averages the gradients itself."""
    for found, wanted, reductions in (of_rank[case] for of_rank in results):
        for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, s=step: f"step {s}: {m}")
        if case != "FSDP2":
            encoders = CASES.get(case, (2,))[0]
            assert reductions == encoders * (STEPS + (case == "static graph"))  # which is reduced once more, at first


def test_outer_no_sync(results: list[dict[str, Any]]) -> None:
    """Inside ``no_sync`` nothing is reduced."""
    assert [of_rank["outer no_sync"] for of_rank in results] == [0, 0]
