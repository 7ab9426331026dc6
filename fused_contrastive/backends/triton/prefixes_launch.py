"""Nested prefixes (Matryoshka): launches the kernels of prefixes.py, forward and backward, without waiting for the GPU.

The matrix products take as many operations as those of one loss of the longest prefix. Where the kernels make the
products, a copy of the features pads the columns that each prefix adds by zeros, to a multiple of ``block_k``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.backends.triton import backward as backward_kernels
from fused_contrastive.backends.triton import configs, device, launch, prefixes, storage
from fused_contrastive.backends.triton.problem import Block, Prepared, largest, products_from
from fused_contrastive.backends.triton.totals import AnyPartials, Direction, Partials
from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds
from fused_contrastive.core.spec import Forward, StatsSpec, Upstream

# A float16 row is multiplied by a power of 2 so that its shortest prefix gets a norm near 1, unless that would make the
# norm of the longest prefix much larger than this: then that norm is near this, and no element overflows.
LONGEST_NORM = 2.0**12


def tile(architecture: str, source: configs.Source, backward: bool) -> configs.Config:
    """Tile sizes of a kernel, chosen by what it compiles to and not yet by timing.

    No tile is larger than that of one loss: its products must stay in registers while its logits are reduced.
    """
    if architecture == "interpreter":  # small, and of different shapes
        return configs.Config(32, 64, 32, 4, 1, group=2) if backward else configs.Config(64, 32, 32, 4, 1, group=2)
    if source == "gemm":
        return configs.Config(64, 64, 32, warps=4, stages=1)
    k, stages = 64 if source == "half" else 32, 2 if architecture == "gfx942" else 3
    if backward and (architecture, source) != ("sm_100", "tf32"):
        return configs.Config(64, 128, k, warps=4, stages=stages)
    return configs.Config(128, 64, k, warps=8 if architecture == "sm_100" else 4, stages=stages)


class _Nested:
    """Arguments that all launches of one problem share."""

    def __init__(self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, backward: bool) -> None:
        source = products_from(x)
        self.tile = tile(device.of(x.device).architecture, source, backward)
        self.count = len(of.dims)
        unit = 1 if source == "gemm" else self.tile.block_k
        units = [-(-(part.stop - part.start) // unit) for part in of.parts]
        self.units = tuple(accumulate(units, initial=0))  # where each part begins, and where the last ends
        # Where the padded features have the columns that each prefix adds: with their padding, and without it.
        self.padded = [slice(begin * unit, end * unit) for begin, end in pairwise(self.units)]
        self.parts = [
            slice(to.start, to.start + part.stop - part.start) for to, part in zip(self.padded, of.parts, strict=True)
        ]
        self.p = Prepared(spec._replace(kept_rows=0), *(self._in_parts(t, of) for t in (x, y)))
        self.lengths = [-(-size // configs.TILE) * configs.TILE for size in (self.p.m, self.p.n)]
        self.factors = [self.vector(t, 0.0) for t in (of.row, of.col)]
        self.options = {
            "PARTS": self.units, "MODE": self.p.mode, "TILE": self.tile, **(self.tile.options | launch.UNFUSED)
        }  # fmt: skip

    def _in_parts(self, t: Tensor, of: Prefixes) -> Tensor:
        """(rows, D) -> (rows, padded D): what each prefix adds, padded by zeros; no columns after the last."""
        if self.padded == of.parts:
            return t[:, : of.dims[-1]]
        out = t.new_zeros(t.shape[0], self.padded[-1].stop)
        for to, part in zip(self.parts, of.parts, strict=True):
            out[:, to] = t[:, part]
        return out

    def vector(self, t: Tensor | None, padding: float) -> Tensor | None:
        """(P, M) or (P, N) with each row padded to a multiple of the largest tile, so that tiles need no mask."""
        return None if t is None else F.pad(t, (0, -t.shape[1] % configs.TILE), value=padding).contiguous()

    def blocks(self, height: int, width: int) -> list[Block]:
        """Blocks of S, with fewer rows than those of one loss: each takes memory for every prefix."""
        if self.p.source == "gemm":
            height, width = launch.FLOAT32_BLOCK
        return self.p.blocks(max(configs.TILE, height // self.count), width)

    def room(self, blocks: Sequence[Block], dtype: torch.dtype) -> Tensor:
        """Memory for one matrix per prefix, of the largest block."""
        height, width = largest(list(blocks))
        return self.p.x.new_empty(self.count * height * storage.padded(width), dtype=dtype)

    def matrices(self, room: Tensor, b: Block) -> Tensor:
        """(P, height, padded width): a block's matrices, one per prefix, in ``room``."""
        shape = self.count, b.height, storage.padded(b.width)
        return room[: math.prod(shape)].view(shape)

    def products(self, b: Block, out: Tensor) -> None:
        """Writes a block's dot products over each prefix by the vendor GEMM, each from those over the prefix before."""
        before = None
        for k, part in enumerate(self.padded):
            products, x, y = out[k, :, : b.width], self.p.x[b.rows, part], self.p.y[b.cols, part].T
            if before is None:
                torch.mm(x, y, out=products)
            else:
                torch.addmm(before, x, y, out=products)
            before = products

    def launched(self, b: Block) -> tuple[int, int, tuple[int]]:
        """Tiles down and across a block, and the grid that has a program for each."""
        down, across = b.tiles(self.tile)
        return down, across, (down * across,)


