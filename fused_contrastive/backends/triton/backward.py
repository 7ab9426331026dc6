"""The backward kernels: what a direction gives G, blocks of G, and the last pass over the feature gradients."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_contrastive.backends.triton.tiles import (
    CELL,
    HEADROOM,
    HUGE,
    LOG2_E,
    added_up,
    below,
    compared,
    corner,
    finite,
    load_tile,
    logits,
    of_teacher,
    power,
    products,
    related,
    store_tile,
)

# How many binary orders of magnitude the normalisers of a tile may differ by if one exponential is to serve it: the
# reference lies HEADROOM below the highest one, and the lowest one may lie as far below the reference. Then no weight
# overflows, and only weights below 2^-60 of their row's vanish.
REACH = tl.constexpr(120.0)
# The same for a kept tile: how far its reference, which is given, may lie above the lowest normaliser.
KEPT_REACH = tl.constexpr(60.0)


class Direction(NamedTuple):
    """The part of the rows, or of the columns, in G: g exp(S - normaliser). It is one argument of a kernel.

    ``prepare`` fills it. It has no integer fields, since Triton would compile a kernel again for some values of them.
    """

    high: Tensor  # (length,) float32: the normaliser, in the logits' units; -inf where all pairs are excluded
    low: Tensor  # (length,) float32: the normaliser minus ``high``
    g: Tensor  # (length,) float32
    highest: Tensor  # (segments,) float32: the highest normaliser of each SEGMENT of them
    lowest: Tensor  # (segments,) float32: the lowest one that is not -inf


@triton.jit
def _prepare_one(value, g, direction, length, largest, MODE: tl.constexpr, TOP: tl.constexpr, SEGMENT: tl.constexpr):
    segment = tl.program_id(0)
    if segment * SEGMENT < length:
        i = segment * SEGMENT + tl.arange(0, SEGMENT)
        inside = i < length
        log = tl.load(value + i, mask=inside, other=float("-inf"))
        if MODE.half:
            log *= LOG2_E
        high = log.to(tl.float32)
        factor = 1.0 * TOP
        if largest is not None:
            factor = TOP / tl.load(largest).to(tl.float32)
        by = tl.load(g + i, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(direction.high + i, high, mask=inside)
        tl.store(direction.low + i, tl.where(high == float("-inf"), 0.0, log - high).to(tl.float32), mask=inside)
        tl.store(direction.g + i, by, mask=inside)
        tl.store(direction.highest + segment, tl.max(high))
        tl.store(direction.lowest + segment, tl.min(tl.where(high == float("-inf"), float("inf"), high)))


@triton.jit(do_not_specialize=["M", "N"])
def prepare(
    row, g_row, rows, col, g_col, cols, largest, M, N, MODE: tl.constexpr, TOP: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """The Directions ``rows`` and ``cols`` from float64 normalisers and upstream gradients, these times TOP / largest.

    Axis 0 of the grid: segments; axis 1: rows, columns. A direction without a gradient is None.
    """
    if tl.program_id(1) == 0:
        if rows is not None:
            _prepare_one(row, g_row, rows, M, largest, MODE, TOP, SEGMENT)
    elif cols is not None:
        _prepare_one(col, g_col, cols, N, largest, MODE, TOP, SEGMENT)


@triton.jit
def ranges(rows, cols, row_segment, col_segment):
    """The highest normaliser of two segments (or vectors of them), 0 where all are -inf, and the lowest."""
    highest = tl.full((), float("-inf"), tl.float32)
    lowest = tl.full((), float("inf"), tl.float32)
    if rows is not None:
        highest, lowest = tl.load(rows.highest + row_segment), tl.load(rows.lowest + row_segment)
    if cols is not None:
        highest = tl.maximum(highest, tl.load(cols.highest + col_segment))
        lowest = tl.minimum(lowest, tl.load(cols.lowest + col_segment))
    return finite(highest), lowest


@triton.jit
def is_far(rows, cols, row_segment, col_segment):
    """Whether the normalisers of two segments (or vectors of them) differ by too much for one exponential."""
    highest, lowest = ranges(rows, cols, row_segment, col_segment)
    return ~(tl.where(tl.abs(highest) < HUGE, highest - lowest, float("inf")) < REACH)


@triton.jit
def _is_far_kept(
    rows, cols, references, stride_references, row_begin, col_begin, row_cell, col_cell, SEGMENT: tl.constexpr
):  # fmt: skip
    """``is_far`` for a cell (or a vector of them) of the block's kept exponentials, which have a reference already."""
    row_segment = (row_begin + row_cell * CELL) // SEGMENT
    _, lowest = ranges(rows, cols, row_segment, (col_begin + col_cell * CELL) // SEGMENT)
    reference = tl.load(references + row_cell.to(tl.int64) * stride_references + col_cell)
    return ~(tl.where(tl.abs(reference) < HUGE, reference - lowest, float("inf")) < KEPT_REACH)


@triton.jit
def _multiplier(direction, i, inside, reference):
    """The factor that turns exponentials relative to ``reference`` into g exp(S - normaliser)."""
    high = tl.load(direction.high + i, mask=inside, other=float("-inf"))
    low = tl.load(direction.low + i, mask=inside, other=0.0)
    g = tl.load(direction.g + i, mask=inside, other=0.0)
    return g * tl.where(high == float("-inf"), 0.0, tl.exp2((reference - high) - low))


@triton.jit
def weighted(e, rows, cols, row0, row_end, col0, col_end, reference):
    """G of a tile, from its exponentials ``e`` relative to ``reference``."""
    i = row0 + tl.arange(0, e.shape[0])
    j = col0 + tl.arange(0, e.shape[1])
    if rows is None:
        g = e * _multiplier(cols, j, j < col_end, reference)[None, :]
    elif cols is None:
        g = e * _multiplier(rows, i, i < row_end, reference)[:, None]
    else:
        by_row = _multiplier(rows, i, i < row_end, reference)
        g = e * (by_row[:, None] + _multiplier(cols, j, j < col_end, reference)[None, :])
    return g


@triton.jit(do_not_specialize=["M", "N", "row_begin", "row_end", "col_begin", "col_end"])
def gradient(
    x, y, mask, rows, cols, out, stride_out, M, N, D, stride_x, stride_y, row_begin, row_end, col_begin, col_end,
    MODE: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """G of half-precision features, one exponential per logit for both directions; a tile per program.

    G[i, j] = g_row[i] exp(S[i, j] - row[i]) + g_col[j] exp(S[i, j] - col[j]), 0 where excluded; ``out`` holds the
    block [row_begin, row_end) x [col_begin, col_end) of it. With e = exp(S - reference) it is e times a vector for the
    rows plus one for the columns. Where normalisers lie too far apart for that, ``exact_gradient`` writes the tile.
    """
    height = row_end - row_begin
    i, j = corner(height, col_end - col_begin, TILE)
    row0, col0 = row_begin + i, col_begin + j
    acc = products(x, y, row0, col0, (M, N, D, stride_x, stride_y), MODE, TILE)
    s, c = logits(acc, mask, None, row0, row_end, col0, col_end, MODE)
    highest, _ = ranges(rows, cols, row0 // SEGMENT, col0 // SEGMENT)
    reference = highest - HEADROOM
    g = weighted(tl.exp2(s * c - reference), rows, cols, row0, row_end, col0, col_end, reference)
    store_tile(out, stride_out, i, j, height, g, MODE.tma)


@triton.jit(do_not_specialize=["stride_references", "row_begin", "row_end", "col_begin", "col_end"])
def gradient_of_kept(
    kept, stride_kept, references, stride_references, rows, cols, out, stride_out, row_begin, row_end, col_begin,
    col_end, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """G as ``gradient`` makes it, from the exponentials that ``strip_statistics`` kept and their references."""
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    height = row_end - row_begin
    i, j = corner(height, col_end - col_begin, TILE)
    row0, col0 = row_begin + i, col_begin + j
    e = load_tile(kept, stride_kept, i, j, height, BM, BN, MODE.tma).to(tl.float32)
    reference = tl.load(references + (i // CELL).to(tl.int64) * stride_references + j // CELL)
    g = weighted(e, rows, cols, row0, row_end, col0, col_end, reference)
    if MODE.upper:  # the forward skips tiles below the diagonal, which may hold anything
        g = tl.where((row0 + tl.arange(0, BM))[:, None] < (col0 + tl.arange(0, BN))[None, :], g, 0.0)
    store_tile(out, stride_out, i, j, height, g, MODE.tma)


@triton.jit
def _weights(s, direction, i, inside, AXIS: tl.constexpr, MODE: tl.constexpr):
    """g exp(S - normaliser), the vectors along rows (AXIS 0) or columns (AXIS 1)."""
    high = finite(tl.load(direction.high + i, mask=inside, other=float("-inf")))
    z = s - tl.expand_dims(high, 1 - AXIS)
    if not MODE.half:  # for half-precision features it is far below the error of a product
        z -= tl.expand_dims(tl.load(direction.low + i, mask=inside, other=0.0), 1 - AXIS)
    g = tl.load(direction.g + i, mask=inside, other=0.0)
    z = tl.where(z > 0, 0.0, z)  # no logit is above its normaliser, except by roundings of huge ones
    return tl.expand_dims(g, 1 - AXIS) * power(z, MODE)


@triton.jit
def weights_of_both(s, acc, mask, rows, cols, i, row_end, j, col_end, MODE: tl.constexpr):
    """G of a tile from logits ``s`` and what limits are compared with, by directions of which one may be None."""
    if rows is None:
        g = _weights(below(s, acc, mask, mask.col_limit, j, j < col_end, 1), cols, j, j < col_end, 1, MODE)
    elif cols is None:
        g = _weights(below(s, acc, mask, mask.row_limit, i, i < row_end, 0), rows, i, i < row_end, 0, MODE)
    else:
        g = _weights(below(s, acc, mask, mask.col_limit, j, j < col_end, 1), cols, j, j < col_end, 1, MODE)
        g += _weights(below(s, acc, mask, mask.row_limit, i, i < row_end, 0), rows, i, i < row_end, 0, MODE)
    return g


@triton.jit
def _of_sums(mask, rows, cols, i, row_end, j, col_end, MODE: tl.constexpr):
    """What a tile of G gains from the sums of related pairs' logits, by directions of which one may be None."""
    if rows is None:
        g = tl.load(cols.g + j, mask=j < col_end, other=0.0)[None, :]
    elif cols is None:
        g = tl.load(rows.g + i, mask=i < row_end, other=0.0)[:, None]
    else:
        by_col = tl.load(cols.g + j, mask=j < col_end, other=0.0)
        g = tl.load(rows.g + i, mask=i < row_end, other=0.0)[:, None] + by_col[None, :]
    return tl.where(added_up(mask, i, row_end, j, col_end, MODE), g, 0.0)


@triton.jit(do_not_specialize=["M", "N", "stride_references", "row_begin", "row_end", "col_begin", "col_end"])
def exact_gradient(
    x, y, gemm_products, stride_gemm, references, stride_references, mask, rows, cols, related_rows, related_cols, out,
    stride_out, M, N, D, stride_x, stride_y, row_begin, row_end, col_begin, col_end,
    ONLY_FAR: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """G with an exponential for each direction, for float32 features, limits, a teacher and related pairs apart or
    added up, the last three with Directions ``related_rows`` and ``related_cols``; or (ONLY_FAR) for those tiles of
    half-precision features whose normalisers lie too far apart for the kernels above. Products are ``gemm_products``,
    or made here.

    Axis 0 of the grid: rows of tiles. Axis 1: the programs that share the tiles of a row.
    """
    BM: tl.constexpr = TILE.block_m
    BN: tl.constexpr = TILE.block_n
    row0 = row_begin + tl.program_id(0) * BM
    i = row0 + tl.arange(0, BM)
    tiles = tl.cdiv(col_end - col_begin, BN)
    if ONLY_FAR:
        # Most often no tile is far, and all that happens here is to check the ranges of all columns.
        far = tl.full((), 0, tl.int32)
        if references is None:
            for first in range(col_begin // SEGMENT, tl.cdiv(col_end, SEGMENT), 64):
                segment = tl.minimum(first + tl.arange(0, 64), tl.cdiv(col_end, SEGMENT) - 1)
                far += tl.sum(tl.broadcast_to(is_far(rows, cols, row0 // SEGMENT, segment), (64,)).to(tl.int32))
        else:
            cells = tl.cdiv(col_end - col_begin, CELL)
            for first in range(0, cells, 512):
                cell = tl.minimum(first + tl.arange(0, 512), cells - 1)
                far_cells = _is_far_kept(
                    rows, cols, references, stride_references, row_begin, col_begin, (row0 - row_begin) // CELL, cell,
                    SEGMENT,
                )  # fmt: skip
                far += tl.sum(far_cells.to(tl.int32))
        tiles = tl.where(far > 0, tiles, 0)
    for tile_n in range(tl.program_id(1), tiles, tl.num_programs(1)):
        col0 = col_begin + tile_n * BN
        asked = True
        if ONLY_FAR:
            if references is None:
                asked = is_far(rows, cols, row0 // SEGMENT, col0 // SEGMENT)
            else:
                asked = _is_far_kept(
                    rows, cols, references, stride_references, row_begin, col_begin, (row0 - row_begin) // CELL,
                    (col0 - col_begin) // CELL, SEGMENT,
                )  # fmt: skip
        if asked:
            if gemm_products is not None:
                acc = load_tile(
                    gemm_products, stride_gemm, row0 - row_begin, col0 - col_begin, row_end - row_begin, BM, BN, False
                )
            else:
                acc = products(x, y, row0, col0, (M, N, D, stride_x, stride_y), MODE, TILE)
            s, c = logits(acc, mask, None, row0, row_end, col0, col_end, MODE)
            s *= c
            j = col0 + tl.arange(0, BN)
            at = compared(acc, mask, row0, col0, M, N, MODE)
            g = weights_of_both(s, at, mask, rows, cols, i, row_end, j, col_end, MODE)
            if MODE.equal_ids == "apart":
                apart = related(mask, i, row_end, j, col_end, MODE)
                if tl.max(apart.to(tl.int32)) > 0:
                    among = weights_of_both(s, at, mask, related_rows, related_cols, i, row_end, j, col_end, MODE)
                    g = tl.where(apart, among, g)
            elif MODE.equal_ids == "add":
                g += _of_sums(mask, related_rows, related_cols, i, row_end, j, col_end, MODE)
            if MODE.teacher:
                t = of_teacher(at, mask, i, row_end, j, col_end, MODE)
                g += weights_of_both(t, at, mask, related_rows, related_cols, i, row_end, j, col_end, MODE)
            store_tile(out, stride_out, row0 - row_begin, col0 - col_begin, row_end - row_begin, g, False)


@triton.jit(do_not_specialize=["rows", "first", "paired"])
def finish(
    grad, own, other, g_pos, along, targets, scale, largest, out, dots, rows, first, paired, D, stride_grad, stride_own,
    stride_other, stride_out, TOP: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Turns sums over the negatives, grad (rows, D), into gradients of the features.

    out = scale * (grad + positives - along * own), where ``along`` (M,), or None for 0, has one factor per row.

    These are rows ``first`` and on of ``own``; row i < paired gains g_pos[i] times the row of ``other`` that is its
    positive. ``grad`` is divided by TOP / largest, which G was multiplied by. dots gets each program's part of
    sum(own * (grad + positives)), the gradient of the scale. The positives are added after the products: one large term
    among thousands of small ones would cost the sum its low bits.
    """
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = local < rows
    local = local.to(tl.int64)
    i = local + first
    factor = 1.0 / TOP
    if largest is not None:
        factor = tl.load(largest).to(tl.float32) / TOP
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
        total = tl.load(grad + local[:, None] * stride_grad + d[None, :], mask=mask, other=0.0) * factor
        if g_pos is not None:
            mine = with_positive[:, None] & (d < D)[None, :]
            pair = tl.load(other + partner[:, None] * stride_other + d[None, :], mask=mine, other=0.0)
            total += g[:, None] * pair.to(tl.float32)
        if dots is not None or along is not None:
            features = tl.load(own + i[:, None] * stride_own + d[None, :], mask=mask, other=0.0).to(tl.float32)
            dot += tl.sum(features * total, axis=1)
            if along is not None:
                total -= tl.load(along + i, mask=inside, other=0.0)[:, None] * features
        if out is not None:
            tl.store(out + i[:, None] * stride_out + d[None, :], (total * by).to(out.dtype.element_ty), mask=mask)
    if dots is not None:
        tl.store(dots + tl.program_id(0), tl.sum(dot.to(tl.float64), axis=0))
