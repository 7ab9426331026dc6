"""What the kernels share: the order of tiles, a tile of products, the logits of a tile and which are excluded."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
CELL = tl.constexpr(32)  # rows and columns that share one reference of kept exponentials; every tile is a multiple


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in bands of GROUP rows of tiles, down each band's columns: neighbours in time share x and y in L2."""
    band = index // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    inside = index % (GROUP * tiles_n)
    return band * GROUP + inside % height, inside // height


@triton.jit
def tile_of(
    matrix, stride, row0, col0, row_begin, row_end, col_begin, col_end, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Pointers to a tile (BM, BN) of a matrix that holds a block, and where the tile is inside the block.

    The corner's offset is 64-bit; those from it, below 256 rows of less than 2^23 each, need no more than 32.
    """
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    corner = matrix + (row0 - row_begin).to(tl.int64) * stride + (col0 - col_begin)
    return corner + (i[:, None] * stride + j[None, :]), (i < row_end - row0)[:, None] & (j < col_end - col0)[None, :]


@triton.jit
def products(
    x, y, row0, col0, M, N, D, stride_x, stride_y,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[row0 : row0 + BM] @ y[col0 : col0 + BN].T in float32. Rows and columns beyond the end hold anything."""
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(0, D, BK):
            acc = tl.dot(x.load([row0, k]), y.load([col0, k]).T, acc, input_precision=PRECISION)
    else:
        rows = tl.minimum(row0 + tl.arange(0, BM), M - 1).to(tl.int64)
        cols = tl.minimum(col0 + tl.arange(0, BN), N - 1).to(tl.int64)
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
def depth(D, row0, col0, BN: tl.constexpr, UPPER: tl.constexpr):
    """How many features a tile's products need: none where UPPER excludes all of it."""
    return tl.where(col0 + BN > row0, D, 0) if UPPER else D


@triton.jit
def equal_ids(row_ids, col_ids, rows, row_end, cols, col_end):
    row_id = tl.load(row_ids + rows, mask=rows < row_end, other=0)
    col_id = tl.load(col_ids + cols, mask=cols < col_end, other=0)
    return row_id[:, None] == col_id[None, :]


@triton.jit
def logits(
    acc, scale, targets, col_bias, row_ids, col_ids, pos, row0, row_end, col0, col_end, unit,
    SELF: tl.constexpr, UPPER: tl.constexpr, EQUAL_IDS: tl.constexpr, PICK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Products -> logits in multiples of 1 / unit, -inf where excluded or beyond the end. PICK stores the positives.

    UPPER excludes all but pairs above the diagonal; EQUAL_IDS is "exclude", "only" (exclude all others) or "negate".
    Most tiles have nothing to exclude, and skip the comparisons.
    """
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    s = acc * (tl.load(scale) * unit)
    if col_bias is not None:
        s += (tl.load(col_bias + cols, mask=cols < col_end, other=0.0) * unit)[None, :]
    if targets is not None:
        positive = tl.load(targets + rows, mask=rows < row_end, other=-1)
    else:
        positive = rows
    has_positive = (rows < row_end) & (positive >= col0) & (positive < col0 + BN)
    special = (row0 + BM > row_end) | (col0 + BN > col_end) | (tl.max(has_positive.to(tl.int32)) > 0)
    if SELF:
        special |= (row0 < col0 + BN) & (col0 < row0 + BM)
    if UPPER:
        special |= col0 < row0 + BM
    if row_ids is not None:
        special |= row0 >= 0
    if special:
        at_positive = positive[:, None] == cols[None, :]
        if PICK:
            p = tl.sum(tl.where(at_positive, s, 0.0), axis=1).to(tl.float64) / unit
            tl.store(pos + rows, tl.where(p == float("inf"), float("nan"), p), mask=has_positive)
        excluded = at_positive | (rows >= row_end)[:, None] | (cols >= col_end)[None, :]
        if SELF:
            excluded |= rows[:, None] == cols[None, :]
        if UPPER:
            excluded |= rows[:, None] >= cols[None, :]
        if row_ids is not None:
            equal = equal_ids(row_ids, col_ids, rows, row_end, cols, col_end)
            if EQUAL_IDS == "exclude":
                excluded |= equal
            elif EQUAL_IDS == "only":
                excluded |= ~equal
            else:
                s = tl.where(equal, -s, s)
        s = tl.where(excluded, float("-inf"), s)
    return s


@triton.jit
def power(s, FAST: tl.constexpr):
    """exp of logits: base 2 where they are in units of log 2 (FAST), base e else."""
    return tl.exp2(s) if FAST else tl.exp(s)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1], to full precision (Kahan): the rounding of 1 + u cancels in log(w) / (w - 1)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def finite(reference):
    """A maximum to subtract: 0 where nothing is left (-inf), which gives exp(-inf) = 0 and not NaN."""
    return tl.where(reference == float("-inf"), 0.0, reference)
