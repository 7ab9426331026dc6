"""The forward kernels: they compute statistics of tiles of S, which `totals.py` adds up."""

from __future__ import annotations

import inspect

import triton
import triton.language as tl

from fused_contrastive.backends.triton.tiles import (
    CELL,
    HEADROOM,
    HUGE,
    added_up,
    below,
    compared,
    count_above,
    excluded,
    finite,
    load_tile,
    logits,
    of_teacher,
    power,
    products,
    related,
    store_tile,
    tile_at,
)
from fused_contrastive.backends.triton.totals import store_partials

# A sum of exponentials below this, 2^-88 where the largest is 2^HEADROOM, has lost terms to underflow.
LOST = tl.constexpr(3e-27)
# How many binary orders the references of a strip's tiles may lie apart: the factor between them is a normal float32.
APART = tl.constexpr(120.0)


# Triton 3.4 lacks disable_licm: what it moves out of a loop over tiles then takes registers during the whole loop.
KEEPS_INVARIANTS_INSIDE = tl.constexpr("disable_licm" in inspect.signature(tl.range.__init__).parameters)


@triton.jit
def _add_scaled(total, maximum, more, its_maximum, MODE: tl.constexpr):
    """Sums of exponentials against two maxima -> against the higher one. No factor may underflow: see APART."""
    higher = tl.maximum(maximum, its_maximum)
    by, its = power(maximum - finite(higher), MODE), power(its_maximum - finite(higher), MODE)
    return total * by + more * its, higher


