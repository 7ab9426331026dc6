"""The statistics of nested prefixes of features (Matryoshka): the operator, and its one autograd formula.

With c_k the products of prefix k, times one over the norms of both prefixes if ``normalize``, and G_k the gradient of
``scale * c_k`` that the formula of one problem gives (ops/autograd.py), the columns that prefix k adds have

    dx = scale (sum over l >= k of F_l G_l) y,  dy likewise,   dscale = sum over k, i, j of G_k c_k,

where F_k G_k is G_k times those factors. With ``normalize``, x times ``scale sum over l >= k of f_l^2 sum_j G_l c_l``
is taken from dx, with f_l one over the norms: the part that would change the norms of the prefixes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core import checks, memory
from fused_contrastive.core.modes import is_plain, second_backward
from fused_contrastive.core.prefixes import Prefixes, PrefixNeeds, inverse_norms
from fused_contrastive.core.spec import Forward, StatsSpec, Upstream, compute_dtype, statistics_dtype
from fused_contrastive.ops import operands
from fused_contrastive.ops.dispatch import BACKENDS
from fused_contrastive.ops.problem import Problem
from fused_contrastive.ops.schema import library, without_autocast
from fused_contrastive.ops.transforms import register_formula, with_formula

_PROBLEM = (
    "Tensor x, Tensor y, Tensor scale, Tensor? targets, Tensor? row_ids, Tensor? col_ids, int[] dims, bool normalize, "
    "bool want_col, SymInt kept_rows, int kept_prefixes, str backend"
)
INPUTS = 12  # the number of arguments of prefixes_forward
library.define(f"prefixes_forward({_PROBLEM}) -> (Tensor pos, Tensor row, Tensor col, Tensor kept)")
library.define(
    "prefixes_backward(Tensor? g_pos, Tensor? g_row, Tensor? g_col, Tensor row, Tensor col, Tensor kept, "
    f"bool[] needs, {_PROBLEM}) -> (Tensor dx, Tensor dy, Tensor dscale)"
)


def _spec(
    scale: Tensor, targets: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None, want_col: bool,
    kept_rows: int,
) -> StatsSpec:  # fmt: skip
    return StatsSpec(scale, targets, row_ids=row_ids, col_ids=col_ids, want_col=want_col, kept_rows=kept_rows)


def _prepared(*problem: Any) -> tuple[StatsSpec, Prefixes, Tensor, Tensor, str]:
    x, y, scale, targets, row_ids, col_ids, dims, normalize, want_col, kept_rows, kept, backend = problem
    row, col = (inverse_norms(t, dims) if normalize else None for t in (x, y))
    spec = _spec(scale, targets, row_ids, col_ids, want_col, kept_rows)
    return spec, Prefixes(tuple(dims), row, col, kept), x, y, backend


def _forward(*problem: Any) -> Forward:
    spec, of, x, y, backend = _prepared(*problem)
    if spec.targets is not None:
        checks.target_range(spec.targets, y.shape[0])
    with torch.no_grad(), without_autocast(x):
        return BACKENDS[backend].prefixes_forward(spec, of, x, y)


def _backward_of_statistics(
    g_pos: Tensor | None, g_row: Tensor | None, g_col: Tensor | None, row: Tensor, col: Tensor, kept: Tensor,
    needs: list[bool], *problem: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Calls the backend. An operator must return tensors, so a gradient that is not needed has 0 elements."""
    spec, of, x, y, backend = _prepared(*problem)
    upstream = Upstream(g_pos, g_row, g_col if spec.want_col else None)
    with torch.no_grad(), without_autocast(x):
        found = BACKENDS[backend].prefixes_backward(
            spec, of, x, y, Forward(row, row, col, kept), upstream, PrefixNeeds(*needs)
        )
    dx, dy, dscale = (spec.scale.new_empty(0) if g is None else g for g in found)
    return dx, dy, dscale


