"""What tests of metrics check of every call: its ranks, and that the loss and its gradients stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused_contrastive as fc

Expected = tuple[Tensor, ...]  # the positives, the hardest negatives, the least and the highest possible ranks


def check(metrics: fc.Metrics, rows: Expected, cols: Expected | None) -> None:
    positive, hardest, least, most = rows
    assert metrics.row_rank.dtype == torch.int64
    assert ((least <= metrics.row_rank) & (metrics.row_rank <= most)).all()
    torch.testing.assert_close(metrics.positive.double(), positive, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics.hardest_negative.double(), hardest, rtol=1e-5, atol=1e-5)
    assert (metrics.col_rank is None) == (cols is None)
    if cols is not None and metrics.col_rank is not None:
        assert ((cols[2] <= metrics.col_rank) & (metrics.col_rank <= cols[3])).all()
    assert not any(t.requires_grad for t in metrics if t is not None)


def same_step(loss: Callable[..., Any], *leaves: Tensor) -> None:
    """Checks that the loss and the gradients are the same with and without metrics."""
    steps = []
    for found in (loss(metrics=True)[0], loss()):
        steps.append((found.detach(), *torch.autograd.grad(found.sum(), leaves)))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
