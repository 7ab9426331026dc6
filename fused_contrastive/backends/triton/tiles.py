"""What the kernels share: the order of tiles, tiles of products, logits and exclusions, tiles in memory."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
GUIDE_K = tl.constexpr(16)  # columns of a guide are padded to a multiple of this, and taken so many at a time
CELL = tl.constexpr(32)  # rows and columns that share one reference of kept exponentials; every tile is a multiple

# Exponentials are taken against a reference this many binary orders below the maximum. float32 reaches from 2^-126 to
# 2^127: without this, a logit more than 87 below the maximum would be lost, with it one more than 130 below.
HEADROOM = tl.constexpr(60.0)
# From this size on, a logit in units of log 2 is rounded to half a binary order or more. One rounding more or less, as
# where a multiplication and a subtraction are fused, would then change an exponential by a factor of 2^0.5 or more, so
# the exact kernels take such logits.
HUGE = tl.constexpr(2.0**22)


class Mask(NamedTuple):
    """The tensors that turn products into logits and exclude pairs, None where absent, as one argument of a kernel."""

    scale: Tensor  # () float32
    targets: Tensor | None  # (M,) int64
    col_bias: Tensor | None  # (N,) float32
    row_ids: Tensor | None  # (M, ids) int64
    col_ids: Tensor | None  # (N, ids) int64
    row_limit: Tensor | None  # (M,) float32
    col_limit: Tensor | None  # (N,) float32
    row_guide: Tensor | None  # (M, G) float32, G = Mode.guide; None also where nothing is compared with it
    col_guide: Tensor | None  # (N, G) float32
    row_reference: Tensor | None  # (M,) float32; None also where nothing is counted
    col_reference: Tensor | None  # (N,) float32
    row_above: Tensor | None = None  # (M,) int32, to which the numbers of logits above the references are added
    col_above: Tensor | None = None  # (N,) int32
    row_highest: Tensor | None = None  # (M,) float32 the highest logits so far
    col_highest: Tensor | None = None  # (N,) float32

    def without_references(self) -> Mask:
        """The mask of a kernel that counts nothing."""
        return self._replace(
            row_reference=None, col_reference=None, row_above=None, col_above=None, row_highest=None, col_highest=None
        )


class Mode(NamedTuple):
    """What is known when a kernel is compiled, beside its tile."""

    half: bool  # logits in units of log 2; for half-precision features, unless the exact kernels take all of them
    tma: bool  # x, y, kept tiles and G are descriptors for the tensor memory accelerator, not pointers
    precision: str  # of tl.dot
    exclude_self: bool
    upper: bool  # only pairs above the diagonal
    equal_ids: str  # "exclude", "only" (exclude all others), "negate", "apart" or "add"
    one_bias: bool = False  # col_bias has one element, for all columns
    ids: int = 1  # of each row and column; pairs are related if any of them agree
    paired: bool = True  # rows have positives
    guide: int = 0  # columns of the guide, a multiple of GUIDE_K
    guide_precision: str = "ieee"  # of its products: "ieee", or "tf32x3" in NVIDIA's matrix units
    teacher: bool = False  # the guide's products are a teacher's logits


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the tile with this index, among tiles_m x tiles_n.

    The order is by bands of GROUP rows of tiles and, in a band, down its columns, so that programs that run at the same
    time share x and y in L2.
    """
    band = index // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    inside = index % (GROUP * tiles_n)
    return band * GROUP + inside % height, inside // height


@triton.jit
def corner(height, width, TILE: tl.constexpr):
    """The first row and column of this program's tile in a block (height, width). Axis 0 of the grid: its tiles."""
    tiles_m = tl.cdiv(height, TILE.block_m)
    tile_m, tile_n = tile_at(tl.program_id(0), tiles_m, tl.cdiv(width, TILE.block_n), TILE.group)
    return tile_m * TILE.block_m, tile_n * TILE.block_n


