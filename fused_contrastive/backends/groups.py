"""Groups: many independent problems, whose rows and columns follow each other, in one call of a backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core.spec import OF_COLS, OF_ROWS, Forward, Gradients, Needs, StatsSpec, Upstream

if TYPE_CHECKING:
    from fused_contrastive.backends.contract import Backend


class Group(NamedTuple):
    """One group's rows and columns, and its problem."""

    rows: slice
    cols: slice
    spec: StatsSpec


def of(spec: StatsSpec) -> Iterator[Group]:
    """The groups of a problem, each as a problem of its own."""
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
        yield Group(rows, cols, spec._replace(row_lengths=None, col_lengths=None, **own))
        row, col = row + m, col + n


def stats_forward(backend: Backend, spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
    """``backend.stats_forward``, group by group if the backend does not take such groups together."""
    if spec.row_lengths is None or backend.takes_groups(spec):
        return backend.stats_forward(spec, x, y)
    found = [backend.stats_forward(each.spec, *_features(each, x, y)) for each in of(spec)]
    shape, dtype = backend.kept(0, y.shape[0], x.dtype)
    pos, row, col = (torch.cat(parts) for parts in list(zip(*found, strict=True))[:3])
    return Forward(pos, row, col, x.new_empty(shape, dtype=dtype))


def stats_backward(
    backend: Backend, spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
) -> Gradients:
    """``backend.stats_backward``, likewise."""
    if spec.row_lengths is None or backend.takes_groups(spec):
        return backend.stats_backward(spec, x, y, saved=saved, upstream=upstream, needs=needs)
    found = []
    pos, row, col = upstream
    for each in of(spec):
        of_rows = saved.row[each.rows]
        own = Forward(of_rows, of_rows, saved.col[each.cols], saved.kept)
        arriving = Upstream(_part(pos, each.rows), _part(row, each.rows), _part(col, each.cols))
        found.append(
            backend.stats_backward(each.spec, *_features(each, x, y), saved=own, upstream=arriving, needs=needs)
        )
    dx, dy, dscale, dbias = zip(*found, strict=True)
    one_bias = spec.col_bias is not None and spec.col_bias.dim() == 0
    return Gradients(_together(dx), _together(dy), _sum(dscale), (_sum if one_bias else _together)(dbias))


def _features(group: Group, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    of_rows = x[group.rows]
    return of_rows, of_rows if y is x else y[group.cols]


def _part(t: Tensor | None, part: slice) -> Tensor | None:
    return t if t is None or t.dim() == 0 else t[part]


def _together(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [t for t in parts if t is not None]
    return torch.cat(there) if there else None


def _sum(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [t for t in parts if t is not None]
    return torch.stack(there).sum(dim=0) if there else None
