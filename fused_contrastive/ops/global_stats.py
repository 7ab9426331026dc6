"""The primitive over the processes of a group. Each has rows of x and of y; S has the rows and columns of all.

A process computes its own rows' block of S once. The rows' statistics are final; the columns' are merged over the
processes by two all-reduces of N numbers, or travel round the ring with the columns. In the backward a process gets the
gradients of all columns' statistics, makes its block of G once, and gives away its part of dy:

    gather    all-gather y             1 block of (n, N)      dy: all-to-all, summed
    ring      y passes by, a block     world blocks (n, n)    dy travels home with its block
              of columns at a time

Each block is the backend's own forward and backward, so the one autograd formula holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.memory import products_to_keep
from fused_contrastive.core.spec import (
    OF_COLS,
    Forward,
    Gradients,
    Needs,
    StatsSpec,
    Upstream,
    compute_dtype,
    empty,
    share_of,
    without_references,
)
from fused_contrastive.distributed.collectives import largest, merge_log_sums, reduce_scatter_rows
from fused_contrastive.distributed.shape import GlobalShape
from fused_contrastive.ops import ring, schema
from fused_contrastive.ops.dispatch import BACKENDS


class _Constants(NamedTuple):
    """What does not change from block to block, and is no tensor of the graph."""

    shape: GlobalShape
    spec: StatsSpec  # targets are columns of the whole matrix; ids and bias are this process's own
    budget: int | str
    backend: str


def global_stats(
    x: Tensor, y: Tensor, shape: GlobalShape, spec: StatsSpec, asked: dict[str, Any], budget: int | str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """pos (m,), row (m,) and col (n,) of this process's rows and columns; ``asked`` are fields of the spec.

    With ``upper`` too, the whole block of this process's rows is computed; ids or targets then exclude the diagonal.
    """
    spec = spec._replace(**{**asked, "upper": False})
    if spec.paired:
        spec = spec._replace(targets=shape.columns_of(spec.targets, x.device))
    if asked.get("upper") and spec.row_ids is None:
        first = shape.first_row
        own = torch.arange(first, first + len(x), device=x.device)
        spec = spec._replace(row_ids=own, col_ids=own)
    if spec.col_bias is not None and spec.col_bias.dim() == 0:
        spec = spec._replace(col_bias=spec.col_bias.expand(len(y)))
    constants = _Constants(shape, spec, budget, backend)
    stats = _Ring if shape.ring else _Gather
    pos, row, col = stats.apply(x, y, spec.scale, spec.col_bias, constants)  # type: ignore[no-untyped-call]
    return pos, row, col


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, col_bias: Tensor | None, constants: _Constants
    ) -> tuple[Tensor, ...]:
        shape = constants.shape
        everything = shape.gather(y)
        columns = len(everything)
        kept = 0
        if shape.differentiable and BACKENDS[constants.backend].keeps(constants.spec, x.dtype):
            kept = products_to_keep(x, columns, BACKENDS[constants.backend].kept, constants.budget)
        spec = constants.spec._replace(scale=scale, col_bias=col_bias, kept_rows=kept)
        of_cols = {name: getattr(spec, name) for name in OF_COLS}
        everywhere: dict[str, Any] = {name: shape.gather(t) for name, t in of_cols.items() if t is not None}
        spec = spec._replace(**everywhere)
        if spec.targets is not None and len(x):
            checks.target_range(spec.targets, columns)
        if len(x):
            pos, row, col, products = schema.forward_within(spec, x, everything, constants.backend)
        else:
            pos, row, col, products = _of_no_rows(spec, x, columns)
        if spec.want_col:
            col = _merged_over(shape, spec, col, x.dtype == torch.float64)
        ctx.set_materialize_grads(False)
        ctx.constants, ctx.spec, ctx.needs = constants, spec, ctx.needs_input_grad
        ctx.save_for_backward(x, everything, row, col, products)
        return pos, row, shape.own_cols(col).clone() if spec.want_col else col

    @staticmethod
    def backward(ctx: Any, g_pos: Tensor | None, g_row: Tensor | None, g_col: Tensor | None) -> tuple[Any, ...]:
        x, everything, row, col, products = ctx.saved_tensors
        spec, shape = ctx.spec, ctx.constants.shape
        sizes, rank = shape.cols, shape.rank
        if spec.want_col:
            g_col = shape.gather(_or_zeros(g_col, (sizes[rank], *col.shape[1:]), row))
        needs = Needs(ctx.needs[0], True, ctx.needs[2], spec.col_bias is not None)
        if len(x):
            saved, upstream = Forward(row, row, col, products), Upstream(g_pos, g_row if spec.want_row else None, g_col)
            dx, dy, dscale, dcol_bias = schema.backward_within(
                spec, x, everything, saved, upstream, needs, ctx.constants.backend
            )
        else:
            dx, dy, dscale, dcol_bias = _zeros(spec, x, everything)
        assert dy is not None
        dy = reduce_scatter_rows(dy, sizes, rank, shape.group)
        if dcol_bias is not None:
            dcol_bias = reduce_scatter_rows(dcol_bias, sizes, rank, shape.group)
        return dx, dy, dscale if ctx.needs[2] else None, dcol_bias if ctx.needs[3] else None, None


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, col_bias: Tensor | None, constants: _Constants
    ) -> tuple[Tensor, ...]:
        spec = constants.spec._replace(scale=scale, col_bias=col_bias)
        pos, row, col = ring.forward(constants.shape, spec, constants.backend, x, y)
        ctx.set_materialize_grads(False)
        ctx.constants, ctx.spec, ctx.needs = constants, spec, ctx.needs_input_grad
        ctx.save_for_backward(x, y, row, col)
        return pos, row, col

    @staticmethod
    def backward(ctx: Any, g_pos: Tensor | None, g_row: Tensor | None, g_col: Tensor | None) -> tuple[Any, ...]:
        x, y, row, col = ctx.saved_tensors
        if ctx.spec.want_col:
            g_col = _or_zeros(g_col, col.shape, row)
        dx, dy, dscale, dcol_bias = ring.backward(
            ctx.constants.shape, ctx.spec, ctx.constants.backend, x, y, (row, col),
            Upstream(g_pos, g_row if ctx.spec.want_row else None, g_col),
        )  # fmt: skip
        needs = ctx.needs
        return dx, dy, dscale if needs[2] else None, dcol_bias if needs[3] else None, None


def _or_zeros(gradient: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_zeros(shape) if gradient is None else gradient


def _of_no_rows(spec: StatsSpec, x: Tensor, columns: int) -> Forward:
    pos, row, col = (empty(spec, shape, x) for shape in spec.shapes(0, columns))
    return Forward(pos, row, col, pos)


def _merged_over(shape: GlobalShape, spec: StatsSpec, col: Tensor, exact: bool) -> Tensor:
    """The columns' statistic over the rows of all processes, from that over each process's rows."""
    if spec.is_ranked():
        whole = _merged_over(shape, without_references(spec), col[:, 0].contiguous(), exact)
        return torch.stack(
            (whole, shape.sum(col[:, 1].contiguous()), largest(col[:, 2].contiguous(), shape.group)), dim=1
        )
    parts = [part.contiguous() for part in col.unbind(dim=1)] if col.dim() == 2 else [col]
    if spec.statistic == "teacher":
        sums, mean, total = parts
        merged = merge_log_sums(total, exact, shape.group)
        mean = shape.sum(mean * share_of(total, merged))
        return torch.stack((merge_log_sums(sums, exact, shape.group), mean, merged), dim=1)
    if spec.equal_ids == "add":
        return torch.stack((merge_log_sums(parts[0], exact, shape.group), shape.sum(parts[1])), dim=1)
    return merge_log_sums(col, exact, shape.group)


def _zeros(spec: StatsSpec, x: Tensor, y: Tensor) -> Gradients:
    dtype = compute_dtype(x.dtype)
    bias = None if spec.col_bias is None else y.new_zeros(len(y), dtype=dtype)
    return Gradients(torch.zeros_like(x), torch.zeros_like(y), x.new_zeros((), dtype=dtype), bias)
