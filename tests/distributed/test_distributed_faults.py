"""If processes disagree, or one fails, dies or has NaN, all of them get an error or NaN, and none hangs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
from spread import start
from torch import Tensor

import fused_contrastive as fc

WORLD = 3
LIMIT = 30  # seconds; a process that waits for others takes longer


def features(n: int = 4, d: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, dtype=dtype, requires_grad=True)


def scenarios(rank: int) -> dict[str, Callable[[], Tensor]]:
    """What this process calls in each scenario; process 1 differs from the others."""
    odd = rank == 1
    group = fc.GlobalBatch()

    def clip(*sizes: int, **options: Any) -> Callable[[], Tensor]:
        dtype = options.pop("dtype", torch.float32)
        group_ = options.pop("group", group)
        x, y = (features(*sizes, dtype=dtype) for _ in range(2))
        return lambda: fc.clip_loss(x, y, 10.0, group=group_, **options)

    return {
        "D": clip(4, 6 if odd else 8),
        "dtype": clip(dtype=torch.float64 if odd else torch.float32),
        "an option": clip(decoupled=odd, reduction="sum" if odd else "mean"),
        "exchange": clip(group=fc.GlobalBatch(exchange="ring" if odd else "gather")),
        "which loss": (lambda: fc.nt_xent_loss(features(), features(), normalize=True, group=group)) if odd else clip(),
        "requires_grad": (lambda: fc.clip_loss(features().detach(), features(), 10.0, group=group)) if odd else clip(),
        "bad input": (lambda: fc.clip_loss(features(4), features(5), 10.0, group=group)) if odd else clip(),
        "targets": lambda: fc.info_nce_loss(
            features(), features(), targets=torch.tensor([0, 1, 2, 12 if odd else 11]), group=group
        ),
        "more rows than columns": lambda: fc.contrastive_stats(features(5), features(4), group=group).pos.sum(),
        "nobody has a row": lambda: fc.clip_loss(features(0), features(0), 10.0, group=group),
        "NaN": lambda: fc.clip_loss(features() * (torch.nan if odd else 1), features(), 10.0, group=group),
        "empty": lambda: fc.clip_loss(features(0 if odd else 4), features(0 if odd else 4), 10.0, group=group),
    }


def work(rank: int, folder: str) -> None:
    start(rank, WORLD, folder)
    outcomes = {}
    for name, call in scenarios(rank).items():
        before = time.monotonic()
        try:
            loss = call()
            loss.backward()
            outcome = str(loss.item())
        except (TypeError, ValueError, RuntimeError) as error:
            outcome = f"{type(error).__name__}: {error}"
        outcomes[name] = (outcome, time.monotonic() - before)
    torch.save(outcomes, f"{folder}/{rank}.pt")


EXPECTED = {
    "D": "ValueError: group: the processes of clip_loss disagree on D: rank 0 has 8, rank 1 has 6, rank 2 has 8",
    "dtype": "disagree on dtype: rank 0 has 'torch.float32', rank 1 has 'torch.float64'",
    "an option": "disagree on decoupled: rank 0 has False, rank 1 has True, rank 2 has False; reduction: rank 0 has",
    "exchange": "disagree on exchange: rank 0 has 'gather', rank 1 has 'ring'",
    "which loss": "group: the processes call different losses: rank 0 has clip_loss, rank 1 has nt_xent_loss",
    "requires_grad": "disagree on requires_grad: rank 0 has [True, True, False, False, False], rank 1 has [Fal",
    "bad input": "text_features: got 5 rows, expected 4, as many as image_features",
    "targets": "ValueError: targets: rank 1 has values from 0 to 12, expected 0 to 11",
    "more rows than columns": "ValueError: targets: got None for 15 rows and 12 columns of all processes",
    "nobody has a row": "ValueError: clip_loss: got no row in any of 3 processes",
    "NaN": "nan",
}


def test_all_processes_hear_of_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, (folder,), nprocs=WORLD)
        outcomes = [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]
    for name, message in EXPECTED.items():
        for rank in range(WORLD):
            outcome, seconds = outcomes[rank][name]
            assert message in outcome, f"{name}, rank {rank}"
            assert seconds < LIMIT
    for rank in (0, 2):
        assert "another process's input was refused: rank 1: ValueError" in outcomes[rank]["bad input"][0]
    losses = {outcomes[rank]["empty"][0] for rank in range(WORLD)}
    assert len(losses) == 1
    assert float(losses.pop()) > 0


def die(rank: int, folder: str, backward: bool) -> None:
    start(rank, 2, folder)
    torch.manual_seed(rank)
    x, y = features(), features()
    if rank == 1 and not backward:
        os._exit(7)
    loss = fc.clip_loss(x, y, 10.0, group=fc.GlobalBatch())
    if rank == 1:
        os._exit(7)
    try:
        loss.backward()
    except RuntimeError:
        torch.save(True, f"{folder}/heard.pt")
        raise


@pytest.mark.parametrize("backward", [False, True], ids=["before the loss", "before the backward"])
def test_a_process_that_dies_is_an_error_in_the_others(backward: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        both = [processes.context.Process(target=die, args=(rank, folder, backward)) for rank in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(processes.HANGS)
        assert both[1].exitcode == 7
        assert both[0].exitcode == 1  # an exception
        assert os.path.exists(f"{folder}/heard.pt") == backward


def test_bad_groups() -> None:
    with pytest.raises(TypeError, match="group: got str, expected a torch"):
        fc.clip_loss(features(), features(), 1.0, group="world")
    with pytest.raises(RuntimeError, match=r"group: torch\.distributed is not initialised"):
        fc.clip_loss(features(), features(), 1.0, group=fc.GlobalBatch())
    with pytest.raises(ValueError, match="exchange: got 'tree', expected one of 'auto', 'gather', 'ring'"):
        fc.GlobalBatch(exchange="tree")
    with pytest.raises(ValueError, match="gradients: got 'none', expected one of 'mean', 'sum'"):
        fc.GlobalBatch(gradients="none")
