"""The kernels of the softplus reduction: sums of log(1 + exp(S)) over tiles, and a block of its G."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_contrastive.backends.triton.tiles import (
    corner,
    count_above,
    load_tile,
    log1p_unit,
    logits,
    power,
    products,
    related,
    store_tile,
)
from fused_contrastive.backends.triton.totals import store_partials


@triton.jit
def _log2_1p(u):
    """log2(1 + u) for u in [0, 1], with a relative error below 1.3e-6: u times a minimax polynomial of degree 6."""
    p = u * 0.020401185282384354 - 0.09579754888063209
    p = p * u + 0.2152845459583375
    p = p * u - 0.3390890291047266
    p = p * u + 0.4776683787165162
    p = p * u - 0.7211594743885721
    p = p * u + 1.4426932108813268
    return u * p


@triton.jit
def _log_1p_exp_of_minus_abs(s, MODE: tl.constexpr):
    """log(1 + exp(-|s|)), in the logits' units."""
    u = power(tl.abs(s) * -1.0, MODE)  # a unary minus takes an instruction in Triton 3.6
    return _log2_1p(u) if MODE.half else log1p_unit(u)


@triton.jit
def _part(s, TOP: tl.constexpr, SLOPES: tl.constexpr, dtype: tl.constexpr, MODE: tl.constexpr):
    """From logits, the rows' sums of softplus, and sigmoids times TOP in ``dtype`` (or, without SLOPES, anything)."""
    log = _log_1p_exp_of_minus_abs(s, MODE)
    total = tl.sum(tl.maximum(s, 0.0) + log, axis=1)
    slope = s
    if SLOPES:
        slope = (_slope(s, log, MODE) * TOP).to(dtype)
    return total, slope


@triton.jit
def _halves(s):
    return tl.split(tl.permute(tl.reshape(s, (s.shape[0], 2, s.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _joined(a, b, SLOPES: tl.constexpr):
    whole = a
    if SLOPES:
        whole = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))
    return whole


@triton.jit
def _part_by_part(
    s, TOP: tl.constexpr, SLOPES: tl.constexpr, dtype: tl.constexpr, MODE: tl.constexpr, SPLIT: tl.constexpr
):
    """The results of ``_part``; with SPLIT, one half of the columns is done after the other."""
    if SPLIT:
        a, b = _halves(s)
        total_a, slope_a = _part(a, TOP, SLOPES, dtype, MODE)
        total_b, slope_b = _part(b, TOP, SLOPES, dtype, MODE)
        total, slope = total_a + total_b, _joined(slope_a, slope_b, SLOPES)
    else:
        total, slope = _part(s, TOP, SLOPES, dtype, MODE)
    return total, slope


@triton.jit
def _sums_and_slopes(
    s, TOP: tl.constexpr, SLOPES: tl.constexpr, dtype: tl.constexpr, MODE: tl.constexpr, SPLIT: tl.constexpr
):
    """The results of ``_part`` in 2^SPLIT groups of columns, one after the other, to take fewer registers. SPLIT <= 2.

    It is not recursive because Triton 3.4 cannot compile recursion.
    """
    if SPLIT == 2:
        a, b = _halves(s)
        total_a, slope_a = _part_by_part(a, TOP, SLOPES, dtype, MODE, 1)
        total_b, slope_b = _part_by_part(b, TOP, SLOPES, dtype, MODE, 1)
        total, slope = total_a + total_b, _joined(slope_a, slope_b, SLOPES)
    else:
        total, slope = _part_by_part(s, TOP, SLOPES, dtype, MODE, SPLIT)
    return total, slope


@triton.jit
def _slope(s, log, MODE: tl.constexpr):
    """sigmoid(s) = exp(min(s, 0) - log(1 + exp(-|s|))), the derivative of softplus by the logit."""
    return power(tl.minimum(s, 0.0) - log, MODE)


@triton.jit
def _signed(slope, mask, rows, row_end, cols, col_end, MODE: tl.constexpr):
    """Slopes with their sign changed for pairs with equal ids, whose logits are negated."""
    if mask.row_ids is not None and MODE.equal_ids == "negate":
        equal = related(mask, rows, row_end, cols, col_end, MODE)
        slope = slope.to(tl.float32) * tl.where(equal, -1.0, 1.0)  # the interpreter cannot negate bfloat16
    return slope


@triton.jit(do_not_specialize=["M", "N", "row_begin", "row_end", "col_begin", "col_end"])
def sigmoid_statistics(
    x, y, gemm_products, stride_gemm, mask, pos, rows_to, related_rows_to, slopes, stride_slopes, products_to,
    stride_products, M, N, D, stride_x, stride_y, row_begin, row_end, col_begin, col_end,
    TOP: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The positives' logits and every row's sum of softplus; one tile of S per program.

    rows_to: Partials (tiles across, height), the maxima 0; ``related_rows_to``, where not None, gets those of the
    related pairs. ``slopes`` (height, width), where not None, gets the signed sigmoids times TOP, which are G without
    the rows' weights; ``products_to`` (height, width) the products.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    height = row_end - row_begin
    i, j = corner(height, col_end - col_begin, TILE)
    row0, col0 = row_begin + i, col_begin + j
    if gemm_products is not None:
        acc = load_tile(gemm_products, stride_gemm, i, j, height, BM, BN, False)
    else:
        acc = products(x, y, row0, col0, (M, N, D, stride_x, stride_y), MODE, TILE)
        if products_to is not None:
            store_tile(products_to, stride_products, i, j, height, acc, False)
    s, c = logits(acc, mask, pos, row0, row_end, col0, col_end, MODE)
    s *= c
    rows = row0 + tl.arange(0, BM)
    if mask.row_reference is not None:
        negatives = s
        if mask.row_ids is not None:
            positives = related(mask, rows, row_end, col0 + tl.arange(0, BN), col_end, MODE)
            negatives = tl.where(positives, float("-inf"), s)
        count_above(
            negatives, mask.row_reference, mask.row_above, mask.row_highest, rows, rows < row_end, 0, MODE
        )  # fmt: skip
    DTYPE: tl.constexpr = tl.float32 if slopes is None else (slopes.dtype if MODE.tma else slopes.dtype.element_ty)
    SPLIT: tl.constexpr = TILE.split - 1 if slopes is None and TILE.split > 0 else TILE.split
    if related_rows_to is not None:  # a pair of the other part counts as softplus(-inf) = 0
        apart = related(mask, rows, row_end, col0 + tl.arange(0, BN), col_end, MODE)
        unrelated = tl.where(apart, float("-inf"), s)
        total, slope = _sums_and_slopes(unrelated, TOP, slopes is not None, DTYPE, MODE, SPLIT)
        among = tl.zeros((BM,), tl.float32)
        if tl.max(apart.to(tl.int32)) > 0:
            of_related = tl.where(apart, s, float("-inf"))
            among, among_slope = _sums_and_slopes(of_related, TOP, slopes is not None, DTYPE, MODE, SPLIT)
            if slopes is not None:
                slope = tl.where(apart, among_slope, slope)
        store_partials(
            related_rows_to, j // BN, height, rows - row_begin, tl.zeros((BM,), tl.float32), among, rows < row_end
        )
    else:
        total, slope = _sums_and_slopes(s, TOP, slopes is not None, DTYPE, MODE, SPLIT)
    store_partials(rows_to, j // BN, height, rows - row_begin, tl.zeros((BM,), tl.float32), total, rows < row_end)
    if slopes is not None:
        slope = _signed(slope, mask, rows, row_end, col0 + tl.arange(0, BN), col_end, MODE)
        store_tile(slopes, stride_slopes, i, j, height, slope, MODE.tma)


@triton.jit(do_not_specialize=["M", "N", "row_begin", "row_end", "col_begin", "col_end"])
def sigmoid_gradient(
    x, y, gemm_products, stride_gemm, slopes, stride_slopes, mask, g_row, related_g, largest, out, stride_out,
    M, N, D, stride_x, stride_y, row_begin, row_end, col_begin, col_end,
    TOP: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """G[i, j] = g_row[i] sigmoid(S[i, j]), signed, 0 where excluded, times TOP / largest: one tile of a block of it.

    For related pairs it is ``related_g`` in place of ``g_row``, where that is not None.
    ``gemm_products`` is the block's products, ``slopes`` its signed sigmoids; without either, products are made here.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    height = row_end - row_begin
    i, j = corner(height, col_end - col_begin, TILE)
    row0, col0 = row_begin + i, col_begin + j
    rows = row0 + tl.arange(0, BM)
    if slopes is not None:
        slope = load_tile(slopes, stride_slopes, i, j, height, BM, BN, MODE.tma).to(tl.float32)
    else:
        if gemm_products is not None:
            acc = load_tile(gemm_products, stride_gemm, i, j, height, BM, BN, False)
        else:
            acc = products(x, y, row0, col0, (M, N, D, stride_x, stride_y), MODE, TILE)
        s, c = logits(acc, mask, None, row0, row_end, col0, col_end, MODE)
        s *= c
        slope = _slope(s, _log_1p_exp_of_minus_abs(s, MODE), MODE)
        slope = _signed(slope, mask, rows, row_end, col0 + tl.arange(0, BN), col_end, MODE)
    factor = 1.0 * TOP
    if largest is not None:
        factor = TOP / tl.load(largest).to(tl.float32)
    g = tl.load(g_row + rows, mask=rows < row_end, other=0.0).to(tl.float32) * factor
    weights = g[:, None]
    if related_g is not None:
        among = tl.load(related_g + rows, mask=rows < row_end, other=0.0).to(tl.float32) * factor
        apart = related(mask, rows, row_end, col0 + tl.arange(0, BN), col_end, MODE)
        weights = tl.where(apart, among[:, None], weights)
    store_tile(out, stride_out, i, j, height, slope * weights, MODE.half and MODE.tma)