@triton.jit
def _strip_of(index, row_begin, row_end, col_begin, col_end, MODE: tl.constexpr, TILE: tl.constexpr):
    """Where strip ``index`` lies, which is TILE.strip tiles down one column of tiles.

    Returns its row among the strips, its column among the tiles, the row and column of its first pair, and how many of
    its tiles count: none does that lies beyond the last row or, with ``upper``, below the diagonal.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    STRIP: tl.constexpr = TILE.strip
    strips = tl.cdiv(row_end - row_begin, BM * STRIP)
    strip, tile_n = tile_at(index, strips, tl.cdiv(col_end - col_begin, BN), TILE.group)
    row0 = row_begin + strip * (BM * STRIP)
    col0 = col_begin + tile_n * BN
    end = row_end
    if MODE.upper:
        end = min(row_end, col0 + BN - 1)
    return strip, tile_n, row0, col0, min(tl.cdiv(max(end - row0, 0), BM), STRIP)


@triton.jit
def _tile_of_strip(
    so_far, x, y, mask, pos, rows_to, cols_to, kept, stride_kept, references, stride_references, shape, bounds,
    tile_n, row0, col0, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes the statistics of one tile of a strip.

    so_far, and the result, hold the columns' sums, the highest and lowest reference of a tile, and the least row sums.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    FOLD: tl.constexpr = TILE.fold
    col_total, highest, lowest, least = so_far
    row_begin, row_end, col_begin, col_end = bounds
    acc = products(x, y, row0, col0, shape, MODE, TILE)
    s, c = logits(acc, mask, pos, row0, row_end, col0, col_end, MODE)
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    count_above(s * c, mask.row_reference, mask.row_above, mask.row_highest, rows, rows < row_end, 0, MODE)
    count_above(s * c, mask.col_reference, mask.col_above, mask.col_highest, cols, cols < col_end, 1, MODE)
    top = tl.max(s) * c
    reference = finite(top) - HEADROOM
    e = tl.exp2(s * c - reference)
    maximum = tl.where(top == float("-inf"), top, reference)
    lowest = tl.minimum(lowest, tl.where(top == float("-inf"), float("inf"), reference))
    if rows_to is not None:
        total = tl.sum(e, axis=1)
        store_partials(
            rows_to, tile_n, row_end - row_begin, rows - row_begin, tl.zeros((BM,), tl.float32) + maximum, total,
            rows < row_end,
        )  # fmt: skip
        # If all pairs of a tile are excluded, none of its sums is lost.
        total = tl.where(rows < row_end, total + tl.where(top == float("-inf"), 1.0, 0.0), 1.0)
        if FOLD:
            total = tl.min(tl.min(tl.reshape(total, (BM // (16 * FOLD), FOLD, 2, 8)), axis=2), axis=0)
        least = tl.minimum(least, total)
    if cols_to is not None:
        if FOLD:  # the rows of one thread, which in the matrix units' layout lie 8 apart
            part = tl.sum(tl.sum(tl.reshape(e, (BM // (16 * FOLD), FOLD, 2, 8, BN)), axis=2), axis=0)
        else:
            part = tl.sum(e, axis=0)
        col_total, highest = _add_scaled(col_total, highest, part, maximum, MODE)
    else:
        highest = tl.maximum(highest, maximum)
    if kept is not None:
        i, j, height = row0 - row_begin, col0 - col_begin, row_end - row_begin
        store_tile(kept, stride_kept, i, j, height, e, MODE.tma)
        cell_rows = i // CELL + tl.arange(0, BM // CELL)
        cell_cols = j // CELL + tl.arange(0, BN // CELL)
        where = cell_rows.to(tl.int64)[:, None] * stride_references + cell_cols[None, :]
        inside = (cell_rows * CELL < height)[:, None] & (cell_cols * CELL < col_end - col_begin)[None, :]
        tl.store(references + where, tl.zeros((BM // CELL, BN // CELL), tl.float32) + reference, mask=inside)
    return col_total, highest, lowest, least


@triton.jit(do_not_specialize=["M", "N", "row_begin", "row_end", "col_begin", "col_end"])
def strip_statistics(
    x, y, mask, pos, rows_to, cols_to, lost, kept, stride_kept, references, stride_references,
    M, N, D, stride_x, stride_y, row_begin, row_end, col_begin, col_end, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Statistics of half-precision features, one exponential per logit for both directions; a strip per program.

    x (M, D), y (N, D); the block of S is [row_begin, row_end) x [col_begin, col_end), ``height`` x ``width``.
    rows_to: Partials (tiles across, height). cols_to: Partials (strips, width): the columns' sums stay in registers
    from tile to tile of the strip, and threads add theirs up at its end. Either may be None.

    A tile's exponentials are relative to one reference, HEADROOM below its maximum. ``lost`` (strips, tiles across)
    int32 is 1 for a strip in which that may be so far above some row or column that its sum has underflowed, which
    ``exact_statistics`` then checks. It is 2 if logits are too large, or too far apart, for references, else 0.
    ``kept`` (height, width), where not None, gets the exponentials, and ``references`` (cells of the block) their
    references.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    FOLD: tl.constexpr = TILE.fold
    strip, tile_n, row0, col0, tiles = _strip_of(tl.program_id(0), row_begin, row_end, col_begin, col_end, MODE, TILE)
    highest, lowest = tl.full((), float("-inf"), tl.float32), tl.full((), float("inf"), tl.float32)
    if FOLD:
        so_far = tl.zeros((FOLD, 8, BN), tl.float32), highest, lowest, tl.full((FOLD, 8), 1.0, tl.float32)
    else:
        so_far = tl.zeros((BN,), tl.float32), highest, lowest, tl.full((BM,), 1.0, tl.float32)
    shape = (M, N, D, stride_x, stride_y)
    bounds = (row_begin, row_end, col_begin, col_end)
    if KEEPS_INVARIANTS_INSIDE:
        for _ in tl.range(tiles, disable_licm=True):
            so_far = _tile_of_strip(
                so_far, x, y, mask, pos, rows_to, cols_to, kept, stride_kept, references, stride_references, shape,
                bounds, tile_n, row0, col0, MODE, TILE,
            )  # fmt: skip
            row0 += BM
    else:
        for _ in range(tiles):
            so_far = _tile_of_strip(
                so_far, x, y, mask, pos, rows_to, cols_to, kept, stride_kept, references, stride_references, shape,
                bounds, tile_n, row0, col0, MODE, TILE,
            )  # fmt: skip
            row0 += BM
    col_total, highest, lowest, least = so_far
    least_sum = tl.min(least)
    if cols_to is not None:
        if FOLD:
            col_total = tl.sum(tl.sum(col_total, axis=1), axis=0)
        cols = col0 + tl.arange(0, BN)
        store_partials(
            cols_to, strip, col_end - col_begin, cols - col_begin, tl.zeros((BN,), tl.float32) + highest,
            col_total, cols < col_end,
        )  # fmt: skip
        floor = tl.where(highest == float("-inf"), 1.0, 0.0)
        least_sum = min(least_sum, tl.min(tl.where(cols < col_end, col_total + floor, 1.0)))
    where = strip * tl.cdiv(col_end - col_begin, BN) + tile_n
    # All references lie between these two; inf - inf is NaN, which is not small either.
    serve = tl.where(tl.maximum(tl.abs(highest), tl.abs(lowest)) < HUGE, highest - lowest, float("inf")) < APART
    serve |= highest == float("-inf")
    tl.store(lost + where, tl.where(serve, (least_sum < LOST).to(tl.int32), 2))


@triton.jit
def _is_lost(mask, rows_from, cols_from, strip, tile_n, row0, col0, tiles, row_begin, row_end, col_begin, col_end,
             MODE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Whether some row or column of a strip has a pair that counts, but too small a sum. Makes no products."""
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    cols = col0 + tl.arange(0, BN)
    width = col_end - col_begin
    any_left = tl.zeros((BN,), tl.int32)
    found = tl.full((), 0, tl.int32)
    empty = (cols >= col_end)[None, :]
    if mask.col_bias is not None and not MODE.one_bias:
        empty |= (tl.load(mask.col_bias + cols, mask=cols < col_end, other=0.0) == float("-inf"))[None, :]
    for t in range(tiles):
        rows = row0 + t * BM + tl.arange(0, BM)
        left = (~(excluded(mask, rows, row_end, cols, col_end, MODE) | empty)).to(tl.int32)
        any_left = tl.maximum(any_left, tl.max(left, axis=0))
        if rows_from is not None:
            where = tile_n.to(tl.int64) * (row_end - row_begin) + rows - row_begin
            total = tl.load(rows_from.sums + where, mask=rows < row_end, other=1.0)
            found = max(found, tl.max(tl.where(total < LOST, tl.max(left, axis=1), 0)))
    if cols_from is not None:
        total = tl.load(cols_from.sums + strip.to(tl.int64) * width + cols - col_begin, mask=cols < col_end, other=1.0)
        found = max(found, tl.max(tl.where(total < LOST, any_left, 0)))
    return found > 0


