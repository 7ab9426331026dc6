"""Groups: many independent problems, whose rows and columns follow each other, in one call of a backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core.spec import OF_COLS, OF_ROWS, Forward, Gradients, Needs, StatsSpec, Upstream, empty

if TYPE_CHECKING:
    from fused_contrastive.backends.contract import Backend


class Group(NamedTuple):
    """One group's rows and columns, and its problem."""

    rows: slice
    cols: slice
    spec: StatsSpec


def of(spec: StatsSpec) -> Iterator[Group]:
    """The groups of a problem that have a pair, each as a problem of its own."""
    assert spec.row_lengths is not None
    assert spec.col_lengths is not None
    row = col = 0
    for m, n in zip(spec.row_lengths.tolist(), spec.col_lengths.tolist(), strict=True):
        rows, cols = slice(row, row + m), slice(col, col + n)
        own: dict[str, Any] = {
            name: _part(getattr(spec, name), part)
            for names, part in ((OF_ROWS, rows), (OF_COLS, cols))
            for name in names
        }
        if m and n:
            yield Group(rows, cols, spec._replace(row_lengths=None, col_lengths=None, **own))
        row, col = row + m, col + n


def stats_forward(backend: Backend, spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
    """``backend.stats_forward``, group by group if the backend does not take such groups together."""
    if spec.row_lengths is None or backend.takes_groups(spec):
        return backend.stats_forward(spec, x, y)
    pos, row, col = (empty(spec, shape, x) for shape in spec.shapes(x.shape[0], y.shape[0]))
    for rows, cols, own in of(spec):
        found = backend.stats_forward(own, *_features(rows, cols, x, y))
        pos[rows], row[rows], col[cols] = found[:3]
    shape, dtype = backend.kept(0, y.shape[0], x.dtype)
    return Forward(pos, row, col, x.new_empty(shape, dtype=dtype))


def stats_backward(
    backend: Backend, spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
) -> Gradients:
    """``backend.stats_backward``, likewise."""
    if spec.row_lengths is None or backend.takes_groups(spec):
        return backend.stats_backward(spec, x, y, saved=saved, upstream=upstream, needs=needs)
    inputs = (x, y, spec.scale, spec.col_bias)
    total = Gradients(
        *(torch.zeros_like(t) if t is not None and need else None for t, need in zip(inputs, needs[:4], strict=True))
    )
    for rows, cols, own in of(spec):
        normaliser = saved.row[rows]
        found = backend.stats_backward(
            own, *_features(rows, cols, x, y), saved=Forward(normaliser, normaliser, saved.col[cols], saved.kept),
            upstream=Upstream(*map(_part, upstream, (rows, rows, cols))), needs=needs,
        )  # fmt: skip
        for whole, gradient, part in zip(total, found, (rows, cols, rows, cols), strict=True):
            if whole is not None and gradient is not None:
                (whole[part] if whole.dim() else whole).add_(gradient)
    return total


def _features(rows: slice, cols: slice, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    of_rows = x[rows]
    return of_rows, of_rows if y is x else y[cols]


def _part(t: Tensor | None, part: slice) -> Tensor | None:
    return t if t is None or t.dim() == 0 else t[part]
