"""The primitive over a ring: a process holds two processes' columns, one block in use and the next one arriving.

Processes send to the next rank and receive from the one before. A block is one process's columns, padded to one more
than the largest process has. Padding columns are zeros with bias -inf, so that they add nothing to a sum; the last one
serves as the positive of rows whose positive is in another block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_contrastive.core.spec import (
    OF_COLS,
    Forward,
    Gradients,
    Needs,
    StatsSpec,
    Upstream,
    compute_dtype,
    empty,
    merged,
    statistics_dtype,
)
from fused_contrastive.distributed.shape import GlobalShape
from fused_contrastive.ops import schema


def forward(shape: GlobalShape, spec: StatsSpec, backend: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pos (m,), row (m,) and col (n,) of this process's rows and columns."""
    m = len(x)
    block, size = _block(shape, spec, y)
    of_pos, of_row, of_col = spec.shapes(m, size)
    pos = x.new_zeros(of_pos, dtype=statistics_dtype(x.device))
    row, col = empty(spec, of_row, x), empty(spec, of_col, x)
    for step in range(shape.world):
        waiting = None if step == shape.world - 1 else _pass_on(shape, block)
        here, part = _of_block(shape, spec, step, block)
        if m:
            found = schema.forward_within(part, x, block[0], backend)
            if here is not None:
                pos = torch.where(here, found.pos, pos)
            if spec.want_row:
                row = merged(spec, row, found.row)
            if spec.want_col:
                col = merged(spec, col, found.col)
        if spec.want_col:  # the last step returns it to its owner
            (col,) = _received(_pass_on(shape, [col]))
        if waiting is not None:
            block = _received(waiting)
    return pos, row, col[: len(y)].clone() if spec.want_col else col


def backward(
    shape: GlobalShape, spec: StatsSpec, backend: str, x: Tensor, y: Tensor, saved: tuple[Tensor, Tensor],
    upstream: Upstream,
) -> Gradients:  # fmt: skip
    """Gradients of this process's rows and columns; for scale, this process's rows' part of the gradient."""
    dtype, m = compute_dtype(x.dtype), len(x)
    row, col = saved
    block, size = _block(shape, spec, y)
    if spec.want_col:
        assert upstream.col is not None
        block += [_padded(col, size, 0.0), _padded(upstream.col, size, 0.0)]
    dx = torch.zeros_like(x, dtype=dtype)
    travelling = [y.new_zeros(size, y.shape[1], dtype=dtype), y.new_zeros(size, dtype=dtype)]
    dscale = x.new_zeros((), dtype=dtype)
    for step in range(shape.world):
        waiting = None if step == shape.world - 1 else _pass_on(shape, block)
        here, part = _of_block(shape, spec, step, block)
        if m:
            # A row's gradient of pos counts only in the block that has its positive.
            g_pos = None if upstream.pos is None or here is None else torch.where(here, upstream.pos, 0)
            columns = (block[-2], block[-1]) if spec.want_col else (col, None)
            found = schema.backward_within(
                part, x, block[0], Forward(row, row, columns[0], x.new_empty(0)),
                Upstream(g_pos, upstream.row, columns[1]), Needs(True, True, True, True), backend,
            )  # fmt: skip
            assert found.x is not None
            assert found.y is not None
            assert found.scale is not None
            assert found.col_bias is not None
            dx += found.x
            travelling[0] += found.y
            travelling[1] += found.col_bias
            dscale += found.scale
        travelling = _received(_pass_on(shape, travelling))
        if waiting is not None:
            block = _received(waiting)
    dy, dcol_bias = (t[: len(y)] for t in travelling)
    return Gradients(dx.to(x.dtype), dy.to(y.dtype), dscale, dcol_bias)


def _padded(values: Tensor, size: int, fill: float) -> Tensor:
    rest = values.shape[1:]
    return torch.cat((values, values.new_full((size - len(values), *rest), fill)))


def _block(shape: GlobalShape, spec: StatsSpec, y: Tensor) -> tuple[list[Tensor], int]:
    """The tensors of this process's columns that go round: features, bias, and those of a rule; and their length."""
    size, dtype = max(shape.cols) + 1, compute_dtype(y.dtype)
    bias = y.new_zeros(len(y), dtype=dtype) if spec.col_bias is None else spec.col_bias.detach()
    block = [_padded(y, size, 0.0), _padded(bias, size, -torch.inf)]
    return block + [_padded(getattr(spec, name), size, 0) for name in _others(spec)], size


def _others(spec: StatsSpec) -> list[str]:
    """The names of the columns' tensors that a rule of exclusion needs, such as ``col_ids``; not the bias."""
    return [name for name in OF_COLS if name != "col_bias" and getattr(spec, name) is not None]


def _of_block(shape: GlobalShape, spec: StatsSpec, step: int, block: list[Tensor]) -> tuple[Tensor | None, StatsSpec]:
    """Which rows have their positive in the block that is here at this step (None without positives), and the block's
    StatsSpec."""
    owner = (shape.rank - step) % shape.world
    here = targets = None
    if spec.targets is not None:
        place = spec.targets - sum(shape.cols[:owner])
        here = (place >= 0) & (place < shape.cols[owner])
        targets = torch.where(here, place, len(block[0]) - 1)
    others: dict[str, Any] = dict(zip(_others(spec), block[2:], strict=False))
    if spec.row_ids is not None:  # padding columns get an id that no row has
        others["col_ids"] = others["col_ids"].clone()
        others["col_ids"][shape.cols[owner] :] = _no_id_of(spec.row_ids.flatten())
    return here, spec._replace(targets=targets, col_bias=block[1], kept_rows=0, **others)


def _no_id_of(ids: Tensor) -> Tensor:
    """() a number from 0 to m that is none of the (m,) ids. The largest id plus one may overflow."""
    m = len(ids)
    taken = ids.new_zeros(m + 1, dtype=torch.int32)
    taken.index_fill_(0, torch.where((ids >= 0) & (ids < m), ids, m), 1)
    taken[m] = 0  # m ids cannot take all of m + 1 numbers
    return taken.argmin()


def _pass_on(shape: GlobalShape, tensors: list[Tensor]) -> tuple[list[Tensor], list[dist.Work]]:
    """Starts sending to the next process and receiving from the one before."""
    received = [torch.empty_like(t) for t in tensors]
    if shape.world == 1:
        return tensors, []
    group, world, rank = shape.group, shape.world, shape.rank
    after, before = (_global_rank(group, (rank + step) % world) for step in (1, -1))
    operations = [
        operation
        for ours, theirs in zip(tensors, received, strict=True)
        for operation in (
            dist.P2POp(dist.isend, ours.contiguous(), after, group),
            dist.P2POp(dist.irecv, theirs, before, group),
        )
    ]
    return received, dist.batch_isend_irecv(operations)


def _received(passing: tuple[list[Tensor], list[dist.Work]]) -> list[Tensor]:
    received, works = passing
    for work in works:
        work.wait()
    return received


def _global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
