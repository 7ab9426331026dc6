"""Loss and gradients in one walk over rows of blocks: 3 products, for losses that sum over rows alone.

A row of blocks is held until its rows' normalisers are known, and then becomes G in the same memory. Sums of softplus
need no normalisers: what is held is G already, except for a weight that is the same for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fused_contrastive.backends.triton import backward as kernels
from fused_contrastive.backends.triton import configs, device, launch, storage
from fused_contrastive.backends.triton.problem import Block, Prepared, cuts
from fused_contrastive.backends.triton.totals import Direction
from fused_contrastive.core.modes import second_backward
from fused_contrastive.core.spec import TENSORS, Gradients, Needs, RowLoss, StatsSpec, summed_like
from fused_contrastive.core.unit import unit_rows

# A row of blocks has at most HELD_BYTES, but at least the height of LEAST_TILES of the largest tile: products with a G
# of few rows are inefficient.
HELD_BYTES, LEAST_TILES = 2**29, 4


def _terms(pos: Tensor, row: Tensor, asked: RowLoss, softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss (float64), and its derivatives by the row's normaliser and by its positive."""
    z = -pos if softplus else row - (pos - asked.margin)
    slope = torch.ones_like(z) if asked.decoupled and not softplus else z.sigmoid()
    loss = z if asked.decoupled and not softplus else torch.logaddexp(z, torch.zeros_like(z))
    return (row + loss if softplus else loss), (torch.ones_like(z) if softplus else slope), -slope


class _GradientsInTheForward(torch.autograd.Function):
    """A loss whose node holds its gradients of x, y, scale and col_bias; the last two are also fields of the spec."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, col_bias: Tensor | None, spec: StatsSpec, loss: RowLoss
    ) -> Tensor:
        ctx.options, ctx.loss = spec[len(TENSORS) :], loss
        ctx.save_for_backward(x, y, *spec[: len(TENSORS)])
        value, ctx.gradients = loss_and_gradients(spec, x, y, loss, Needs(*ctx.needs_input_grad[:4]))
        return value.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, y, *tensors = ctx.saved_tensors  # raises where the graph has been freed
        spec = StatsSpec(*tensors, *ctx.options)
        # The gradients are scaled in place and returned; a second backward through a retained graph forms them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            with torch.autocast(x.device.type, enabled=False):
                _, gradients = loss_and_gradients(spec, x, y, ctx.loss, Needs(*ctx.needs_input_grad[:4]))
        of = (x, y, spec.scale, spec.col_bias)
        found = tuple(t if t is None else t.mul_(g).to(like.dtype) for t, like in zip(gradients, of, strict=True))
        if torch.is_grad_enabled():
            found = _OnceDifferentiable.apply(*found, *of)  # type: ignore[no-untyped-call]
        return *found, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """Returns four gradients unchanged, as functions of the four inputs they belong to; differentiating them raises."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(t if t is None else t.view_as(t) for t in tensors[:4])

    backward = staticmethod(second_backward)


def row_loss(spec: StatsSpec, x: Tensor, y: Tensor, loss: RowLoss) -> Tensor:
    """``Backend.row_loss``."""
    return _GradientsInTheForward.apply(x, y, spec.scale, spec.col_bias, spec, loss)  # type: ignore[no-any-return, no-untyped-call]


