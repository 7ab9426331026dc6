"""The one autograd formula of the primitive.

With ``G[i, j] = g_row[i] exp(S[i, j] - row[i]) + g_col[j] exp(S[i, j] - col[j])`` where not excluded and
``G[i, t(i)] = g_pos[i]``:

    dx = scale G y,   dy = scale G^T x,   dscale = sum_i x_i . (G y)_i,   dcol_bias_j = sum_i G[i, j]

Every loss is differentiated through it; none has a backward of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import Forward, StatsSpec
from fused_contrastive.ops import dispatch, schema
from fused_contrastive.ops.transforms import register_formula, second_backward

INPUTS = 2 + len(StatsSpec._fields) + 1  # of stats_forward: x, y, the problem, the backend


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, targets, col_bias, row_ids, col_ids, *ctx.options = inputs
    _, row, col, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.same = y is x
    ctx.save_for_backward(x, y, scale, targets, col_bias, row_ids, col_ids, row, col, kept)


def backward(ctx: Any, g_pos: Tensor | None, g_row: Tensor | None, g_col: Tensor | None, _: None) -> tuple[Any, ...]:
    if g_pos is None and g_row is None and g_col is None:
        return (None,) * INPUTS
    x, y, scale, targets, col_bias, row_ids, col_ids, row, col, kept = ctx.saved_tensors
    if ctx.same:
        y = x  # hooks on saved tensors may have made two of one
    asked = ctx.needs_input_grad  # made anew each time
    needs = [asked[0], asked[1], asked[2], asked[4]]
    direct = is_plain(x) and not torch.is_grad_enabled()
    if direct and ctx.same and needs[0] and g_pos is None and not needs[3] and _adds_both(ctx.options):
        needs = [True, False, needs[2], False, True]
    run = schema.stats_backward if direct else torch.ops.fused_contrastive.stats_backward
    dx, dy, dscale, dcol_bias = run(
        g_pos, g_row, g_col, row, col, kept, needs, x, y, scale, targets, col_bias, row_ids, col_ids, *ctx.options
    )
    return (
        dx if needs[0] else None,
        dy if needs[1] else None,
        dscale if needs[2] else None,
        None,
        dcol_bias if needs[3] else None,
        *(None,) * (INPUTS - 5),
    )


def _adds_both(options: list[Any]) -> bool:
    """Whether the backend can give the gradient of x, where y is x, as one."""
    return getattr(dispatch.BACKENDS[options[-1]], "JOINT", False)


class _Eager(torch.autograd.Function):
    """The same implementation and formula without the dispatcher's Python layers, which cost 200 us a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Forward:
        # Calling setup_context here, not leaving it to Function.apply, saves it from inspecting the signature: 100 us.
        output = schema.stats_forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(backward)


def stats_forward(x: Tensor, *rest: Any, differentiable: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator: through torch.ops where something traces or intercepts, else directly."""
    if not is_plain(x, *rest):
        return torch.ops.fused_contrastive.stats_forward(x, *rest)  # type: ignore[no-any-return]
    return _Eager.apply(x, *rest) if differentiable else schema.stats_forward(x, *rest)  # type: ignore[no-untyped-call]


register_formula("stats_forward", backward, setup_context)
register_formula("stats_backward", second_backward)
