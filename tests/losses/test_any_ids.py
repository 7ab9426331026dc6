"""Ids and labels are only compared, so that those at both ends of int64 give the results of small ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from spread import part_of, sizes_of, start
from torch import Tensor

import fused_contrastive as fc

WORLD, N = 3, 13
LIMITS = torch.iinfo(torch.int64)
# They replace the small ids 0, 1, 2 ...: the ends of int64, their neighbours, and a number whose double overflows.
LARGE = (LIMITS.min, LIMITS.max, LIMITS.min + 1, LIMITS.max - 1, 0, -1, 1 << 62)


def rows_of(stats: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([t.clamp_min(-50) for t in stats]).sum()  # -inf for a row without negatives


# Each is computed from a process's own rows of x, y and ids; the results of all processes are then added.
CALLS: dict[str, Callable[..., Tensor]] = {
    "contrastive_stats": lambda x, y, a, b, **how: rows_of(
        fc.contrastive_stats(x, y, 5.0, row_ids=a, col_ids=b, **how)
    ),
    "sigmoid_stats": lambda x, y, a, b, **how: rows_of(fc.sigmoid_stats(x, y, 5.0, row_ids=a, col_ids=b, **how)),
    "self_stats": lambda x, y, a, b, **how: rows_of((fc.self_stats(x, 5.0, ids=a, **how),)),
    "self_stats, only": lambda x, y, a, b, **how: rows_of((fc.self_stats(x, 5.0, ids=b, equal_ids="only", **how),)),
    "info_nce": lambda x, y, a, b, **how: fc.info_nce_loss(x, y, row_ids=a, col_ids=b, reduction="sum", **how),
    "siglip": lambda x, y, a, b, **how: fc.siglip_loss(x, y, 5.0, -1.0, row_ids=a, col_ids=b, reduction="sum", **how),
    "supcon": lambda x, y, a, b, **how: fc.supcon_loss(x + y, a, reduction="sum", **how),
    "supcon, in": lambda x, y, a, b, **how: fc.supcon_loss(x + y, b, variant="in", reduction="sum", **how),
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """x and y (N, 8), and ids of their rows; the smallest and the largest id occur in every process."""
    generator = torch.Generator("cpu").manual_seed(0)
    features = [torch.randn(N, 8, generator=generator, dtype=dtype, device="cpu") for _ in range(2)]
    ids = [torch.randint(len(LARGE), (N,), generator=generator, device="cpu") for _ in range(2)]
    for each in ids:
        each[::3], each[1::3] = 0, 1
    return [F.normalize(t, dim=1) for t in features], ids


def large(ids: Tensor) -> Tensor:
    return torch.tensor(LARGE, device="cpu")[ids]


def step(call: Callable[..., Tensor], features: list[Tensor], ids: list[Tensor], **how: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in features]
    value = call(*leaves, *ids, **how)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True))]


@pytest.mark.parametrize("name", CALLS)
def test_one_process(name: str, backend: str) -> None:
    features, ids = problem(torch.float32)
    here = torch.empty(0).device
    features, small = [t.to(here) for t in features], [t.to(here) for t in ids]
    ends = [large(t).to(here) for t in ids]
    expected = step(CALLS[name], features, small, backend=backend)
    assert expected[0].isfinite()
    for found, right in zip(step(CALLS[name], features, ends, backend=backend), expected, strict=True):
        assert torch.equal(found, right)


def work(rank: int, folder: str) -> None:
    start(rank, WORLD, folder)
    sizes = sizes_of(N, "even", WORLD)
    features, ids = problem()
    own = [part_of(t, sizes, rank) for t in features]
    own_ids = [part_of(large(t), sizes, rank) for t in ids]
    found = {}
    for exchange in ("gather", "ring"):
        group = fc.GlobalBatch(exchange=exchange, gradients="sum")
        found[exchange] = {name: step(call, own, own_ids, group=group) for name, call in CALLS.items()}
    torch.save(found, f"{folder}/{rank}.pt")


def test_over_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder,), nprocs=WORLD)
        parts = [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]
    features, ids = problem()
    for name, call in CALLS.items():
        whole, *gradients = step(call, features, ids)
        for exchange in ("gather", "ring"):
            of_ranks = [part[exchange][name] for part in parts]
            value = sum(of_rank[0] for of_rank in of_ranks) if "stats" in name else of_ranks[0][0]
            context = f"{name}, {exchange}"
            torch.testing.assert_close(value, whole, rtol=1e-9, atol=1e-9, msg=lambda m, c=context: f"{c}: {m}")
            for k, gradient in enumerate(gradients, start=1):
                found = torch.cat([of_rank[k] for of_rank in of_ranks])
                torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9, msg=lambda m, c=context: f"{c}: {m}")