class _Held:
    """Memory of a row of blocks. Each is a matrix of its own, so that offsets in a tile stay below 2^31 for any N."""

    def __init__(self, p: Prepared, x: Tensor, height: int, blocks: list[Block]) -> None:
        self.half, self.dtype = p.half, x.dtype
        exponentials = p.half and not p.softplus
        kept_dtype = torch.bfloat16 if exponentials else x.dtype
        self.values = {b.col0: storage.scratch(x, height, b.width, kept_dtype) for b in blocks}
        self.references: Tensor | None = None
        if exponentials:
            cells = (triton.cdiv(size, storage.CELL) for size in (height, storage.padded(p.n)))
            self.references = x.new_empty(tuple(cells), dtype=torch.float32)

    def block(self, b: Block) -> storage.Kept:
        matrix = storage.Matrix(self.values[b.col0][: b.height], b.width)
        if not self.half:
            return storage.Kept(products=matrix)
        references = None if self.references is None else self.references[:, b.col0 // storage.CELL :]
        return storage.Kept(exponentials=matrix, references=references)

    def as_g(self, b: Block) -> storage.Matrix:
        """The same memory, in the dtype of the features."""
        matrix = self.block(b).products or self.block(b).exponentials
        assert matrix is not None
        return storage.Matrix(matrix.whole.view(self.dtype), matrix.width)


def _rows_of_blocks(p: Prepared) -> Iterator[list[Block]]:
    step = max(LEAST_TILES * configs.TILE, HELD_BYTES // (storage.padded(p.n) * p.dtype.itemsize))
    width = (launch.STATISTICS_BLOCK if p.half else launch.FLOAT32_BLOCK)[1]
    for row0, row1 in cuts(0, p.m, step):
        yield [Block(row0, row1, col0, col1) for col0, col1 in cuts(0, p.n, width)]


def _part(direction: kernels.Direction, rows: slice) -> kernels.Direction:
    """The part of a Direction for some rows, which begin at a segment."""
    first = rows.start // configs.TILE
    return kernels.Direction(*(t[rows] for t in direction[:3]), *(t[first:] for t in direction[3:]))


def loss_and_gradients(spec: StatsSpec, x: Tensor, y: Tensor, loss: RowLoss, needs: Needs) -> tuple[Tensor, Gradients]:
    """The weighted sum of the rows' losses (), float64, and its gradients; the features' are float32.

    float16 might not hold them, since the caller has yet to multiply them by the gradient of the loss.
    """
    if not loss.normalize:
        return _of_rows(spec, x, y, loss, needs)
    with torch.enable_grad():
        raw_x, raw_y = x.detach().requires_grad_(), y.detach().requires_grad_()
        unit_x, unit_y = unit_rows(raw_x), unit_rows(raw_y)
    value, gradients = _of_rows(spec, unit_x.detach(), unit_y.detach(), loss, needs)
    if gradients.x is not None:
        gradients = gradients._replace(x=torch.autograd.grad(unit_x, raw_x, gradients.x)[0])
    if gradients.y is not None:
        gradients = gradients._replace(y=torch.autograd.grad(unit_y, raw_y, gradients.y)[0])
    return value, gradients


def _of_rows(spec: StatsSpec, x: Tensor, y: Tensor, asked: RowLoss, needs: Needs) -> tuple[Tensor, Gradients]:
    p = Prepared(spec._replace(kept_rows=0), x, y)
    top = launch.FP16_TOP if p.dtype == torch.float16 else 1.0
    pos, loss, g_pos = (x.new_empty(p.m, dtype=torch.float64) for _ in range(3))
    by_rows = needs.x or (needs.scale and not needs.y)
    dots: list[Tensor] | None = [] if needs.scale else None
    gx = x.new_empty(p.m, p.d, dtype=torch.float32) if needs.x else None
    dy = x.new_empty(p.n if needs.y else 0, p.d, dtype=torch.float32)
    dbias = x.new_zeros(p.n if needs.col_bias else 0, dtype=torch.float32)
    with device.current(x.device):
        largest = x.new_full((), asked.weight, dtype=torch.float32)  # no row's gradient is larger
        row, col = Direction(True, p.m, x), Direction(False, p.n, x)
        rows_of = None if p.softplus else launch.direction_of(p.m, x)
        all_rows = list(_rows_of_blocks(p))
        height = max(blocks[0].height for blocks in all_rows)
        held = _Held(p, x, height, all_rows[0])
        dx = x.new_empty(height if by_rows else 0, p.d, dtype=torch.float32)
        for blocks in all_rows:
            rows = blocks[0].rows
            for b in blocks:
                kept, gemm_products = held.block(b), None
                if p.source == "gemm" and kept.products is not None:
                    gemm_products = kept.products
                    p.products(b, gemm_products.values)
                launch.block_statistics(p, b, gemm_products, kept, pos, row, col, top)
            loss[rows], g_row, g_pos[rows] = _terms(pos[rows], row.value[rows], asked, p.softplus)
            g_pos[rows] *= asked.weight
            if rows_of is not None:
                part = _part(rows_of, rows)
                launch.prepare(p, row.value[rows], g_row, part, None, None, None, None, top)
            for b in blocks:
                g = held.as_g(b)
                if not p.softplus:
                    launch.block_of_weights(p, b, held.block(b), rows_of, None, g)
                elif not p.half:
                    launch.block_of_sigmoids(p, b, held.block(b), torch.ones_like(pos), None, top, g)
                if by_rows:
                    launch.add_product(dx[: b.height], g.values, p.y[b.cols], first=b.col0 == 0)
                if needs.y:
                    launch.add_product(dy[b.cols], g.values.T, p.x[b.rows], first=b.row0 == 0)
                if needs.col_bias:
                    dbias[b.cols] += g.values.sum(dim=0, dtype=torch.float32)
            if by_rows:
                launch.finish(
                    p, dx[: blocks[0].height], gx, p.x, p.y, g_pos, p.mask.targets, rows.start, p.m, largest, top, dots
                )
        dbias *= asked.weight / top
        factor: Tensor | None = largest
        paired = p.m
        if needs.y and p.mask.targets is not None:
            dy *= asked.weight / top
            factor = None
        if not launch.add_positives(p, dy, dbias if needs.col_bias else None, g_pos):
            paired = 0
        gy = torch.empty_like(dy) if needs.y else None
        if needs.y:
            launch.finish(p, dy, gy, p.y, p.x, g_pos, None, 0, paired, factor, top, None if by_rows else dots)
        dscale = torch.cat(dots).sum().float() if dots is not None else None
    return asked.weight * loss.sum(), Gradients(
        gx, gy, dscale, summed_like(spec.col_bias, dbias) if needs.col_bias else None
    )