@triton.jit
def _add_tile(
    s_of_rows, s_of_cols, rows_to, cols_to, col_total, col_maximum, tile_n, rows, row_begin, row_end,
    MODE: tl.constexpr,
):  # fmt: skip
    """Writes the rows' statistics of a tile of logits, and returns the columns' sums and maxima with it added."""
    if rows_to is not None:
        maximum = tl.max(s_of_rows, axis=1)
        total = tl.sum(power(s_of_rows - finite(maximum)[:, None], MODE), axis=1)
        store_partials(rows_to, tile_n, row_end - row_begin, rows - row_begin, maximum, total, rows < row_end)
    if cols_to is not None:
        maximum = tl.max(s_of_cols, axis=0)
        total = tl.sum(power(s_of_cols - finite(maximum)[None, :], MODE), axis=0)
        col_total, col_maximum = _add_scaled(col_total, col_maximum, total, maximum, MODE)
    return col_total, col_maximum


@triton.jit
def _add_teacher(
    t, s, rows_to, cols_to, col_total, col_weighted, col_maximum, tile_n, rows, row_begin, row_end, MODE: tl.constexpr
):  # fmt: skip
    """``_add_tile`` for a teacher's logits ``t``, which also adds up our logits ``s``, weighted by them."""
    s = tl.where(t == float("-inf"), 0.0, s)  # 0 * -inf would be NaN
    if rows_to is not None:
        maximum = tl.max(t, axis=1)
        e = power(t - finite(maximum)[:, None], MODE)
        store_partials(
            rows_to, tile_n, row_end - row_begin, rows - row_begin, maximum, tl.sum(e, axis=1), rows < row_end,
            tl.sum(e * s, axis=1),
        )  # fmt: skip
    if cols_to is not None:
        maximum = tl.max(t, axis=0)
        e = power(t - finite(maximum)[None, :], MODE)
        col_weighted, _ = _add_scaled(col_weighted, col_maximum, tl.sum(e * s, axis=0), maximum, MODE)
        col_total, col_maximum = _add_scaled(col_total, col_maximum, tl.sum(e, axis=0), maximum, MODE)
    return col_total, col_weighted, col_maximum


