"""The kernels of nested prefixes (Matryoshka); prefixes_launch.py calls them.

A program computes one tile of S for all P prefixes. One accumulator holds the tile's dot products: for each prefix in
turn it gains the products of the columns that this prefix adds to the one before, and the logits that it then gives are
reduced as those of one loss. Vectors of the rows (columns) have ``padded_m`` (``padded_n``) elements for each prefix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_contrastive.backends.triton.backward import is_far, ranges, weighted, weights_of_both
from fused_contrastive.backends.triton.forward import KEEPS_INVARIANTS_INSIDE, LOST
from fused_contrastive.backends.triton.tiles import (
    HEADROOM,
    HUGE,
    add_products,
    corner,
    finite,
    load_tile,
    logits,
    power,
    store_tile,
)
from fused_contrastive.backends.triton.totals import store_partials


@triton.jit
def _start(part, PARTS: tl.constexpr, TILE: tl.constexpr):
    """The first column that prefix ``part`` adds; for ``part`` = P, the end of the last. PARTS is in units of BK."""
    units = 0
    for k in tl.static_range(1, len(PARTS)):
        units = tl.where(part == k, PARTS[k], units)
    return units * TILE.block_k


@triton.jit
def _more_products(
    acc, x, y, gemm_products, stride_gemm, part, i, j, row0, col0, height, shape, PARTS: tl.constexpr,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile's dot products over prefix ``part``: read, or made from ``acc``, those over the prefix before."""
    if gemm_products is not None:
        acc = load_tile(
            gemm_products, stride_gemm, part * height + i, j, (part + 1) * height, acc.shape[0], acc.shape[1], False
        )
    else:
        begin, end = _start(part, PARTS, TILE), _start(part + 1, PARTS, TILE)
        acc = add_products(acc, x, y, row0, col0, begin, end, shape, MODE, TILE)
    return acc


@triton.jit
def _logits(
    acc, mask, row_factors, col_factors, row_at, col_at, pos, row0, row_end, col0, col_end, MODE: tl.constexpr
):  # fmt: skip
    """A tile's logits, -inf where excluded, from its products. ``pos``, where not None, gets the positives' logits."""
    c = tl.load(mask.scale) * (1.4426950408889634 if MODE.half else 1.0)
    if row_factors is None:
        s = acc * c
    else:
        s = acc * (tl.load(row_factors + row_at + tl.arange(0, acc.shape[0])) * c)[:, None]
        s *= tl.load(col_factors + col_at + tl.arange(0, acc.shape[1]))[None, :]
    s, _ = logits(s, mask, pos, row0, row_end, col0, col_end, MODE, True)
    return s


@triton.jit
def _exact_sums(s, AXIS: tl.constexpr, MODE: tl.constexpr):
    maximum = tl.max(s, axis=AXIS)
    return maximum, tl.sum(power(s - tl.expand_dims(finite(maximum), AXIS), MODE), axis=AXIS)


@triton.jit
def _sums(s, cols_to, MODE: tl.constexpr):
    """For the rows of a tile of logits, references and the sums of exp(logit - reference); for its columns too, unless
    ``cols_to`` is None.

    In half precision one exponential per logit serves rows and columns, as in ``strip_statistics``. If a sum is lost to
    underflow, each direction gets exponentials of its own, as it does in tiles that reach beyond the end of S.
    """
    if MODE.half:
        reference = finite(tl.max(s)) - HEADROOM
        e = power(s - reference, MODE)
        row_top = tl.zeros((s.shape[0],), tl.float32) + reference
        col_top = tl.zeros((s.shape[1],), tl.float32) + reference
        row_sum = tl.sum(e, axis=1)
        least = tl.min(row_sum)
        col_sum = row_sum
        if cols_to is not None:
            col_sum = tl.sum(e, axis=0)
            least = tl.minimum(least, tl.min(col_sum))
        if ~((least >= LOST) & (tl.abs(reference) < HUGE)):  # true for NaN
            row_top, row_sum = _exact_sums(s, 1, MODE)
            if cols_to is not None:
                col_top, col_sum = _exact_sums(s, 0, MODE)
    else:
        row_top, row_sum = _exact_sums(s, 1, MODE)
        col_top, col_sum = row_top, row_sum
        if cols_to is not None:
            col_top, col_sum = _exact_sums(s, 0, MODE)
    return row_top, row_sum, col_top, col_sum