def forward(spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
    """The statistics of all prefixes; nothing is kept for the backward.

    The products take 2 * M * N * D operations, as for one loss. D is the last of the dims.
    """
    nested = _Nested(spec, of, x, y, backward=False)
    p, count = nested.p, nested.count
    pos = x.new_empty(count, p.m, dtype=torch.float64)
    rows, cols = ([Direction(asked, size, x) for _ in of.dims] for asked, size in ((True, p.m), (spec.want_col, p.n)))
    with device.current(x.device):
        all_blocks = nested.blocks(*launch.STATISTICS_BLOCK)
        room = nested.room(all_blocks if p.source == "gemm" else [], torch.float32)
        for b in all_blocks:
            gemm_products: tuple[Tensor | None, int] = (None, 0)
            if p.source == "gemm":
                products = nested.matrices(room, b)
                nested.products(b, products)
                gemm_products = products, products.stride(1)
            down, across, grid = nested.launched(b)
            row_parts = [rows[0].partials(count * across, b.height), cols[0].partials(count * down, b.width)]
            prefixes.prefix_statistics[grid](
                *p.features(nested.tile), *gemm_products, p.mask, *nested.factors, pos, *row_parts, *p.sizes, *b,
                *nested.lengths, **nested.options,
            )  # fmt: skip
            for k in range(count):
                of_rows, of_cols = (_part(parts, k, count) for parts in row_parts)
                launch.add_up(p, b, (of_rows, of_cols), (rows[k], cols[k]), (down, across), nested.tile.block_n)
    if not all_blocks:
        for each in (*rows, *cols):
            each.value.fill_(-math.inf)
    row, col = (torch.stack([each.result() for each in direction]) for direction in (rows, cols))
    return Forward(pos, row, col, x.new_empty(0, 0, dtype=torch.float32))


def _part(partials: AnyPartials | None, k: int, count: int) -> Partials | None:
    """The partial statistics of prefix k."""
    if partials is None:
        return None
    return Partials(*(t.view(count, -1, t.shape[1])[k] for t in (partials.maxima, partials.sums)))


class _Backward:
    """The state of one backward, and its steps."""

    def __init__(
        self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream,
        needs: PrefixNeeds,
    ) -> None:  # fmt: skip
        # A float16 row is multiplied by a power of 2, and its factors are divided by it: the cosines stay the same.
        # Else the largest factor, of some short prefix, would scale the weights of all other rows towards underflow.
        self.powers: list[Tensor] = []
        if x.dtype == torch.float16 and of.row is not None and of.col is not None:
            self.powers = [_powers(factors) for factors in (of.row, of.col)]
            of = of._replace(row=of.row / self.powers[0], col=of.col / self.powers[1])
            x, y = ((t.float() * power[:, None]).to(t.dtype) for t, power in zip((x, y), self.powers, strict=True))
        self.nested = nested = _Nested(spec, of, x, y, backward=True)
        self.p, self.of, self.needs = nested.p, of, needs
        self.g_pos, g_row, g_col = upstream
        self.by_rows = needs.x or (needs.scale and not needs.y)  # dscale is formed with dx, or else with dy
        self.has_negatives = self.p.m > 0 and (g_row is not None or g_col is not None)
        self.largest: Tensor | None = None
        self.top = 1.0
        if self.p.dtype == torch.float16 and self.has_negatives:
            self.largest, self.top = _largest(of, g_row, g_col), launch.FP16_TOP
        self.dots: list[Tensor] = []
        normalised = of.row is not None
        self.along = [
            x.new_zeros(nested.count, size, dtype=torch.float64) if normalised and needed else None
            for size, needed in ((self.p.m, needs.x), (self.p.n, needs.y))
        ]
        self.rows: backward_kernels.Direction | None = None
        self.cols: backward_kernels.Direction | None = None
        if not self.has_negatives:
            return
        vectors = [
            (None, None) if g is None else (nested.vector(value, -math.inf), nested.vector(g, 0.0))
            for value, g in ((saved.row, g_row), (saved.col, g_col))
        ]
        (row, g_row), (col, g_col) = ([None if t is None else t.view(-1) for t in pair] for pair in vectors)
        self.rows, self.cols = (None if g is None else launch.direction_of(len(g), g) for g in (g_row, g_col))
        nothing = saved.row.new_empty(0)
        launch.prepare(
            self.p, nothing if row is None else row, g_row, self.rows, col, g_col, self.cols, self.largest, self.top
        )

    def weights(self, b: Block, room: Tensor) -> Tensor:
        """(P, height, width): the output of ``prefix_gradients`` for a block, times top / largest.

        Adds each row's and each column's sums of G times the cosines to ``along``.
        """
        nested, p = self.nested, self.p
        out = nested.matrices(room, b)
        if p.source == "gemm":  # each tile is read before it is overwritten
            nested.products(b, out)
        down, across, grid = nested.launched(b)
        shapes = (nested.count, across, b.height), (nested.count, down, b.width)
        dots = [
            None if along is None else out.new_empty(shape, dtype=torch.float32)
            for along, shape in zip(self.along, shapes, strict=True)
        ]
        prefixes.prefix_gradients[grid](
            *p.features(nested.tile), out if p.source == "gemm" else None, out.stride(1), p.mask, self.rows, self.cols,
            *nested.factors, *dots, out, out.stride(1), *p.sizes, *b, *nested.lengths, SEGMENT=configs.TILE,
            **nested.options,
        )  # fmt: skip
        factor = 1.0 if self.largest is None else self.largest.double() / self.top
        for along, part, dot in zip(self.along, (b.rows, b.cols), dots, strict=True):
            if along is not None and dot is not None:
                along[:, part] += dot.sum(dim=1, dtype=torch.float64) * factor
        return out[:, :, : b.width]

    def of_positives(self) -> Tensor | None:
        """(P, M) float64: what multiplies the positive in dx, and the row in dy, in the columns that each prefix adds.

        None if no gradient arrives at the positives. Adds the positives' gradients times cosines to ``along``.
        """
        if self.g_pos is None:
            return None
        g, targets = self.g_pos, self.p.spec.positive_columns(self.p.m)
        if self.of.row is not None and self.of.col is not None:
            g = g * self.of.row * self.of.col[:, targets]
            terms = g * self._own_products(targets)
            if self.along[0] is not None:
                self.along[0] += terms
            if self.along[1] is not None:  # deterministic if several rows share a positive, as index_add_ is not
                self.along[1].T.index_put_((targets,), terms.T, accumulate=True)
        return _of_longer(g)

    def _own_products(self, targets: Tensor) -> Tensor:
        """(P, M) float64: the dot products of each prefix of a row with the same prefix of its positive."""
        x, y = self.p.x, self.p.y
        found = x.new_empty(self.nested.count, self.p.m, dtype=torch.float64)
        for i in range(0, self.p.m, launch.TARGET_ROWS):
            rows = slice(i, i + launch.TARGET_ROWS)
            for k, part in enumerate(self.nested.parts):
                found[k, rows] = (x[rows, part].float() * y[targets[rows], part].float()).sum(dim=1)
        return found.cumsum(dim=0)

    def add_positives(self, dy: Tensor, targets: Tensor, g_pos: Tensor) -> None:
        """Adds the positives' part to dy, deterministically, as ``launch.add_positives`` does."""
        for i in range(0, self.p.m, launch.TARGET_ROWS):
            rows = slice(i, i + launch.TARGET_ROWS)
            for part, g in zip(self.nested.parts, g_pos[:, rows, None].float(), strict=True):
                dy[:, part].index_put_((targets[rows],), g * self.p.x[rows, part].float(), accumulate=True)

    def finish(
        self, axis: int, grad: Tensor, out: Tensor | None, g_pos: Tensor | None, first: int, with_dots: bool,
        largest: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes rows of dx (axis 0) or dy (axis 1), from ``first`` on.

        If the prefixes are normalised, the gradient by each unit vector loses its component along that vector.
        """
        p, along, inverse = self.p, self.along[axis], (self.of.row, self.of.col)[axis]
        own, other = (p.x, p.y) if axis == 0 else (p.y, p.x)
        share = None
        if along is not None and inverse is not None:
            share = _of_longer(along * inverse.square()).float()
        for k, (part, to) in enumerate(zip(self.nested.parts, self.of.parts, strict=True)):
            launch.finish(
                p, grad[:, part], None if out is None else out[:, to], own[:, part], other[:, part],
                None if g_pos is None else g_pos[k], p.mask.targets if axis == 0 else None, first, p.m, largest,
                self.top, self.dots if with_dots else None, None if share is None else share[k],
            )  # fmt: skip


def _of_longer(t: Tensor) -> Tensor:
    """(P, ...) -> (P, ...): for each prefix, the sum over it and the longer ones."""
    return t.flip(0).cumsum(dim=0).flip(0)


def _powers(factors: Tensor) -> Tensor:
    """(P, M) factors -> (M,) powers of 2, by which rows are multiplied: the next above a row's largest factor, or above
    LONGEST_NORM times the longest prefix's if that is less. A row without a finite positive factor is not changed.
    """
    wanted = torch.minimum(factors.amax(dim=0), LONGEST_NORM * factors[-1])
    exponents = torch.frexp(wanted).exponent
    return torch.ldexp(torch.ones_like(wanted), torch.where(wanted.isfinite() & (wanted > 0), exponents, 0))


def _largest(of: Prefixes, g_row: Tensor | None, g_col: Tensor | None) -> Tensor:
    """(): a bound. No element of what ``weights`` returns, before top / largest, is more than twice this."""
    most = torch.stack([g.abs().amax(dim=1) for g in (g_row, g_col) if g is not None]).amax(dim=0)
    if of.row is not None and of.col is not None:
        most = most * of.row.amax(dim=1) * of.col.amax(dim=1)
    return most.sum().clamp_min(launch.SMALLEST)


def backward(
    spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: PrefixNeeds
) -> PrefixGradients:
    """The gradients: 2 * M * N * D operations make the products again, and each of dx and dy takes as many.

    D is the last of the dims.
    """
    # The gradient of a row that was multiplied by a power of 2 is smaller by it, and float16 might lose its bits.
    scaled = x.dtype == torch.float16 and of.row is not None
    gx, gy = (
        t.new_empty(t.shape, dtype=torch.float32 if scaled else t.dtype) if needed else None
        for t, needed in ((x, needs.x), (y, needs.y))
    )
    for g in (gx, gy):
        if g is not None:
            g[:, of.dims[-1] :] = 0
    with device.current(x.device):
        run = _Backward(spec, of, x, y, saved, upstream, needs)
        p, nested = run.p, run.nested
        of_positives = run.of_positives()
        all_blocks = nested.blocks(*launch.GRADIENT_BLOCK)
        new = torch.empty if run.has_negatives else torch.zeros
        sum_x = new(largest(all_blocks)[0] if run.by_rows else 0, p.d, dtype=torch.float32, device=x.device)
        sum_y = new(p.n if needs.y else 0, p.d, dtype=torch.float32, device=x.device)
        room = nested.room(all_blocks if run.has_negatives else [], x.dtype)
        for b in all_blocks:
            if run.has_negatives:
                weights = run.weights(b, room)
                for h, part in zip(weights, nested.padded, strict=True):
                    if run.by_rows:
                        launch.add_product(sum_x[: b.height, part], h, p.y[b.cols, part], first=b.col0 == 0)
                    if needs.y:
                        launch.add_product(sum_y[b.cols, part], h.T, p.x[b.rows, part], first=b.row0 == 0)
            if run.by_rows and b.col1 == p.n:
                run.finish(0, sum_x[: b.height], gx, of_positives, b.row0, needs.scale, run.largest)
        if needs.y and p.n:
            factor, g_pos = run.largest, of_positives
            if of_positives is not None and p.mask.targets is not None:
                if factor is not None:
                    sum_y *= factor / run.top
                    factor = None
                run.add_positives(sum_y, p.mask.targets, of_positives)
                g_pos = None
            run.finish(1, sum_y, gy, g_pos, 0, needs.scale and not run.by_rows, factor)
        dscale = torch.cat([x.new_zeros(1, dtype=torch.float64), *run.dots]).sum().float() if needs.scale else None
    for g, power in zip((gx, gy), run.powers, strict=False):  # empty unless the features are float16
        if g is not None:
            g *= power[:, None]
    dx, dy = (None if g is None else g.to(x.dtype) for g in (gx, gy))
    return PrefixGradients(dx, dy, dscale)
