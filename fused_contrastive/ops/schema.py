"""The operators' schemas, written once, their implementation by dispatch, and their fake kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.backends import groups
from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import (
    FIELDS,
    Forward,
    Gradients,
    Needs,
    StatsSpec,
    Upstream,
    autocast_enabled,
    for_backward,
    statistics_dtype,
)
from fused_contrastive.ops import operands
from fused_contrastive.ops.dispatch import BACKENDS

library = torch.library.Library("fused_contrastive", "DEF")

_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt"}  # the other fields are strings
_SPEC = ", ".join(f"{_KINDS.get(kind, 'str')} {name}" for name, kind in FIELDS.items())
_PROBLEM = f"Tensor x, Tensor y, {_SPEC}, str backend"
library.define(f"stats_forward({_PROBLEM}) -> (Tensor pos, Tensor row, Tensor col, Tensor kept)")
library.define(
    "stats_backward(Tensor? g_pos, Tensor? g_row, Tensor? g_col, Tensor row, Tensor col, Tensor kept, "
    f"bool[] needs, {_PROBLEM}) -> (Tensor dx, Tensor dy, Tensor dscale, Tensor dcol_bias)"
)


_NOTHING: AbstractContextManager[None] = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Turns autocast off: features have been cast before, and a backend's products stay in the compute dtype."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x.device) else _NOTHING


def stats_forward(x: Tensor, y: Tensor, *problem: Any) -> Forward:
    """Checks the values of the targets and calls the backend. ``problem``: a StatsSpec's fields, the backend."""
    *fields, backend = problem
    spec = StatsSpec(*fields)
    if spec.targets is not None:
        checks.target_range(spec.targets, spec.columns_of_rows(y.shape[0]))
    with without_autocast(x):
        return groups.stats_forward(BACKENDS[backend], spec, x, y)


def stats_backward(
    g_pos: Tensor | None,
    g_row: Tensor | None,
    g_col: Tensor | None,
    row: Tensor,
    col: Tensor,
    kept: Tensor,
    needs: list[bool],
    x: Tensor,
    y: Tensor,
    *problem: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Calls the backend. An operator must return tensors, so a gradient that is not needed has 0 elements."""
    *fields, backend = problem
    spec = StatsSpec(*fields)
    upstream = Upstream(
        g_pos if spec.paired else None, g_row if spec.want_row else None, g_col if spec.want_col else None
    )
    spec, saved, upstream = for_backward(spec, Forward(row, row, col, kept), upstream)
    with without_autocast(x):
        gradients = groups.stats_backward(
            BACKENDS[backend], spec, x, y, saved=saved, upstream=upstream, needs=Needs(*needs)
        )
    dx, dy, dscale, dcol_bias = (spec.scale.new_empty(0) if g is None else g for g in gradients)
    return dx, dy, dscale, dcol_bias


def _forward_operator(x: Tensor, y: Tensor, *problem: Any) -> Forward:
    """For callers by torch.ops, whose operands nothing has checked."""
    *fields, backend = problem
    operands.stats(x, y, StatsSpec(*fields), backend)
    return stats_forward(x, y, *problem)


def _backward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g_pos, g_row, g_col, row, col, kept, needs, x, y, *fields, backend = arguments
    spec, upstream = StatsSpec(*fields), Upstream(g_pos, g_row, g_col)
    operands.stats(x, y, spec, backend)
    operands.stats_saved(x, y, spec, Forward(row, row, col, kept), upstream, needs)
    return stats_backward(*arguments)


library.impl("stats_forward", _forward_operator, "CompositeExplicitAutograd")
library.impl("stats_backward", _backward_operator, "CompositeExplicitAutograd")


def forward_within(spec: StatsSpec, x: Tensor, y: Tensor, backend: str) -> Forward:
    """The forward inside an autograd function: by the backend, or by the operator where something intercepts."""
    if is_plain(x, y):
        with without_autocast(x):
            return BACKENDS[backend].stats_forward(spec, x, y)
    return Forward(*torch.ops.fused_contrastive.stats_forward(x, y, *spec, backend))


def backward_within(
    spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs, backend: str
) -> Gradients:
    """The backward inside an autograd function, likewise."""
    if is_plain(x, y):
        spec, saved, upstream = for_backward(spec, saved, upstream)
        with without_autocast(x):
            return BACKENDS[backend].stats_backward(spec, x, y, saved=saved, upstream=upstream, needs=needs)
    _, row, col, kept = saved
    gradients = torch.ops.fused_contrastive.stats_backward(*upstream, row, col, kept, needs[:4], x, y, *spec, backend)
    return Gradients(*(g if asked else None for g, asked in zip(gradients, needs[:4], strict=True)))


@torch.library.register_fake("fused_contrastive::stats_forward", lib=library)
def _fake_forward(x, y, *problem):  # type: ignore[no-untyped-def]
    *fields, backend = problem
    spec, m, n = StatsSpec(*fields), x.shape[0], y.shape[0]
    pos, row, col = (x.new_empty(shape, dtype=statistics_dtype(x.device)) for shape in spec.shapes(m, n))
    shape, dtype = BACKENDS[backend].kept(spec.kept_rows, n, x.dtype)
    return pos, row, col, x.new_empty(shape, dtype=dtype)


@torch.library.register_fake("fused_contrastive::stats_backward", lib=library)
def _fake_backward(g_pos, g_row, g_col, row, col, kept, needs, x, y, *problem):  # type: ignore[no-untyped-def]
    spec = StatsSpec(*problem[:-1])
    like = (x, y, spec.scale, spec.scale if spec.col_bias is None else spec.col_bias)
    nothing = spec.scale.new_empty(0)
    return tuple(t.new_empty(t.shape) if asked else nothing for t, asked in zip(like, needs, strict=True))
