"""The backward kernels: a block of G from its products, and the last pass over the feature gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_contrastive.backends.triton.tiles import (
    CELL,
    LOG2_E,
    depth,
    finite,
    logits,
    power,
    products,
    tile_at,
    tile_of,
)

REACH = tl.constexpr(60.0)  # binary orders of magnitude that normalisers of one tile may differ by for one exponential


@triton.jit
def _normaliser(value, i, inside, unit):
    """log-normalisers in the logits' units as a sum of two float32; -inf where nothing was left."""
    log = tl.load(value + i, mask=inside, other=float("-inf")) * unit
    high = log.to(tl.float32)
    return high, tl.where(high == float("-inf"), 0.0, log - high).to(tl.float32)


@triton.jit
def _range(value, i, inside, unit):
    """The largest and the smallest normaliser of a tile, those of rows with nothing left apart."""
    high, _ = _normaliser(value, i, inside, unit)
    return tl.max(high), tl.min(tl.where(high == float("-inf"), float("inf"), high))


@triton.jit
def _multiplier(value, g, i, inside, unit, factor, reference, FAST: tl.constexpr):
    """What exp(S - reference) is multiplied by to be g exp(S - value) factor."""
    high, low = _normaliser(value, i, inside, unit)
    by = tl.where(high == float("-inf"), 0.0, power((reference - high) - low, FAST))
    return tl.load(g + i, mask=inside, other=0.0).to(tl.float32) * factor * by


@triton.jit
def _weights(s, value, g, i, inside, unit, factor, AXIS: tl.constexpr, FAST: tl.constexpr):
    """g exp(S - value) factor, the vectors along rows (AXIS 0) or columns (AXIS 1)."""
    high, low = _normaliser(value, i, inside, unit)
    high = finite(high)  # where nothing was left every logit is -inf
    g = tl.load(g + i, mask=inside, other=0.0).to(tl.float32) * factor
    z = s - tl.expand_dims(high, 1 - AXIS)
    if not FAST:  # for half-precision features the lower part is far below what their products are good for
        z -= tl.expand_dims(low, 1 - AXIS)
    return tl.expand_dims(g, 1 - AXIS) * power(z, FAST)


@triton.jit
def factor_of(largest, TOP: tl.constexpr):
    """What G is multiplied by, so that its largest entries come near TOP; 1 where it needs no such care."""
    factor = 1.0
    if largest is not None:
        factor = TOP / tl.load(largest).to(tl.float32)
    return factor


