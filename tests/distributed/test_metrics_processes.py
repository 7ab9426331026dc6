"""Metrics over processes: each has the ranks of its own rows and columns among the negatives of all."""

from __future__ import annotations

import tempfile

import processes
import pytest
import torch
from seeds import SEED
from spread import start
from torch import Tensor

import fused_contrastive as fc

ROWS = (3, 6, 4)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(sum(ROWS), 8, generator=generator) for _ in range(2))
    return x, y


def calls(x: Tensor, y: Tensor, group: object) -> list[tuple[Tensor, fc.Metrics]]:
    options = {"metrics": True, "group": group}
    return [
        fc.clip_loss(x, y, 3.0, **options),
        fc.clip_loss(x, y, 3.0, hardness=0.5, **options),
        fc.info_nce_loss(x, y, logit_scale=3.0, **options),
        fc.siglip_loss(x, y, 3.0, -2.0, **options),
        fc.nt_xent_loss(x, y, logit_scale=3.0, normalize=True, **options),
    ]


def work(rank: int, folder: str, exchange: str, seed: int) -> None:
    start(rank, len(ROWS), folder)
    own = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    x, y = (t[own] for t in batch(seed))
    torch.save(calls(x, y, fc.GlobalBatch(exchange=exchange)), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_ranks_are_those_of_the_whole_batch(exchange: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder, exchange, SEED), nprocs=len(ROWS))
        of_ranks = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(len(ROWS))]
    whole = calls(*batch(SEED), None)
    for k, (loss, metrics) in enumerate(whole):
        parts = [found[k] for found in of_ranks]
        for found, _ in parts:
            torch.testing.assert_close(found, loss)
        for name, value in metrics._asdict().items():
            of_parts = [getattr(part, name) for _, part in parts]
            if value is None:
                assert of_parts == [None] * len(ROWS)
                continue
            if len(value) == 2 * sum(ROWS):  # NT-Xent: each process has both views of its samples
                views = [part.chunk(2) for part in of_parts]
                together = torch.cat([*(first for first, _ in views), *(second for _, second in views)])
            else:
                together = torch.cat(of_parts)
            torch.testing.assert_close(together, value)
