"""The arithmetic that losses share, on (M,) vectors of statistics."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core.spec import compute_dtype

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(normaliser: Tensor, pos: Tensor, *, decoupled: bool) -> Tensor:
    """-log softmax at the positive, from the denominator without it.

    ``-log(e^pos / (e^pos + e^normaliser)) = softplus(normaliser - pos)``: no cancellation when the positive
    dominates. ``decoupled`` leaves the positive out of the denominator: ``normaliser - pos``.

    softplus is written as -logsigmoid, which keeps full relative precision (``F.softplus`` turns linear above 20).
    """
    return normaliser - pos if decoupled else -F.logsigmoid(pos - normaliser)


def mean_logit(scale: float | Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(M,) mean of each row of ``scale * x @ y.T``, in closed form: ``scale * x_i . mean_j y_j``."""
    dtype = compute_dtype(x.dtype)
    return scale * (x.to(dtype) * y.to(dtype).mean(dim=0)).sum(dim=1)


def reduce(loss: Tensor, reduction: str, features: Tensor) -> Tensor:
    """(M,) -> scalar or (M,), in the dtype that losses of these features have."""
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(compute_dtype(features.dtype))