@triton.jit
def _statistics_of_part(
    acc, part, x, y, gemm_products, stride_gemm, mask, row_factors, col_factors, pos, rows_to, cols_to, shape, bounds,
    i, j, row_at, col_at, pos_at, PARTS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes a tile's partial statistics of one prefix, and returns the tile's dot products over that prefix."""
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    row_begin, row_end, col_begin, col_end = bounds
    height, width = row_end - row_begin, col_end - col_begin
    row0, col0 = row_begin + i, col_begin + j
    acc = _more_products(
        acc, x, y, gemm_products, stride_gemm, part, i, j, row0, col0, height, shape, PARTS, MODE, TILE
    )
    s = _logits(
        acc, mask, row_factors, col_factors, row_at, col_at, pos + pos_at, row0, row_end, col0, col_end, MODE
    )  # fmt: skip
    local_rows, local_cols = i + tl.arange(0, BM), j + tl.arange(0, BN)
    rows_inside, cols_inside = local_rows < height, local_cols < width
    row_top, row_sum, col_top, col_sum = _sums(s, cols_to, MODE)
    across, down = tl.cdiv(width, BN), tl.cdiv(height, BM)
    store_partials(rows_to, part * across + j // BN, height, local_rows, row_top, row_sum, rows_inside)
    if cols_to is not None:
        store_partials(cols_to, part * down + i // BM, width, local_cols, col_top, col_sum, cols_inside)
    return acc


@triton.jit(
    do_not_specialize=[
        "M", "N", "row_begin", "row_end", "col_begin", "col_end", "padded_m", "padded_n"
    ]
)  # fmt: skip
def prefix_statistics(
    x, y, gemm_products, stride_gemm, mask, row_factors, col_factors, pos, rows_to, cols_to, M, N, D, stride_x,
    stride_y, row_begin, row_end, col_begin, col_end, padded_m, padded_n, PARTS: tl.constexpr, MODE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Statistics of P prefixes of x (M, D) and y (N, D) in the block [row_begin, row_end) x [col_begin, col_end).

    ``gemm_products`` (P, height, padded width) float32 are the dot products, or None: then they are made here. The
    factors, (P, padded_m) and (P, padded_n) float32, are one over the norms of the prefixes, or None for 1. pos (P, M)
    float64 gets the positives' logits. rows_to: Partials (P, tiles across, height); cols_to: Partials (P, tiles down,
    width), or None.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    i, j = corner(row_end - row_begin, col_end - col_begin, TILE)
    shape = (M, N, D, stride_x, stride_y)
    bounds = (row_begin, row_end, col_begin, col_end)
    acc = tl.zeros((BM, BN), tl.float32)
    row_at, col_at = (row_begin + i).to(tl.int64), (col_begin + j).to(tl.int64)
    pos_at = (row_begin * 0).to(tl.int64)
    if KEEPS_INVARIANTS_INSIDE:
        for part in tl.range(0, len(PARTS) - 1, disable_licm=True):
            acc = _statistics_of_part(
                acc, part, x, y, gemm_products, stride_gemm, mask, row_factors, col_factors, pos, rows_to, cols_to,
                shape, bounds, i, j, row_at, col_at, pos_at, PARTS, MODE, TILE,
            )  # fmt: skip
            row_at += padded_m
            col_at += padded_n
            pos_at += M
    else:
        for part in range(0, len(PARTS) - 1):
            acc = _statistics_of_part(
                acc, part, x, y, gemm_products, stride_gemm, mask, row_factors, col_factors, pos, rows_to, cols_to,
                shape, bounds, i, j, row_at, col_at, pos_at, PARTS, MODE, TILE,
            )  # fmt: skip
            row_at += padded_m
            col_at += padded_n
            pos_at += M


@triton.jit
def _gradient_of_part(
    acc, part, x, y, gemm_products, stride_gemm, mask, rows, cols, row_factors, col_factors, row_dots, col_dots, out,
    stride_out, shape, bounds, i, j, row_at, col_at, PARTS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """Writes a tile of one prefix's G times the factors, and sums of G times the cosines. Returns the dot products."""
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    row_begin, row_end, col_begin, col_end = bounds
    height, width = row_end - row_begin, col_end - col_begin
    row0, col0 = row_begin + i, col_begin + j
    acc = _more_products(
        acc, x, y, gemm_products, stride_gemm, part, i, j, row0, col0, height, shape, PARTS, MODE, TILE
    )
    s = _logits(acc, mask, row_factors, col_factors, row_at, col_at, None, row0, row_end, col0, col_end, MODE)
    # Where this prefix's rows and columns end in the vectors of the Directions.
    row_stop, col_stop = row_at + (row_end - row0), col_at + (col_end - col0)
    i_at, j_at = row_at + tl.arange(0, BM), col_at + tl.arange(0, BN)
    if MODE.half:
        row_segment, col_segment = row_at // SEGMENT, col_at // SEGMENT
        if is_far(rows, cols, row_segment, col_segment):
            g = weights_of_both(s, acc, mask, rows, cols, i_at, row_stop, j_at, col_stop, MODE)
        else:
            highest, _ = ranges(rows, cols, row_segment, col_segment)
            reference = highest - HEADROOM
            g = weighted(power(s - reference, MODE), rows, cols, row_at, row_stop, col_at, col_stop, reference)
    else:
        g = weights_of_both(s, acc, mask, rows, cols, i_at, row_stop, j_at, col_stop, MODE)
    if row_factors is not None:
        g *= tl.load(row_factors + i_at)[:, None]
        g *= tl.load(col_factors + j_at)[None, :]
    if row_dots is not None or col_dots is not None:
        # G is rounded as in the products with the features, whose part along a feature these sums must cancel.
        terms = g.to(out.dtype.element_ty).to(tl.float32) * acc
        if gemm_products is not None:  # beyond the last column the GEMM's memory may hold NaN
            terms = tl.where(g == 0, 0.0, terms)
        if row_dots is not None:
            local = i + tl.arange(0, BM)
            where = (part * tl.cdiv(width, BN) + j // BN).to(tl.int64) * height + local
            tl.store(row_dots + where, tl.sum(terms, axis=1), mask=local < height)
        if col_dots is not None:
            local = j + tl.arange(0, BN)
            where = (part * tl.cdiv(height, BM) + i // BM).to(tl.int64) * width + local
            tl.store(col_dots + where, tl.sum(terms, axis=0), mask=local < width)
    store_tile(out, stride_out, part * height + i, j, (part + 1) * height, g, False)
    return acc


@triton.jit(
    do_not_specialize=[
        "M", "N", "row_begin", "row_end", "col_begin", "col_end", "padded_m", "padded_n"
    ]
)  # fmt: skip
def prefix_gradients(
    x, y, gemm_products, stride_gemm, mask, rows, cols, row_factors, col_factors, row_dots, col_dots, out, stride_out,
    M, N, D, stride_x, stride_y, row_begin, row_end, col_begin, col_end, padded_m, padded_n, PARTS: tl.constexpr,
    MODE: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """What multiplies, in dx and dy, the columns that prefix k adds: out[k] = sum over l >= k of F_l G_l.

    G_l is the gradient of prefix l's logits, 0 at the positives; F_l (i, j) is the product of row i's and column j's
    factors. ``out`` (P, height, padded width), in the dtype of the features, may be the memory of ``gemm_products``.
    rows, cols: Directions of (P, padded_m) and (P, padded_n) elements; one of them is None if it gets no gradient.
    row_dots (P, tiles across, height) and col_dots (P, tiles down, width) float32, or None: each tile's sums of G_l
    times the cosines of prefix l.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    LAST: tl.constexpr = len(PARTS) - 2
    height = row_end - row_begin
    i, j = corner(height, col_end - col_begin, TILE)
    shape = (M, N, D, stride_x, stride_y)
    bounds = (row_begin, row_end, col_begin, col_end)
    acc = tl.zeros((BM, BN), tl.float32)
    row_at, col_at = (row_begin + i).to(tl.int64), (col_begin + j).to(tl.int64)
    if KEEPS_INVARIANTS_INSIDE:
        for part in tl.range(0, LAST + 1, disable_licm=True):
            acc = _gradient_of_part(
                acc, part, x, y, gemm_products, stride_gemm, mask, rows, cols, row_factors, col_factors, row_dots,
                col_dots, out, stride_out, shape, bounds, i, j, row_at, col_at, PARTS, MODE, TILE, SEGMENT,
            )  # fmt: skip
            row_at += padded_m
            col_at += padded_n
    else:
        for part in range(0, LAST + 1):
            acc = _gradient_of_part(
                acc, part, x, y, gemm_products, stride_gemm, mask, rows, cols, row_factors, col_factors, row_dots,
                col_dots, out, stride_out, shape, bounds, i, j, row_at, col_at, PARTS, MODE, TILE, SEGMENT,
            )  # fmt: skip
            row_at += padded_m
            col_at += padded_n
    if LAST > 0:
        tl.debug_barrier()  # a thread may load what another thread of the program has stored
        total = load_tile(out, stride_out, LAST * height + i, j, (LAST + 1) * height, BM, BN, False).to(tl.float32)
        for back in tl.range(1, LAST + 1, num_stages=1):
            part = LAST - back
            total += load_tile(out, stride_out, part * height + i, j, (part + 1) * height, BM, BN, False).to(tl.float32)
            store_tile(out, stride_out, part * height + i, j, (part + 1) * height, total, False)
