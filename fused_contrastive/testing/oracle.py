"""The textbook formulas on the materialised matrix, in whatever dtype they are given.

In float64 they are the oracle every backend is measured against; in the features' own dtype they are eager PyTorch,
whose error the budget allows. Independent of the backends: nothing here is shared with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Matmul(torch.autograd.Function):
    """a @ b and its gradients by blocks of sqrt(K) of the K terms: rounding grows with sqrt(K), not K.

    What eager PyTorch and the backends sum in float64 would else be measured against sums no better: with D = 1, a
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


def _oracle_logits(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
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


def stats(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    targets: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude_self: bool = False,
    form: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """pos (M,), row (M,), col (N,) of contrastive_stats. ``form`` None is the oracle, else one of ``LOGITS``."""
    m, n = len(x), len(y)
    logits = (LOGITS[form] if form else _oracle_logits)(x, y, scale)
    if col_bias is not None:
        logits = logits + col_bias
    i = torch.arange(m, device=x.device)
    t = i if targets is None else targets
    excluded = torch.zeros(m, n, dtype=torch.bool, device=x.device)
    excluded[i, t] = True
    if row_ids is not None and col_ids is not None:
        excluded |= row_ids[:, None] == col_ids[None, :]
    if exclude_self:
        excluded |= i[:, None] == torch.arange(n, device=x.device)
    negatives = logits.masked_fill(excluded, -torch.inf)
    return logits[i, t], logsumexp(negatives, 1), logsumexp(negatives, 0)


def clip_eager(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    form: str | None = "rows",
) -> Tensor:
    """The CLIP loss as training code writes it; for DCL, the diagonal filled out of the denominator."""
    logits = (LOGITS[form] if form else _oracle_logits)(image_features, text_features, logit_scale)
    labels = torch.arange(len(logits), device=logits.device)
    if not decoupled:
        rows, cols = (
            F.cross_entropy(s, labels, label_smoothing=label_smoothing, reduction="none") for s in (logits, logits.T)
        )
    else:
        rows, cols = (_dcl(s, label_smoothing) for s in (logits, logits.T))
    loss = (rows + cols) / 2
    return _reduce(loss, reduction)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _dcl(logits: Tensor, label_smoothing: float) -> Tensor:
    n = len(logits)
    denominator = logsumexp(logits.masked_fill(torch.eye(n, dtype=torch.bool, device=logits.device), -torch.inf), 1)
    goal = (1 - label_smoothing) * logits.diagonal() + label_smoothing * logits.mean(dim=1)
    return denominator - goal


def clip_stable(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The same loss without cancellation when the positives dominate: the oracle, in float64."""
    if decoupled:
        return clip_eager(
            image_features,
            text_features,
            logit_scale,
            decoupled=True,
            label_smoothing=label_smoothing,
            reduction=reduction,
            form=None,
        )
    pos, row, col = stats(image_features, text_features, logit_scale)
    zero = pos.new_zeros(())
    loss = (torch.logaddexp(row - pos, zero) + torch.logaddexp(col - pos, zero)) / 2
    if label_smoothing:
        logits = _oracle_logits(image_features, text_features, logit_scale)
        loss = loss + label_smoothing * (pos - (logits.mean(dim=0) + logits.mean(dim=1)) / 2)
    return _reduce(loss, reduction)
