"""Loss and gradients in one walk over the rows of S, for losses that sum over rows alone.

Where a loss needs each row's own statistics only, the gradient of the row's logits is known, up to the gradient of the
loss itself, as soon as they are. A backend that has ``stats_at_once`` then forms the gradients of the features in the
forward: 3 products in all and nothing of S kept, where forward and backward take 4 or keep M * N products. What is left
of the backward is to multiply by the gradient of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import Needs, StatsSpec, compute_dtype
from fused_contrastive.ops import dispatch
from fused_contrastive.ops.schema import without_autocast
from fused_contrastive.ops.stats import Problem
from fused_contrastive.ops.transforms import second_backward

_BEFORE_SPEC = 2  # inputs of _AtOnce: x, y, the fields of the spec, and the three after them
_AFTER_SPEC = 3


def loss_at_once(
    problem: Problem,
    mean: bool,
    *,
    margin: float = 0.0,
    decoupled: bool = False,
    normalize: bool = False,
    **options: Any,
) -> Tensor | None:
    """The mean or sum over rows of ``softplus(row - (pos - margin))``, or of ``row - (pos - margin)`` where decoupled.

    With ``reduction="softplus"`` among the ``options``, which are fields of the StatsSpec, of ``row + softplus(-pos)``.
    ``normalize``: of the features divided by their lengths, which are made where they are read and never held; float32
    or float64. A scalar in the compute dtype; or None where it would save nothing, or cannot be had: no gradients are
    asked, the memory budget takes all products, the backend has no such walk, something traces or intercepts.
    """
    backend = dispatch.BACKENDS[problem.backend]
    if not hasattr(backend, "stats_at_once") or problem.group is not None or not problem.is_differentiable():
        return None
    x, m = problem.x, problem.x.shape[0]
    spec = problem.spec._replace(cols=False, **options)
    if not is_plain(x, problem.y, *spec):
        return None
    sums_at_once = spec.reduction == "softplus" and getattr(backend, "SUMS_AT_ONCE", False)
    if problem.rows_to_keep() == m and not sums_at_once:
        return None
    weight = 1 / m if mean else 1.0
    return _AtOnce.apply(x, problem.y, *spec, weight, (margin, decoupled, normalize), problem.backend)  # type: ignore[no-any-return, no-untyped-call]


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *rest: Any) -> Tensor:
        scale, targets, col_bias, row_ids, col_ids, *ctx.others = rest
        ctx.save_for_backward(x, y, scale, targets, col_bias, row_ids, col_ids)
        loss, ctx.gradients = _run(ctx, x, y, scale, targets, col_bias, row_ids, col_ids)
        return loss.to(compute_dtype(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # raises where the graph has been freed
        # They are handed out, scaled in place: a second backward through a retained graph forms them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _run(ctx, *saved)
        if g.device.type != "cpu" or g != 1:  # on a GPU the question would wait for it
            for t in gradients:
                if t is not None:
                    t.mul_(g)
        x, y, scale, _, col_bias, *_ = saved
        of = (x, y, scale, col_bias)
        dx, dy, dscale, dbias = (t if t is None else t.to(like.dtype) for t, like in zip(gradients, of, strict=True))
        if torch.is_grad_enabled():
            dx, dy, dscale, dbias = _Last.apply(dx, dy, dscale, dbias, *of)  # type: ignore[no-untyped-call]
        options = len(StatsSpec._fields) - 3 + _AFTER_SPEC
        return dx, dy, dscale, None, dbias, *(None,) * options


def _run(ctx: Any, x: Tensor, y: Tensor, *tensors: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    *fields, weight, how, backend = ctx.others
    spec = StatsSpec(*tensors, *fields)
    if spec.targets is not None:
        checks.target_range(spec.targets, y.shape[0])
    asked = ctx.needs_input_grad  # made anew each time
    needs = Needs(asked[0], asked[1], asked[2], asked[4])
    with without_autocast(x):
        return dispatch.BACKENDS[backend].stats_at_once(spec, x, y, weight, *how, needs)  # type: ignore[attr-defined, no-any-return]


class _Last(torch.autograd.Function):
    """Four gradients as they are, by what they are gradients of; their own gradient raises."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(t if t is None else t.view_as(t) for t in tensors[:4])

    backward = staticmethod(second_backward)
