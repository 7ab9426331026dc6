"""Launches the kernels of groups, forward and backward, each once for the rows and once for the columns.

The backward makes the products again for each of dx and dy, and for every GRADIENT_D columns of the features.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_contrastive.backends.triton import device, groups, launch, storage
from fused_contrastive.backends.triton.configs import Config
from fused_contrastive.backends.triton.problem import Prepared
from fused_contrastive.core.spec import (
    Forward,
    Gradients,
    Needs,
    StatsSpec,
    Upstream,
    starts,
    summed_like,
    without_references,
)

TILE = Config(64, 64, 32, warps=4, stages=2)
GRADIENT_D = 128  # columns of dx or dy that one program sums


def takes(spec: StatsSpec) -> bool:
    """Whether the kernels take all groups of such a problem in one launch. Other rules take one group at a time."""
    rows, cols = spec.row_lengths, spec.col_lengths
    assert rows is not None
    assert cols is not None
    limited = spec.row_limit is not None or spec.col_limit is not None
    if limited or spec.statistic == "teacher" or spec.equal_ids in ("apart", "add"):
        return False
    return rows.equal(cols) or not spec.exclude_self  # the kernels compare places among the rows of all groups


def table(spec: StatsSpec, axis: int, size: int, where: torch.device) -> Tensor:
    """(programs, 4) int64: where each program's tile begins, and its group ends, in rows and in columns.

    Equal groups are counted on the device itself, so that a CUDA graph can capture the call.
    """
    rows, cols = spec.row_lengths, spec.col_lengths
    assert rows is not None
    assert cols is not None
    lengths = [rows, cols]
    on = torch.device("cpu")
    total = int((-(-lengths[axis] // size)).sum())
    if bool((rows == rows[0]).all() and (cols == cols[0]).all()):
        on = where
        lengths = [torch.full(t.shape, int(t[0]), dtype=torch.int64, device=where) for t in lengths]
    tiles = -(-lengths[axis] // size)
    group = torch.arange(len(rows), device=on).repeat_interleave(tiles, output_size=total)
    begins = [starts(t)[group] for t in lengths]
    ends = [b + t[group] for b, t in zip(begins, lengths, strict=True)]
    begins[axis] = begins[axis] + size * (torch.arange(total, device=on) - starts(tiles)[group])
    return torch.stack((begins[0], ends[0], begins[1], ends[1]), dim=1).to(where)


class _Grouped:
    """What the launches of one problem share."""

    def __init__(self, spec: StatsSpec, x: Tensor, y: Tensor) -> None:
        if spec.upper:  # the whole of S: a program has all of a row
            spec = spec._replace(upper=False, exclude_self=True)
        if spec.paired:
            spec = spec._replace(targets=spec.positive_columns(len(x)))
        self.spec, self.p = spec, Prepared(spec, x, y)
        p = self.p
        mode = p.mode._replace(half=False, tma=False, one_bias=spec.col_bias is not None and spec.col_bias.dim() == 0)
        self.tables = [table(spec, axis, size, x.device) for axis, size in enumerate((TILE.block_m, TILE.block_n))]
        self.options = {"SOFTPLUS": p.softplus, "MODE": mode, "TILE": TILE, **(TILE.options | launch.UNFUSED)}

    def statistics(self, axis: int, pos: Tensor | None, out: Tensor) -> None:
        p = self.p
        if not len(self.tables[axis]):
            return
        groups.statistics[(len(self.tables[axis]),)](
            *p.multiplied, self.tables[axis], p.mask, pos, out, *p.sizes, AXIS=axis, **self.options
        )

    def gradients(
        self, axis: int, saved: Forward, g_row: Tensor | None, g_col: Tensor | None, bias: bool
    ) -> tuple[Tensor, Tensor]:
        """The sums over the negatives, (rows, D) float32, and those of G, (rows,)."""
        p, like = self.p, self.p.x
        count = p.n if axis else p.m
        out = torch.zeros(count, p.d, dtype=torch.float32, device=like.device)
        sums = torch.zeros(count if bias else 0, dtype=torch.float32, device=like.device)
        if (g_row is None and g_col is None) or not count:
            return out, sums
        width = min(GRADIENT_D, max(16, triton.next_power_of_2(p.d)))
        in_tf32 = p.source != "gemm" and p.device.architecture.startswith("sm_")
        groups.gradients[(len(self.tables[axis]), triton.cdiv(p.d, width))](
            *p.multiplied, self.tables[axis], p.mask, saved.row, g_row, saved.col, g_col, out, sums if bias else None,
            *p.sizes, AXIS=axis, PRECISION="tf32" if in_tf32 else "ieee", BD=width, **self.options,
        )  # fmt: skip
        return out, sums


def forward(spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
    shape, dtype = storage.layout(0, len(y), x.dtype)
    with device.current(x.device):
        problem = _Grouped(spec, x, y)
        problem.p.start_counts()
        # The rows' walk also finds the positives.
        all_of = without_references(spec)._replace(want_row=True).shapes(len(x), len(y))
        pos, row, col = (x.new_empty(each, dtype=torch.float64) for each in all_of)
        if spec.want_row or spec.paired:
            problem.statistics(0, pos if spec.paired else None, row)
        if spec.want_col:
            problem.statistics(1, None, col)
        row = problem.p.with_counts(row if spec.want_row else row.new_empty(0), 0)
        col = problem.p.with_counts(col, 1)
    return Forward(pos, row, col, x.new_empty(shape, dtype=dtype))


def backward(spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs) -> Gradients:
    if needs.joint:
        both = backward(spec, x, y, saved, upstream, needs._replace(y=True, joint=False))
        assert both.x is not None
        assert both.y is not None
        return both._replace(x=both.x + both.y, y=None)
    g_pos, g_row, g_col = (None if g is None else g.contiguous() for g in upstream)
    with device.current(x.device):
        problem = _Grouped(spec, x, y)
        p = problem.p
        dots: list[Tensor] = []
        targets = p.mask.targets
        gx = gy = dbias = None
        if needs.x or (needs.scale and not needs.y):
            gx = x.new_empty(p.m, p.d) if needs.x else None
            dx, _ = problem.gradients(0, saved, g_row, g_col, False)
            launch.finish(
                p, dx, gx, p.x, p.y, g_pos, targets, 0, p.m, None, 1.0, dots if needs.scale else None
            )  # fmt: skip
        if needs.y or needs.col_bias:
            dy, dbias = problem.gradients(1, saved, g_row, g_col, needs.col_bias)
            if g_pos is not None:
                launch.add_positives(p, dy, dbias if needs.col_bias else None, g_pos)
            if needs.y:
                gy = y.new_empty(p.n, p.d)
                launch.finish(
                    p, dy, gy, p.y, p.x, None, None, 0, 0, None, 1.0, dots if needs.scale and not dots else None
                )  # fmt: skip
        dscale = torch.cat(dots).sum().float() if needs.scale else None
    return Gradients(
        gx, gy, dscale, summed_like(spec.col_bias, dbias) if needs.col_bias and dbias is not None else None
    )
