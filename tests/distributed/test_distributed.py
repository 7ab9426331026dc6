"""The loss over processes: value and gradients are those of the whole batch in one process, under the error budget."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import processes
import pytest
import torch
import torch.distributed as dist
from seeds import SEED
from snippets import ROOT
from spread import SPLITS, evaluate, put_together, start
from torch.utils._python_dispatch import TorchDispatchMode

import fused_contrastive as fc
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import OPTIONS, Case
from fused_contrastive.testing.maker import Sizes

EXCHANGES = ("gather", "ring")


def all_cases(seed: int, world: int) -> list[tuple[Case, str, str]]:
    """Every loss and option; dtype, split and exchange alternate so that each pair of them occurs.

    Two processes run all cases, three run every second one and four every third.
    """
    cases = []
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    spread = ((loss, option) for loss, option in OPTIONS if {"groups", "dims"}.isdisjoint(option.split()))
    for k, (loss, option) in enumerate(spread):
        for j, exchange in enumerate(EXCHANGES):
            for i, split in enumerate(SPLITS):
                sizes = Sizes(13, 16, dtypes[(k + i + j) % 3], (1.0, 14.3, 100.0)[(k + i) % 3])
                cases.append((Case(loss, option, sizes, seed + k), split, exchange))
    return cases[seed % (world - 1) :: world - 1]


def work(rank: int, world: int, folder: str, seed: int) -> None:
    start(rank, world, folder)
    results = []
    for case, split, exchange in all_cases(seed, world):
        try:
            results.append(evaluate(case, split, rank, world, exchange))
        except Exception as error:
            raise RuntimeError(f"rank {rank}: {case} {split} {exchange}") from error
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_whole_batch(world: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (world, folder, SEED), nprocs=world)
        of_ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
    for (case, split, exchange), *parts in zip(all_cases(SEED, world), *of_ranks, strict=True):
        results = put_together(case, parts)
        for deviation in harness.deviations(case, "cpp", results=results):
            assert deviation.share <= 1, f"{world} processes, {split}, {exchange}, {case}: {deviation}"


def in_sub_groups(rank: int, folder: str) -> None:
    """Ranks 0 and 2 have one batch, 1 and 3 another, as in hybrid sharding."""
    start(rank, 4, folder)
    groups = [dist.new_group([k, k + 2]) for k in (0, 1)]
    own = rank % 2
    torch.manual_seed(own)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    mine = slice(0, 4) if rank < 2 else slice(4, 8)
    losses = [
        fc.clip_loss(x[mine], y[mine], 5.0, group=group).item()
        for group in (groups[own], *(fc.GlobalBatch(groups[own], exchange=exchange) for exchange in EXCHANGES))
    ]
    torch.save((losses, fc.clip_loss(x, y, 5.0).item()), f"{folder}/{rank}.pt")


def test_sub_groups() -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(in_sub_groups, (folder,), nprocs=4)
        results = [torch.load(f"{folder}/{rank}.pt") for rank in range(4)]
    for losses, expected in results:
        assert losses == pytest.approx([expected] * 3, rel=1e-6)
    assert results[0][1] != results[1][1]


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for values from a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        masked = func is torch.ops.aten.index.Tensor and any(t.dtype == torch.bool for t in args[1] if t is not None)
        self.count += masked or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def with_texts_of_any_length(rank: int, folder: str) -> None:
    """Process 0 has texts of 3 tokens, process 1 of 6."""
    start(rank, 2, folder)
    torch.manual_seed(0)
    images, texts = torch.randn(7, 4, 8), torch.randn(7, 6, 8)
    mask = torch.ones(7, 6, dtype=torch.bool)
    mask[:3, 3:] = False
    scale = torch.tensor(5.0)
    mine, length = (slice(0, 3), 3) if rank == 0 else (slice(3, 7), 6)
    results = []
    for whole in (False, True):
        x, y = (
            t.clone().requires_grad_() for t in ((images, texts) if whole else (images[mine], texts[mine, :length]))
        )
        options = {"text_mask": mask} if whole else {"group": fc.GlobalBatch(gradients="sum")}
        with Reads() as reads:
            loss = fc.filip_loss(x, y, scale, backend="reference", **options)
        dx, dy = torch.autograd.grad(loss, (x, y))
        results.append((loss.detach(), dx[mine] if whole else dx, dy[mine, :length] if whole else dy))
        assert not reads.count
    torch.save(results, f"{folder}/{rank}.pt")


def test_texts_of_any_length() -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(with_texts_of_any_length, (folder,), nprocs=2)
        for rank in range(2):
            found, expected = torch.load(f"{folder}/{rank}.pt")
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_torchrun() -> None:
    """The demo's training, started by torchrun in several processes, has at each step the loss of one process."""
    pytest.importorskip("emoji")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = str(ROOT / "examples/emoji_processes.py")
    options = ["--batch", "301", "--steps", "4", "--any-loss"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, example, *options], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout
