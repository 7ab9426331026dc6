"""The kernels of the softplus reduction: sums of log(1 + exp(S)) over tiles, and a block of its G."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_contrastive.backends.triton.backward import factor_of
from fused_contrastive.backends.triton.tiles import equal_ids, log1p_unit, logits, products, tile_at, tile_of


@triton.jit
def _slope(s, row_ids, col_ids, rows, row_end, cols, col_end):
    """sigmoid(s), the derivative of softplus by the logit; its sign changes with that of pairs with equal ids."""
    u = tl.exp(-tl.abs(s))
    slope = tl.where(s > 0, 1.0, u) / (1.0 + u)
    if row_ids is not None:
        slope = tl.where(equal_ids(row_ids, col_ids, rows, row_end, cols, col_end), -slope, slope)
    return slope


@triton.jit(do_not_specialize=["M", "N", "row_begin", "row_end", "col_begin", "col_end"])
def sigmoid_statistics(
    x, y, given, scale, targets, col_bias, row_ids, col_ids, pos, row_max, row_sum, kept,
    M, N, D, stride_x, stride_y, stride_given, stride_kept, row_begin, row_end, col_begin, col_end,
    SELF: tl.constexpr, UPPER: tl.constexpr, EQUAL_IDS: tl.constexpr, FAST: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of S per program: the positives' logits, and of every row the sum of softplus; the maxima are 0.

    ``kept``, if any, gets this block for the backward: with FAST (half-precision features) the signed sigmoids, else
    the products.
    """
    height = row_end - row_begin
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(height, BM), tl.cdiv(col_end - col_begin, BN), GROUP)
    row0 = row_begin + tile_m * BM
    col0 = col_begin + tile_n * BN
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    if given is not None:
        where, inside = tile_of(given, stride_given, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
        acc = tl.load(where, mask=inside, other=0.0)
    else:
        acc = products(x, y, row0, col0, M, N, D, stride_x, stride_y, BM, BN, BK, TMA, PRECISION)
    if kept is not None and not FAST:
        where, inside = tile_of(kept, stride_kept, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
        tl.store(where, acc, mask=inside)
    s = logits(
        acc, scale, targets, col_bias, row_ids, col_ids, pos, row0, row_end, col0, col_end, 1.0, SELF, UPPER, EQUAL_IDS,
        True, BM, BN,
    )  # fmt: skip
    if kept is not None and FAST:
        where, inside = tile_of(kept, stride_kept, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
        slope = _slope(s, row_ids, col_ids, rows, row_end, cols, col_end)
        tl.store(where, slope.to(kept.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(s > 0, s, 0.0) + log1p_unit(tl.exp(-tl.abs(s))), axis=1)
    row_out = tile_n.to(tl.int64) * height + (rows - row_begin)
    tl.store(row_max + row_out, tl.zeros((BM,), tl.float32), mask=rows < row_end)
    tl.store(row_sum + row_out, total, mask=rows < row_end)


@triton.jit(do_not_specialize=["M", "N", "row_begin", "row_end", "col_begin", "col_end"])
def sigmoid_gradient(
    x, y, given, kept, scale, targets, col_bias, row_ids, col_ids, g_row, largest, out,
    M, N, D, stride_x, stride_y, stride_given, stride_kept, stride_out, row_begin, row_end, col_begin, col_end,
    SELF: tl.constexpr, UPPER: tl.constexpr, EQUAL_IDS: tl.constexpr, FAST: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, TOP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """G[i, j] = g_row[i] sigmoid(S[i, j]), signed, 0 where excluded, times TOP / largest: one tile of a block of it.

    ``given`` is the block's products, ``kept`` its signed sigmoids; without either, the products are made here.
    """
    tile_m, tile_n = tile_at(
        tl.program_id(0), tl.cdiv(row_end - row_begin, BM), tl.cdiv(col_end - col_begin, BN), GROUP
    )
    row0 = row_begin + tile_m * BM
    col0 = col_begin + tile_n * BN
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    if kept is not None:
        where, inside = tile_of(kept, stride_kept, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
        slope = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    else:
        if given is not None:
            where, inside = tile_of(given, stride_given, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
            acc = tl.load(where, mask=inside, other=0.0)
        else:
            acc = products(x, y, row0, col0, M, N, D, stride_x, stride_y, BM, BN, BK, TMA, PRECISION)
        s = logits(
            acc, scale, targets, col_bias, row_ids, col_ids, None, row0, row_end, col0, col_end, 1.0, SELF, UPPER,
            EQUAL_IDS, False, BM, BN,
        )  # fmt: skip
        slope = _slope(s, row_ids, col_ids, rows, row_end, cols, col_end)
    g = tl.load(g_row + rows, mask=rows < row_end, other=0.0).to(tl.float32) * factor_of(largest, TOP)
    where, inside = tile_of(out, stride_out, row0, col0, row_begin, row_end, col_begin, col_end, BM, BN)
    tl.store(where, (slope * g[:, None]).to(out.dtype.element_ty), mask=inside)
