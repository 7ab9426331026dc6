"""Building blocks of the formulas in ``textbook``: several ways to write the logits, and a log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Matmul(torch.autograd.Function):
    """a @ b and its gradients, summed in blocks of sqrt(K) of the K terms: rounding grows with sqrt(K), not with K.

    Otherwise float64 results would be measured against sums that are no more exact than they are: with D = 1, a
    thousand equal terms round the same way each time (7e-14 of dy, against our 2e-14, by an 80-bit evaluation).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _blocked(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _blocked(g, b.T), _blocked(a.T, g)


def _blocked(a: Tensor, b: Tensor) -> Tensor:
    block = math.isqrt(a.shape[1]) + 1
    total = a.new_zeros(a.shape[0], b.shape[1])
    for left, right in zip(a.split(block, dim=1), b.split(block), strict=True):
        total += left @ right
    return total


def exact(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """scale * x @ y.T for float64, as the oracle computes it."""
    return scale * _Matmul.apply(x, y.T)  # type: ignore[no-any-return, no-untyped-call]


# Ways to write scale * x @ y.T, equal but for rounding: what eager code's error is measured on.
LOGITS: dict[str, Logits] = {
    "product": lambda x, y, scale: scale * (x @ y.T),
    "rows": lambda x, y, scale: (scale * x) @ y.T,
    "columns": lambda x, y, scale: x @ (scale * y).T,
    "reversed": lambda x, y, scale: scale * (x.flip(1) @ y.flip(1).T),
}


def logsumexp(logits: Tensor, dim: int) -> Tensor:
    """log sum exp, -inf with zero gradients (not NaN) where every logit is -inf."""
    any_left = (logits != -torch.inf).any(dim=dim)
    finite = torch.where(any_left.unsqueeze(dim), logits, 0)
    return torch.where(any_left, finite.logsumexp(dim=dim), -torch.inf)