@triton.jit
def _pointers(matrix, stride, row, col, BM: tl.constexpr, BN: tl.constexpr):
    """Pointers to a tile (BM, BN). Rows and tiles begin at multiples of 16 elements, so that 16 bytes move at once.

    The corner's offset is 64-bit. Offsets from it fit into 32 bits: they are below 256 rows of less than 2^23 each.
    """
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    stride = tl.multiple_of(stride, 16)
    corner = matrix + (row.to(tl.int64) * stride + tl.multiple_of(col, 16))
    return corner + (i[:, None] * stride + j[None, :])


@triton.jit
def load_tile(matrix, stride, row, col, height, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """The tile (BM, BN) at (row, col) of a matrix with ``height`` rows; its columns reach to a multiple of every tile.

    ``matrix`` is a descriptor with boxes of that size (TMA), or a pointer.
    """
    if TMA:
        tile = matrix.load([row, col])
    else:
        inside = tl.arange(0, BM) < height - row
        tile = tl.load(_pointers(matrix, stride, row, col, BM, BN), mask=inside[:, None], other=0.0)
    return tile


@triton.jit
def store_tile(matrix, stride, row, col, height, tile, TMA: tl.constexpr):
    """Writes a tile to where ``load_tile`` reads it."""
    BM: tl.constexpr = tile.shape[0]
    BN: tl.constexpr = tile.shape[1]
    if TMA:
        matrix.store([row, col], tile.to(matrix.dtype))
    else:
        inside = tl.arange(0, BM) < height - row
        where = _pointers(matrix, stride, row, col, BM, BN)
        tl.store(where, tile.to(matrix.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _products_from_pointers(
    x, y, row0, col0, M, N, D, stride_x, stride_y, acc, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    rows = tl.minimum(row0 + tl.arange(0, acc.shape[0]), M - 1).to(tl.int64)
    cols = tl.minimum(col0 + tl.arange(0, acc.shape[1]), N - 1).to(tl.int64)
    ks = tl.arange(0, BK)
    x_tile = x + rows[:, None] * stride_x + ks[None, :]
    y_tile = y + cols[None, :] * stride_y + ks[:, None]
    for k in range(0, D, BK):
        inside = ks < D - k
        a = tl.load(x_tile, mask=inside[None, :], other=0.0)
        b = tl.load(y_tile, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_tile += BK
        y_tile += BK
    return acc


@triton.jit
def add_products(acc, x, y, row0, col0, begin, end, shape, MODE: tl.constexpr, TILE: tl.constexpr):
    """``acc`` + x[row0 : row0 + BM, begin : end] @ y[col0 : col0 + BN, begin : end].T in float32.

    Rows and columns beyond the last hold anything. shape: M, N, D, the strides of x and y. ``end`` is D, or
    ``end - begin`` is a multiple of BK.
    """
    M, N, _, stride_x, stride_y = shape
    BK: tl.constexpr = TILE.block_k
    if MODE.tma:
        for k in range(begin, end, BK):
            acc = tl.dot(x.load([row0, k]), y.load([col0, k]).T, acc, input_precision=MODE.precision)
    else:
        acc = _products_from_pointers(
            x + begin, y + begin, row0, col0, M, N, end - begin, stride_x, stride_y, acc, BK, MODE.precision
        )  # fmt: skip
    return acc


@triton.jit
def products(x, y, row0, col0, shape, MODE: tl.constexpr, TILE: tl.constexpr):
    """x[row0 : row0 + BM] @ y[col0 : col0 + BN].T; zeros where ``upper`` excludes all pairs. See ``add_products``."""
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    D = shape[2]
    if MODE.upper:
        D = tl.where(col0 + BN > row0, D, 0)
    acc = tl.zeros((BM, BN), tl.float32)
    return add_products(acc, x, y, row0, col0, 0, D, shape, MODE, TILE)


@triton.jit
def compared(acc, mask, row0, col0, M, N, MODE: tl.constexpr):
    """A tile of what ``below`` compares with limits: the products ``acc``, or those of the guide if there is one. The
    latter are also what a teacher's logits are made of.

    The guide's vectors are float32 whatever the features are. Forward and backward make the same bits of them.
    """
    if mask.row_guide is not None:
        acc = _products_from_pointers(
            mask.row_guide, mask.col_guide, row0, col0, M, N, MODE.guide, MODE.guide, MODE.guide,
            tl.zeros((acc.shape[0], acc.shape[1]), tl.float32), GUIDE_K, MODE.guide_precision,
        )  # fmt: skip
    return acc


@triton.jit
def _agree(mask, rows, row_end, cols, col_end, K, MODE: tl.constexpr):
    """Which pairs of a tile have equal ids in place K."""
    row_at = rows if MODE.ids == 1 else rows.to(tl.int64) * MODE.ids + K
    col_at = cols if MODE.ids == 1 else cols.to(tl.int64) * MODE.ids + K
    row_id = tl.load(mask.row_ids + row_at, mask=rows < row_end, other=0)
    col_id = tl.load(mask.col_ids + col_at, mask=cols < col_end, other=0)
    return row_id[:, None] == col_id[None, :]


@triton.jit
def related(mask, rows, row_end, cols, col_end, MODE: tl.constexpr):
    """Which pairs of a tile have equal ids in any place. Beyond the last row or column it may be anything."""
    out = _agree(mask, rows, row_end, cols, col_end, 0, MODE)
    if MODE.ids > 1:
        for k in range(1, MODE.ids):
            out |= _agree(mask, rows, row_end, cols, col_end, k, MODE)
    return out


@triton.jit
def below(s, acc, mask, limit, i, inside, AXIS: tl.constexpr):
    """Logits, -inf where scale * product, or the guide's product, is above the limit of the row (AXIS 0) or column
    (AXIS 1); None: no limit. ``acc`` is from ``compared``.

    The forward and the backward call it with the same products. Only exact kernels do, where nothing is fused: the
    rounded product is compared in both, whatever is added to it elsewhere.
    """
    if limit is not None:
        most = tl.load(limit + i, mask=inside, other=0.0)
        if mask.row_guide is None:
            acc *= tl.load(mask.scale)
        s = tl.where(acc > tl.expand_dims(most, 1 - AXIS), float("-inf"), s)
    return s


@triton.jit
def ranks_of(s, reference, i, inside, AXIS: tl.constexpr, MODE: tl.constexpr):
    """How many of a tile's logits are above the references of its rows (AXIS 0) or columns (AXIS 1), and the highest.

    A NaN is above every reference, and is never the highest. The highest is not in units of log 2.
    """
    unit: tl.constexpr = 1.4426950408889634 if MODE.half else 1.0
    least = tl.load(reference + i, mask=inside, other=0.0) * unit
    count = tl.sum((~(s <= tl.expand_dims(least, 1 - AXIS))).to(tl.int32), axis=1 - AXIS)
    return count, tl.max(tl.where(s == s, s, float("-inf")), axis=1 - AXIS) / unit


@triton.jit
def count_above(s, reference, above, highest, i, inside, AXIS: tl.constexpr, MODE: tl.constexpr):
    """Counts a tile's logits above the references of its rows (AXIS 0) or columns (AXIS 1), and finds the highest.

    Tiles add to the same counts in any order: sums of integers and maxima do not depend on it.
    """
    if reference is not None:
        count, most = ranks_of(s, reference, i, inside, AXIS, MODE)
        tl.atomic_add(above + i, count, mask=inside)
        tl.atomic_max(highest + i, most, mask=inside)


@triton.jit
def of_teacher(acc, mask, rows, row_end, cols, col_end, MODE: tl.constexpr):
    """A tile of the teacher's logits from ``compared``: -inf beyond the end, and in columns whose bias is -inf."""
    out = (rows >= row_end)[:, None] | (cols >= col_end)[None, :]
    if mask.col_bias is not None:
        if MODE.one_bias:
            out |= tl.load(mask.col_bias) == float("-inf")
        else:
            out |= (tl.load(mask.col_bias + cols, mask=cols < col_end, other=0.0) == float("-inf"))[None, :]
    return tl.where(out, float("-inf"), acc)


@triton.jit
def positives(mask, rows, row_end):
    """The column of each row's positive."""
    if mask.targets is not None:
        columns = tl.load(mask.targets + rows, mask=rows < row_end, other=-1)
    else:
        columns = rows
    return columns


@triton.jit
def excluded(mask, rows, row_end, cols, col_end, MODE: tl.constexpr):
    """Which pairs of a tile do not count: positives, those beyond the end, and those that the problem excludes."""
    if MODE.paired:
        out = (positives(mask, rows, row_end)[:, None] == cols[None, :]) | (rows >= row_end)[:, None]
    else:
        out = (rows >= row_end)[:, None]
    out |= (cols >= col_end)[None, :]
    if MODE.exclude_self:
        out |= rows[:, None] == cols[None, :]
    if MODE.upper:
        out |= rows[:, None] >= cols[None, :]
    if mask.row_ids is not None:
        if MODE.equal_ids == "exclude":
            out |= related(mask, rows, row_end, cols, col_end, MODE)
        elif MODE.equal_ids == "only":
            out |= ~related(mask, rows, row_end, cols, col_end, MODE)
    return out


@triton.jit
def added_up(mask, rows, row_end, cols, col_end, MODE: tl.constexpr):
    """Which pairs of a tile are related and not excluded, so that their logits are added up (equal_ids "add")."""
    out = related(mask, rows, row_end, cols, col_end, MODE)
    return out & ~excluded(mask, rows, row_end, cols, col_end, MODE)


@triton.jit
def logits(acc, mask, pos, row0, row_end, col0, col_end, MODE: tl.constexpr, SCALED: tl.constexpr = False):
    """(s, c) from products: the logits are s * c, in units of log 2 if MODE.half, and -inf where excluded.

    c is the scale, to be multiplied in the same instruction that subtracts a reference; it is not negative. It is 1
    if a bias has been added or a pair is excluded. Most tiles have nothing to exclude, and skip the comparisons.
    ``pos``, where not None, gets the positives' logits. SCALED: ``acc`` already has the scale and the unit, and c is 1.
    """
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    unit: tl.constexpr = 1.4426950408889634 if MODE.half else 1.0
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    c = tl.full((), 1.0, tl.float32) if SCALED else tl.load(mask.scale) * unit
    special = (row0 + BM > row_end) | (col0 + BN > col_end) | (c < 0)
    if mask.targets is not None:
        positive = positives(mask, rows, row_end)
        has_positive = (rows < row_end) & (positive >= col0) & (positive < col0 + BN)
        special |= tl.max(has_positive.to(tl.int32)) > 0
    elif MODE.paired:
        special |= (row0 < col0 + BN) & (col0 < row0 + BM)
    if MODE.exclude_self:
        special |= (row0 < col0 + BN) & (col0 < row0 + BM)
    if MODE.upper:
        special |= col0 < row0 + BM
    if mask.row_ids is not None:
        special |= row0 >= 0
    if mask.col_bias is not None:
        if MODE.one_bias:
            acc = acc * c + tl.load(mask.col_bias) * unit
        else:
            acc = acc * c + (tl.load(mask.col_bias + cols, mask=cols < col_end, other=0.0) * unit)[None, :]
        c = tl.full((), 1.0, tl.float32)
    if special:
        acc = acc * c
        c = tl.full((), 1.0, tl.float32)
        if pos is not None:
            column = positives(mask, rows, row_end)
            p = tl.sum(tl.where(column[:, None] == cols[None, :], acc, 0.0), axis=1).to(tl.float64) / unit
            here = (rows < row_end) & (column >= col0) & (column < col0 + BN)
            tl.store(pos + rows, tl.where(p == float("inf"), float("nan"), p), mask=here)
        if mask.row_ids is not None:
            if MODE.equal_ids == "negate":
                acc = tl.where(related(mask, rows, row_end, cols, col_end, MODE), -acc, acc)
        acc = tl.where(excluded(mask, rows, row_end, cols, col_end, MODE), float("-inf"), acc)
    return acc, c


@triton.jit
def power(s, MODE: tl.constexpr):
    """exp of logits: to base 2 if they are in units of log 2, else to base e."""
    return tl.exp2(s) if MODE.half else tl.exp(s)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1], to full precision (Kahan): the rounding of 1 + u cancels in log(w) / (w - 1)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def finite(reference):
    """A maximum to subtract: 0 where all pairs are excluded (-inf), which gives exp(-inf) = 0 and not NaN."""
    return tl.where(reference == float("-inf"), 0.0, reference)