@triton.jit
def _add_sums(s, mask, rows_to, tile_n, rows, row_begin, row_end, cols, col_end, MODE: tl.constexpr):
    """Writes the rows' sums of a tile's logits of related pairs, and returns the columns' sums."""
    s = tl.where(added_up(mask, rows, row_end, cols, col_end, MODE), s, 0.0)
    if rows_to is not None:
        store_partials(
            rows_to, tile_n, row_end - row_begin, rows - row_begin, tl.zeros((s.shape[0],), tl.float32),
            tl.sum(s, axis=1), rows < row_end,
        )  # fmt: skip
    return tl.sum(s, axis=0)


@triton.jit(do_not_specialize=["M", "N", "stride_gemm", "row_begin", "row_end", "col_begin", "col_end"])
def exact_statistics(
    x, y, gemm_products, stride_gemm, mask, pos, rows_to, cols_to, related_rows_to, related_cols_to, lost, kept,
    stride_kept, M, N, D, stride_x, stride_y, row_begin, row_end, col_begin, col_end, MODE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Statistics against every row's and column's own maximum. The outputs are those of ``strip_statistics``.

    If ``lost`` is None, each program does one strip. This is the way for float32 features, whose products come from
    ``gemm_products`` (height, width) or are made here and written to ``kept`` (height, width), if that is not None; and
    for problems with limits, or with related pairs apart or added up, whose statistics or sums (Partials with maxima
    of 0) go to ``related_rows_to`` and ``related_cols_to``, as a teacher's statistics do. Otherwise there are as many
    programs as tiles across, and they do only the strips whose sums are lost.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    tiles_n = tl.cdiv(col_end - col_begin, BN)
    strips = tl.cdiv(row_end - row_begin, BM * TILE.strip)
    begin = tl.program_id(0)
    step = strips * tiles_n
    if lost is not None:
        step = tl.num_programs(0)
        # Most often nothing is lost, and all that happens here is to read the flags.
        marked = tl.full((), 0, tl.int32)
        for first in range(0, strips, 64):
            i = first + tl.arange(0, 64)
            marked += tl.sum(tl.load(lost + i * tiles_n + begin, mask=i < strips, other=0))
        begin = tl.where(marked > 0, begin, strips * tiles_n)
    shape = (M, N, D, stride_x, stride_y)
    for index in range(begin, strips * tiles_n, step):
        if lost is None:
            strip, tile_n, row0, col0, tiles = _strip_of(index, row_begin, row_end, col_begin, col_end, MODE, TILE)
        else:
            strip, tile_n = index // tiles_n, index % tiles_n
            row0, col0 = row_begin + strip * (BM * TILE.strip), col_begin + tile_n * BN
            tiles = min(tl.cdiv(row_end - row0, BM), TILE.strip)
            redo = tl.load(lost + index) > 1
            if tl.load(lost + index) == 1:
                redo = _is_lost(
                    mask, rows_to, cols_to, strip, tile_n, row0, col0, tiles, row_begin, row_end, col_begin, col_end,
                    MODE, TILE,
                )  # fmt: skip
            tiles = tl.where(redo, tiles, 0)
        cols = col0 + tl.arange(0, BN)
        col_total = tl.zeros((BN,), tl.float32)
        col_maximum = tl.full((BN,), float("-inf"), tl.float32)
        related_total, related_maximum = col_total, col_maximum
        weighted_total = col_total if MODE.teacher else None
        last = col_end
        if lost is not None:
            last = tl.where(tiles > 0, col_end, col_begin)
        for _ in range(tiles):
            if gemm_products is not None:
                acc = load_tile(
                    gemm_products, stride_gemm, row0 - row_begin, col0 - col_begin, row_end - row_begin, BM, BN, False
                )
            else:
                acc = products(x, y, row0, col0, shape, MODE, TILE)
                if kept is not None:
                    store_tile(kept, stride_kept, row0 - row_begin, col0 - col_begin, row_end - row_begin, acc, False)
            s, c = logits(acc, mask, pos, row0, row_end, col0, col_end, MODE)
            s *= c
            rows = row0 + tl.arange(0, BM)
            if MODE.equal_ids == "apart":
                apart = related(mask, rows, row_end, cols, col_end, MODE)
                if tl.max(apart.to(tl.int32)) > 0:
                    among = tl.where(apart, s, float("-inf"))
                    related_total, related_maximum = _add_tile(
                        among, among, related_rows_to, related_cols_to, related_total, related_maximum, tile_n, rows,
                        row_begin, row_end, MODE,
                    )  # fmt: skip
                    s = tl.where(apart, float("-inf"), s)
                elif related_rows_to is not None:
                    store_partials(
                        related_rows_to, tile_n, row_end - row_begin, rows - row_begin,
                        tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32), rows < row_end,
                    )  # fmt: skip
            elif MODE.equal_ids == "add":
                related_total += _add_sums(
                    s, mask, related_rows_to, tile_n, rows, row_begin, row_end, cols, col_end, MODE
                )  # fmt: skip
            at = compared(acc, mask, row0, col0, M, N, MODE)
            if MODE.teacher:
                related_total, weighted_total, related_maximum = _add_teacher(
                    of_teacher(at, mask, rows, row_end, cols, col_end, MODE), s, related_rows_to, related_cols_to,
                    related_total, weighted_total, related_maximum, tile_n, rows, row_begin, row_end, MODE,
                )  # fmt: skip
            of_rows = below(s, at, mask, mask.row_limit, rows, rows < row_end, 0)
            of_cols = below(s, at, mask, mask.col_limit, cols, cols < col_end, 1)
            count_above(of_rows, mask.row_reference, mask.row_above, mask.row_highest, rows, rows < row_end, 0, MODE)
            count_above(of_cols, mask.col_reference, mask.col_above, mask.col_highest, cols, cols < col_end, 1, MODE)
            col_total, col_maximum = _add_tile(
                of_rows, of_cols, rows_to, cols_to, col_total, col_maximum, tile_n, rows, row_begin, row_end, MODE
            )
            row0 += BM
        if cols_to is not None:
            store_partials(
                cols_to, strip, col_end - col_begin, cols - col_begin, col_maximum, col_total,
                cols < last,
            )  # fmt: skip
        if MODE.equal_ids == "add":
            related_maximum = tl.zeros((BN,), tl.float32)
        if related_cols_to is not None:
            store_partials(
                related_cols_to, strip, col_end - col_begin, cols - col_begin, related_maximum, related_total,
                cols < last, weighted_total,
            )  # fmt: skip