def _forward_operator(*problem: Any) -> Forward:
    """For callers by torch.ops, whose operands nothing has checked."""
    operands.prefixes(*problem)
    return _forward(*problem)


def _backward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    g_pos, g_row, g_col, row, col, kept, needs, *problem = arguments
    operands.prefixes(*problem)
    operands.prefixes_saved(Forward(row, row, col, kept), Upstream(g_pos, g_row, g_col), needs, *problem)
    return _backward_of_statistics(*arguments)


library.impl("prefixes_forward", _forward_operator, "CompositeExplicitAutograd")
library.impl("prefixes_backward", _backward_operator, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_contrastive::prefixes_forward", lib=library)
def _fake_forward(x, y, scale, targets, row_ids, col_ids, dims, normalize, want_col, kept_rows, kept, backend):  # type: ignore[no-untyped-def]
    m, n, dtype = x.shape[0], y.shape[0], statistics_dtype(x.device)
    pos, row, col = (x.new_empty(len(dims), size, dtype=dtype) for size in (m, m, n if want_col else 0))
    shape = BACKENDS[backend].kept_of_prefixes(kept_rows, n, kept, x.dtype)
    return pos, row, col, x.new_empty(shape, dtype=compute_dtype(x.dtype))


@torch.library.register_fake("fused_contrastive::prefixes_backward", lib=library)
def _fake_backward(g_pos, g_row, g_col, row, col, kept, needs, x, y, scale, *rest):  # type: ignore[no-untyped-def]
    nothing = scale.new_empty(0)
    return tuple(t.new_empty(t.shape) if asked else nothing for t, asked in zip((x, y, scale), needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, targets, row_ids, col_ids, *ctx.options = inputs
    _, row, col, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(row, col, kept, x, y, scale, targets, row_ids, col_ids)


def _backward(ctx: Any, g_pos: Tensor | None, g_row: Tensor | None, g_col: Tensor | None, _: None) -> tuple[Any, ...]:
    if g_pos is None and g_row is None and g_col is None:
        return (None,) * INPUTS
    row, col, kept, *problem = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    direct = is_plain(problem[0]) and not torch.is_grad_enabled()
    run = _backward_of_statistics if direct else torch.ops.fused_contrastive.prefixes_backward
    found = run(g_pos, g_row, g_col, row, col, kept, needs, *problem, *ctx.options)
    return *(g if needed else None for g, needed in zip(found, needs, strict=True)), *(None,) * (INPUTS - 3)


_call = with_formula("prefixes_forward", _forward, _backward, _setup_context)
register_formula("prefixes_backward", second_backward)


def statistics(problem: Problem, dims: tuple[int, ...], want_col: bool) -> tuple[Tensor, Tensor, Tensor]:
    """pos (P, M), row (P, M) and col (P, N) or (P, 0) of a problem that has neither bias nor limits."""
    spec, backend = problem.spec, problem.backend
    inputs = problem.x, problem.y, spec.scale, spec.targets, spec.row_ids, spec.col_ids
    options = dims, problem.normalize, want_col, *_to_keep(problem, len(dims)), backend
    pos, row, col, _ = _call(*inputs, *options, differentiable=problem.is_differentiable())
    return pos, row, col


def _to_keep(problem: Problem, count: int) -> tuple[int, int]:
    """How many rows the forward keeps, and of how many of the longest prefixes: all rows of several, or some of one.

    The longest is kept first because it adds the most columns, whose products the backward then need not make again.
    """
    x, n, backend = problem.x, problem.y.shape[0], BACKENDS[problem.backend]
    if not problem.is_differentiable():
        return 0, 0
    known = type(x.shape[0]) is int and type(n) is int
    rows = 0
    for kept in range(count if known else 1, 0, -1):
        of_64 = backend.kept_of_prefixes(64, n, kept, x.dtype), compute_dtype(x.dtype)
        rows = memory.products_to_keep(x, n, lambda *_, of_64=of_64: of_64, problem.memory_budget)
        if kept == 1 or rows == x.shape[0]:
            break
    return rows, kept
