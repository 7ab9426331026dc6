"""From a problem to its loss, the last step of most losses. One of two ways is chosen here, and nowhere else.

A backend can form the gradients of the features in the forward if the loss is a sum over rows, each of which needs its
own statistics only, or if the memory budget holds all products: 3 products in all and one node of the graph, whose
backward only multiplies by the gradient of the loss. Otherwise the loss is made of the statistics, whose backward reads
the products that the memory budget kept, or makes them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import TENSORS, BackendName, RowLoss, compute_dtype
from fused_contrastive.distributed.shape import LocalShape, Shape
from fused_contrastive.ops import dispatch
from fused_contrastive.ops.correction import Correction, statistics
from fused_contrastive.ops.problem import Problem


def row_loss(
    problem: Problem,
    shape: Shape,
    reduction: Reduction,
    *,
    decoupled: bool = False,
    margin: float | Tensor = 0.0,
    weight: Tensor | None = None,
    own_logits: Tensor | None = None,
    smoothing: tuple[float, Tensor] | None = None,
    correction: Correction | None = None,
    **asked: Any,
) -> Tensor:
    """The loss of the rows, or the mean of the rows' and the columns': -log softmax at the positives, or SigLIP's sum.

    A row's loss is ``softplus(z + margin)``, with z its masked denominator minus its positive's logit; see
    ``cross_entropy``. For the softplus statistic it is ``row + softplus(-pos)``.

    Args:
        problem: the checked problem of this process.
        shape: what ``problem.agree`` returned.
        reduction: "mean", "sum" or "none"; over a group, of the rows of all processes.
        decoupled: leave the positive out of the denominator.
        margin: subtracted from the positives' logits; a number, () or (M,).
        weight: (M,) weights of the rows; the mean is over their sum, as in ``F.cross_entropy``.
        own_logits: (M, K) further negatives of each row, -inf for none.
        smoothing: the share of the target that is spread over all columns, and each row's mean logit over them, (M,).
        correction: of the sums over negatives.
        asked: fields of the StatsSpec. ``want_col`` asks for the columns' loss as well, of the first M.

    Returns:
        A scalar in the compute dtype, or (M,) with ``reduction="none"``.
    """
    asked = {"want_col": False, **asked}
    plain = weight is None and own_logits is None and smoothing is None and correction is None
    fused = plain and problem.spec.paired and reduction != "none" and isinstance(shape, LocalShape)
    if fused and not isinstance(margin, Tensor):
        each = RowLoss(0.5 if asked["want_col"] else 1.0, margin, decoupled)
        loss = in_the_forward(problem, each, reduction == "mean", asked)
        if loss is not None:
            return loss
    dtype = compute_dtype(problem.x.dtype)
    pos, row, col = statistics(problem, shape, correction, own_logits, asked)
    pos = pos - margin if isinstance(margin, Tensor) or margin else pos
    if asked.get("statistic") == "softplus":
        losses = row
        if problem.spec.paired:
            zero = pos.new_zeros(pos.shape[0])
            losses = row + cross_entropy(pos, zero, dtype=pos.dtype, reduction="none", backend=problem.backend)
        return reduced(losses, shape, reduction, weight).to(dtype)
    normalisers = (row, col) if asked["want_col"] else (row,)
    whole = plain and isinstance(shape, LocalShape)
    losses = cross_entropy(
        pos, *normalisers, dtype=dtype if whole else pos.dtype, decoupled=decoupled,
        reduction=reduction if whole else "none", backend=problem.backend,
    )  # fmt: skip
    if whole:
        return losses
    if smoothing is not None:
        share, mean_logit = smoothing
        losses = losses + share * (pos - mean_logit)
    return reduced(losses, shape, reduction, weight).to(dtype)


def reduced(losses: Tensor, shape: Shape, reduction: Reduction, weight: Tensor | None) -> Tensor:
    """(M,) losses -> the loss; with (M,) weights, the mean is over their sum."""
    if weight is None:
        return shape.reduce(losses, reduction)
    weight = weight.to(losses.dtype)  # the sum of half-precision weights may overflow
    return shape.reduce(losses * weight, reduction, shape.sum(weight.sum()))


def cross_entropy(
    pos: Tensor,
    *normalisers: Tensor,
    dtype: torch.dtype,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    backend: BackendName | str = "auto",
) -> Tensor:
    """-log softmax at the positives, the mean over the given directions.

    ``-log(e^pos / (e^pos + e^normaliser)) = softplus(normaliser - pos)``: the normalisers leave the positive out, so
    nothing cancels when it dominates. ``decoupled`` leaves it out of the denominator: ``normaliser - pos`` (Yeh et al.
    2022, "Decoupled Contrastive Learning").

    pos and each normaliser are (M,); the result is a scalar of ``dtype``, or (M,) with ``reduction="none"``. Where
    something traces, the plain formula is used, which a compiler can fuse.
    """
    name = "reference"
    if is_plain(pos):  # a named backend takes these vectors whatever dtype the features have
        name = dispatch.resolve(backend, pos.device, dtype if backend == "auto" else torch.float32)
    return dispatch.BACKENDS[name].cross_entropy(pos, normalisers, decoupled, reduction, dtype)


def in_the_forward(problem: Problem, loss: RowLoss, mean: bool, asked: dict[str, Any]) -> Tensor | None:
    """The loss, or its mean over the rows, with its gradients formed in the forward.

    None if that would save nothing, or is not possible.
    """
    x, y, m = problem.x, problem.y, problem.x.shape[0]
    if not (is_plain(x, y, *problem.spec[: len(TENSORS)]) and problem.is_differentiable()):
        return None
    spec = problem.spec._replace(kept_rows=problem.rows_to_keep(), **asked)
    if not dispatch.BACKENDS[problem.backend].fuses_loss(spec, m):
        return None
    if problem.normalize and x.dtype not in (torch.float32, torch.float64):
        problem.unit()
        x, y = problem.x, problem.y
    loss = loss._replace(weight=loss.weight / m if mean else loss.weight, normalize=problem.normalize)
    if spec.targets is not None:
        checks.target_range(spec.targets, spec.columns_of_rows(y.shape[0]))
    value, problem.ranks = dispatch.BACKENDS[problem.backend].row_loss(spec, x, y, loss)
    return value
