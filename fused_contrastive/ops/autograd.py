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

from fused_contrastive.core import spec
from fused_contrastive.core.modes import is_plain, second_backward
from fused_contrastive.core.spec import StatsSpec
from fused_contrastive.ops import schema
from fused_contrastive.ops.transforms import register_formula, with_formula

SPEC, TENSORS = len(StatsSpec._fields), len(spec.TENSORS)
INPUTS = 2 + SPEC + 1  # stats_forward takes x, y, the problem's fields and the backend
SCALE, COL_BIAS = (2 + StatsSpec._fields.index(name) for name in ("scale", "col_bias"))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, *rest = inputs
    tensors, ctx.options = rest[:TENSORS], rest[TENSORS:]
    _, row, col, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.same = y is x
    ctx.save_for_backward(row, col, kept, x, y, *tensors)


def backward(ctx: Any, g_pos: Tensor | None, g_row: Tensor | None, g_col: Tensor | None, _: None) -> tuple[Any, ...]:
    if g_pos is None and g_row is None and g_col is None:
        return (None,) * INPUTS
    row, col, kept, x, y, *tensors = ctx.saved_tensors
    if ctx.same:
        y = x  # hooks on saved tensors may have unpacked two tensors
    asked = ctx.needs_input_grad  # each access makes a new tuple
    needs = [asked[0], asked[1], asked[SCALE], asked[COL_BIAS]]
    direct = is_plain(x) and not torch.is_grad_enabled()
    if direct and ctx.same and needs[0] and not needs[3]:
        needs = [True, False, needs[2], False, True]  # the gradients of x and y as one
    run = schema.stats_backward if direct else torch.ops.fused_contrastive.stats_backward
    gradients = run(g_pos, g_row, g_col, row, col, kept, needs, x, y, *tensors, *ctx.options)
    by_input: list[Any] = [None] * INPUTS
    for place, gradient, needed in zip((0, 1, SCALE, COL_BIAS), gradients, needs[:4], strict=True):
        by_input[place] = gradient if needed else None
    return tuple(by_input)


# The lambda looks the implementation up at each call, so that a test can replace it.
stats_forward = with_formula("stats_forward", lambda *inputs: schema.stats_forward(*inputs), backward, setup_context)
register_formula("stats_backward", second_backward)
