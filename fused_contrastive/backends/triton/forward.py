"""The forward kernels: statistics of tiles, and their merging into those of the whole matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_contrastive.backends.triton.tiles import (
    CELL,
    LN_2,
    LOG2_E,
    depth,
    finite,
    logits,
    power,
    products,
    tile_at,
    tile_of,
)

LOST = tl.constexpr(1e-20)  # a sum of exp against the tile's maximum below this has lost its terms to underflow


@triton.jit(do_not_specialize=["M", "N", "stride_references", "row_begin", "row_end", "col_begin", "col_end"])
def tile_statistics(
    x, y, given, scale, targets, col_bias, row_ids, col_ids, pos, row_max, row_sum, col_max, col_sum, kept, references,
    M, N, D, stride_x, stride_y, stride_given, stride_kept, stride_references,
    row_begin, row_end, col_begin, col_end,
    SELF: tl.constexpr, UPPER: tl.constexpr, EQUAL_IDS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    FAST: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of S per program: the positives' logits, and of every row and column a maximum and a sum of exp.

    Partials of the block [row_begin, row_end) x [col_begin, col_end): row_* (tiles across, height), col_* (tiles down,
    width). Where nothing is left of a row, its maximum is -inf and its sum 0. The products come from ``given``, a
    block of them, or are made here.

    FAST takes one exponential per logit, against the tile's maximum, for both directions; where that is so far above a
    row or column that its sum is lost, the tile is done again against their own maxima.

    ``kept``, if any, gets this block for the backward: with FAST the exponentials in its dtype, and ``references`` the
    maximum that they are relative to, NaN where the tile must be made again; else the products.
    """
    height = row_end - row_begin
    width = col_end - col_begin
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(width, BN), GROUP)
    row0 = row_begin + tile_m * BM
    col0 = col_begin + tile_n * BN
    unit = LOG2_E if FAST else 1.0
    deep = depth(D, row0, col0, BN, UPPER)

    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    row_out = tile_n.to(tl.int64) * height + (rows - row_begin)
    col_out = tile_m.to(tl.int64) * width + (cols - col_begin)

    if given is not None:
        where, inside = tile_of(given, stride_given, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
        acc = tl.load(where, mask=inside, other=0.0)
    else:
        acc = products(x, y, row0, col0, M, N, deep, stride_x, stride_y, BM, BN, BK, TMA, PRECISION)
        if kept is not None and not FAST:
            where, inside = tile_of(kept, stride_kept, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
            tl.store(where, acc, mask=inside)
    s = logits(
        acc, scale, targets, col_bias, row_ids, col_ids, pos, row0, row_end, col0, col_end, unit, SELF, UPPER,
        EQUAL_IDS, True, BM, BN,
    )  # fmt: skip
    lost = True
    if FAST:
        top = tl.max(s)
        e = power(s - finite(top), FAST)
        least = 1.0
        if ROWS:
            total = tl.sum(e, axis=1)
            least = tl.min(tl.where(rows < row_end, total, 1.0))
            tl.store(row_max + row_out, tl.full((BM,), 0.0, tl.float32) + top, mask=rows < row_end)
            tl.store(row_sum + row_out, total, mask=rows < row_end)
        if COLS:
            total = tl.sum(e, axis=0)
            present = cols < col_end
            if col_bias is not None:  # a column left empty has lost nothing
                present &= tl.load(col_bias + cols, mask=present, other=0.0) != float("-inf")
            least = tl.minimum(least, tl.min(tl.where(present, total, 1.0)))
            tl.store(col_max + col_out, tl.full((BN,), 0.0, tl.float32) + top, mask=cols < col_end)
            tl.store(col_sum + col_out, total, mask=cols < col_end)
        lost = least < LOST
        if kept is not None:
            where, inside = tile_of(kept, stride_kept, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
            tl.store(where, e.to(kept.dtype.element_ty), mask=inside)
            cell_rows = row0 // CELL + tl.arange(0, BM // CELL)
            cell_cols = col0 // CELL + tl.arange(0, BN // CELL)
            where = cell_rows.to(tl.int64)[:, None] * stride_references + cell_cols[None, :]
            inside = (cell_rows * CELL < row_end)[:, None] & (cell_cols * CELL < col_end)[None, :]
            reference = tl.where(lost, float("nan"), finite(top))
            tl.store(references + where, tl.zeros((BM // CELL, BN // CELL), tl.float32) + reference, mask=inside)
    if lost:
        if FAST:  # the products again: keeping them would cost every tile the registers
            acc = products(x, y, row0, col0, M, N, deep, stride_x, stride_y, BM, BN, BK, TMA, PRECISION)
            s = logits(
                acc, scale, targets, col_bias, row_ids, col_ids, pos, row0, row_end, col0, col_end, unit, SELF,
                UPPER, EQUAL_IDS, False, BM, BN,
            )  # fmt: skip
        if ROWS:
            row_top = tl.max(s, axis=1)
            tl.store(row_max + row_out, row_top, mask=rows < row_end)
            tl.store(row_sum + row_out, tl.sum(power(s - finite(row_top)[:, None], FAST), axis=1), mask=rows < row_end)
        if COLS:
            col_top = tl.max(s, axis=0)
            tl.store(col_max + col_out, col_top, mask=cols < col_end)
            tl.store(col_sum + col_out, tl.sum(power(s - finite(col_top)[None, :], FAST), axis=0), mask=cols < col_end)


@triton.jit
def _merge_one(
    part_max, part_sum, total_max, total_sum, value, parts, length, known,
    FAST: tl.constexpr, PLAIN: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    top = tl.load(total_max + i, mask=i < known, other=float("-inf"))
    total = tl.load(total_sum + i, mask=i < known, other=0.0)
    for part0 in range(0, parts, PARTS):
        p = part0 + tl.arange(0, PARTS)
        inside = (p < parts)[:, None] & (i < length)[None, :]
        where = p.to(tl.int64)[:, None] * length + i[None, :]
        tops = tl.load(part_max + where, mask=inside, other=float("-inf"))
        sums = tl.load(part_sum + where, mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(tops, axis=0))
        added = tl.sum((sums * power(tops - finite(higher)[None, :], FAST)).to(tl.float64), axis=0)
        total = total * power(top - finite(higher), FAST).to(tl.float64) + added
        top = higher
    tl.store(total_max + i, top, mask=i < length)
    tl.store(total_sum + i, total, mask=i < length)
    high = top.to(tl.float64)
    if PLAIN:
        log = total
    else:
        log = (high + tl.log2(total)) * LN_2 if FAST else high + tl.log(total)
    tl.store(value + i, log, mask=i < length)


@triton.jit(do_not_specialize=["tiles_m", "tiles_n", "height", "width", "known_height", "known_width"])
def merge(
    row_max, row_sum, row_total_max, row_total_sum, row, col_max, col_sum, col_total_max, col_total_sum, col,
    tiles_m, tiles_n, height, width, known_height, known_width,
    FAST: tl.constexpr, PLAIN: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Adds a block's partials to the running maxima and sums, in order; row, col = maximum + log(sum).

    Axis 1 of the grid is the direction: 0 rows, 1 columns; None where it is not asked. known_* is 0 for a direction's
    first block, whose totals hold nothing yet, and its length after. PLAIN: the maxima are 0 and the values are the
    sums. Sums and values are float64: next to a maximum of 1000, float32 would round log(sum) to 6e-5.
    """
    if tl.program_id(1) == 0:
        if row is not None:
            _merge_one(
                row_max, row_sum, row_total_max, row_total_sum, row, tiles_n, height, known_height, FAST, PLAIN,
                PARTS, LENGTH,
            )  # fmt: skip
    elif col is not None:
        _merge_one(
            col_max, col_sum, col_total_max, col_total_sum, col, tiles_m, width, known_width, FAST, PLAIN,
            PARTS, LENGTH,
        )  # fmt: skip
