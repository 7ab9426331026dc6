"""The option ``reduction`` of PyTorch's losses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    """(M,) -> scalar, or (M,) for "none"."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