@triton.jit(do_not_specialize=["M", "N", "stride_references", "row_begin", "row_end", "col_begin", "col_end"])
def tile_gradient(
    x, y, given, kept, references, scale, targets, col_bias, row_ids, col_ids, row, col, g_row, g_col, largest, out,
    M, N, D, stride_x, stride_y, stride_given, stride_kept, stride_references, stride_out,
    row_begin, row_end, col_begin, col_end,
    SELF: tl.constexpr, UPPER: tl.constexpr, EQUAL_IDS: tl.constexpr, FAST: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, TOP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """G[i, j] = g_row[i] exp(S[i, j] - row[i]) + g_col[j] exp(S[i, j] - col[j]), 0 where excluded, times TOP / largest.

    One tile per program, of the block [row_begin, row_end) x [col_begin, col_end) that ``out`` holds. ``given`` is this
    block's products, ``kept`` its exponentials relative to ``references``; without either, the products are made here.

    FAST takes one exponential, e = exp(S - reference), and multiplies it by a vector for the rows plus one for the
    columns, unless some normaliser of the tile is so far below the reference that this could overflow. The forward
    keeps a tile's exponentials only where none is.
    """
    tile_m, tile_n = tile_at(
        tl.program_id(0), tl.cdiv(row_end - row_begin, BM), tl.cdiv(col_end - col_begin, BN), GROUP
    )
    row0 = row_begin + tile_m * BM
    col0 = col_begin + tile_n * BN
    unit = LOG2_E if FAST else 1.0
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)

    # Vectors are loaded when needed, here and below: kept through the products they would take the registers.
    reference = float("-inf")
    least = float("inf")
    if FAST:
        if g_row is not None:
            highest, lowest = _range(row, rows, rows < row_end, unit)
            reference = tl.maximum(reference, highest)
            least = tl.minimum(least, lowest)
        if g_col is not None:
            highest, lowest = _range(col, cols, cols < col_end, unit)
            reference = tl.maximum(reference, highest)
            least = tl.minimum(least, lowest)
    reference = finite(reference)
    near = False
    if FAST:
        near = reference - least < REACH
    is_kept = False
    if kept is not None:
        of_tile = tl.load(references + (row0 // CELL).to(tl.int64) * stride_references + col0 // CELL)
        is_kept = of_tile == of_tile
        near = near | is_kept
        reference = tl.where(is_kept, of_tile, reference)

    if given is not None:
        where, inside = tile_of(given, stride_given, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
        s = tl.load(where, mask=inside, other=0.0)
    elif kept is not None:
        where, inside = tile_of(kept, stride_kept, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
        s = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    else:
        s = tl.zeros((BM, BN), tl.float32)
    if not is_kept:
        if given is None:
            deep = depth(D, row0, col0, BN, UPPER)
            s = products(x, y, row0, col0, M, N, deep, stride_x, stride_y, BM, BN, BK, TMA, PRECISION)
        s = logits(
            s, scale, targets, col_bias, row_ids, col_ids, None, row0, row_end, col0, col_end, unit, SELF, UPPER,
            EQUAL_IDS, False, BM, BN,
        )  # fmt: skip
        if near:
            s = power(s - reference, FAST)
    # s: logits, or where ``near`` their exponentials relative to the reference.

    factor = factor_of(largest, TOP)
    if near:
        if g_row is None:
            s *= _multiplier(col, g_col, cols, cols < col_end, unit, factor, reference, FAST)[None, :]
        elif g_col is None:
            s *= _multiplier(row, g_row, rows, rows < row_end, unit, factor, reference, FAST)[:, None]
        else:
            a = _multiplier(row, g_row, rows, rows < row_end, unit, factor, reference, FAST)
            b = _multiplier(col, g_col, cols, cols < col_end, unit, factor, reference, FAST)
            s *= a[:, None] + b[None, :]
    elif g_row is None:
        s = _weights(s, col, g_col, cols, cols < col_end, unit, factor, 1, FAST)
    elif g_col is None:
        s = _weights(s, row, g_row, rows, rows < row_end, unit, factor, 0, FAST)
    else:
        # Columns first: the other way round, sm_90 runs out of registers.
        s = _weights(s, col, g_col, cols, cols < col_end, unit, factor, 1, FAST) + _weights(
            s, row, g_row, rows, rows < row_end, unit, factor, 0, FAST
        )
    where, inside = tile_of(out, stride_out, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
    tl.store(where, s.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "paired"])
def finish(
    grad, own, other, g_pos, targets, scale, largest, out, dots, rows, first, paired, D, stride_own, stride_other,
    TOP: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums over the negatives, grad (rows, D) -> gradient of the features ``own``: out = scale * (grad + positives).

    These are the rows from ``first`` on; row i < paired gains g_pos[i] times the row of ``other`` that is its positive.
    dots gets each program's part of sum(own * (grad + positives)), the gradient of the scale. One pass, after the
    products: as one more term among thousands of small ones, the positive would cost the sum its low bits.
    """
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = local < rows
    local = local.to(tl.int64)
    i = local + first
    factor = 1.0 / factor_of(largest, TOP)
    with_positive = inside & (i < paired)
    g = tl.zeros((ROWS,), tl.float32)
    partner = i
    if g_pos is not None:
        g = tl.load(g_pos + i, mask=with_positive, other=0.0).to(tl.float32)
        if targets is not None:
            partner = tl.load(targets + i, mask=with_positive, other=0)
    by = tl.load(scale)
    dot = tl.zeros((ROWS,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        mask = inside[:, None] & (d < D)[None, :]
        total = tl.load(grad + local[:, None] * D + d[None, :], mask=mask, other=0.0) * factor
        if g_pos is not None:
            mine = with_positive[:, None] & (d < D)[None, :]
            pair = tl.load(other + partner[:, None] * stride_other + d[None, :], mask=mine, other=0.0)
            total += g[:, None] * pair.to(tl.float32)
        if dots is not None:
            features = tl.load(own + i[:, None] * stride_own + d[None, :], mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(features * total, axis=1)
        if out is not None:
            tl.store(out + i[:, None] * D + d[None, :], (total * by).to(out.dtype.element_ty), mask=mask)
    if dots is not None:
        tl.store(dots + tl.program_id(0), tl.sum(dot.to(tl.float64), axis=0))
