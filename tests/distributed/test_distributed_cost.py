"""Counts the products that a process computes and the bytes that it sends, for this package and for open_clip."""

from __future__ import annotations

import sys
import tempfile

import processes
import pytest
import torch
import torch.nn.functional as F
from snippets import ROOT
from spread import start
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT))  # the benchmarks are not part of an installed package
import fused_contrastive as fc
from benchmarks.distributed import SentBytes, as_open_clip
from fused_contrastive.distributed import plan

WORLD, N, D = 4, 64, 32
BLOCK = 2 * N * (WORLD * N) * D  # flops of one process's block of S


def work(rank: int, folder: str) -> None:
    start(rank, WORLD, folder)
    torch.manual_seed(rank)
    leaves = [F.normalize(torch.randn(N, D), dim=1).requires_grad_() for _ in range(2)]
    leaves.append(torch.tensor(20.0, requires_grad=True))

    def ours(exchange: str):  # type: ignore[no-untyped-def]
        group = fc.GlobalBatch(exchange=exchange)
        return lambda x, y, s: fc.clip_loss(x, y, s, group=group, memory_budget=0, backend="reference")

    found = {}
    for name, loss in {"open_clip": as_open_clip, "gather": ours("gather"), "ring": ours("ring")}.items():
        with SentBytes() as sent, FlopCounterMode(display=False) as forward:
            value = loss(*leaves)
        with sent_again(sent), FlopCounterMode(display=False) as backward:
            gradients = torch.autograd.grad(value, leaves)
        found[name] = (forward.get_total_flops(), backward.get_total_flops(), sent.total, value, gradients)
    torch.save(found, f"{folder}/{rank}.pt")


class sent_again:  # noqa: N801
    """Continues a counter: its total is kept, and what is sent inside is added."""

    def __init__(self, counter: SentBytes) -> None:
        self.counter = counter

    def __enter__(self) -> None:
        self.before = self.counter.total
        self.counter.__enter__()

    def __exit__(self, *_: object) -> None:
        self.counter.__exit__()
        self.counter.total += self.before


@pytest.fixture(scope="module")
def counted() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder,), nprocs=WORLD)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


def test_products(counted: list[dict]) -> None:
    """The forward computes one block, open_clip's two. The backward computes it again, and two products of its size."""
    for of_rank in counted:
        forward, backward, *_ = of_rank["gather"]
        assert forward == BLOCK
        assert backward == 3 * BLOCK
        forward, backward, *_ = of_rank["open_clip"]
        assert forward == 2 * BLOCK
        assert backward == 4 * BLOCK
        forward, backward, *_ = of_rank["ring"]
        padded = BLOCK * (N + 1) / N  # the ring adds a row to each block
        assert forward == padded
        assert backward == 3 * padded


def test_bytes(counted: list[dict]) -> None:
    for of_rank in counted:
        theirs = of_rank["open_clip"][2]
        assert theirs == 4 * 4 * N * D * (WORLD - 1)  # it sends two matrices and their gradients, float32
        assert of_rank["gather"][2] <= 0.55 * theirs


def test_same_gradients(counted: list[dict]) -> None:
    for of_rank in counted:
        for name in ("gather", "ring"):
            torch.testing.assert_close(of_rank[name][4][:2], of_rank["open_clip"][4][:2], rtol=1e-4, atol=1e-6)


def test_the_plan_counts_the_same(counted: list[dict]) -> None:
    """The model's bytes of each strategy are those of a real step, but for a header and the reported loss."""
    machine = plan.Machine(flops=1e12, bandwidth=1e9, memory=1e9)
    planned = {cost.strategy: cost for cost in plan.costs(WORLD * N, D, WORLD, 4, machine)}
    for name in ("gather", "ring", "open_clip"):
        assert counted[0][name][2] == pytest.approx(planned[name].sent, rel=0.03), name
        blocks = sum(counted[0][name][:2]) / BLOCK
        assert planned[name].flops == pytest.approx(blocks * BLOCK, rel=0.02)
