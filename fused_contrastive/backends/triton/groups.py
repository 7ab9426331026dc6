"""The kernels of groups: many independent problems in one launch. A table says where each program's group lies.

A program walks its group along one row of tiles (AXIS 0) or one column of tiles (AXIS 1), so that its statistics, or
its rows of dx or dy, are complete when it ends. Nothing of S is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_contrastive.backends.triton.tiles import finite, log1p_unit, logits, products, ranks_of, related


@triton.jit
def _tile_of_group(tiles):
    """Where this program's tiles begin, and its group ends: row0, row_end, col0, col_end."""
    at = tiles + tl.program_id(0) * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def statistics(
    x, y, tiles, mask, pos, out, M, N, D, stride_x, stride_y, AXIS: tl.constexpr, SOFTPLUS: tl.constexpr,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes the statistic of a group's rows (AXIS 0), with the positives' logits if ``pos`` is given, or its columns.

    With references it also writes their ranks. A program visits all pairs of its rows (columns), so that it counts in
    registers, without atomic additions.
    """
    OWN: tl.constexpr = TILE.block_m if AXIS == 0 else TILE.block_n
    STEP: tl.constexpr = TILE.block_n if AXIS == 0 else TILE.block_m
    row0, row_end, col0, col_end = _tile_of_group(tiles)
    first, end = (col0, col_end) if AXIS == 0 else (row0, row_end)
    most = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float64)
    own = (row0 if AXIS == 0 else col0) + tl.arange(0, OWN)
    there = own < (row_end if AXIS == 0 else col_end)
    reference = mask.row_reference if AXIS == 0 else mask.col_reference
    above = tl.zeros((OWN,), tl.int32)
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    for at in range(first, end, STEP):
        row, col = (row0, at) if AXIS == 0 else (at, col0)
        acc = products(x, y, row, col, (M, N, D, stride_x, stride_y), MODE, TILE)
        s, c = logits(acc, mask, pos, row, row_end, col, col_end, MODE)
        s *= c
        if reference is not None:
            negatives = s
            if SOFTPLUS and mask.row_ids is not None:  # pairs with equal ids are positives
                rows, cols = row + tl.arange(0, TILE.block_m), col + tl.arange(0, TILE.block_n)
                negatives = tl.where(related(mask, rows, row_end, cols, col_end, MODE), float("-inf"), s)
            count, top = ranks_of(negatives, reference, own, there, AXIS, MODE)
            above += count
            highest = tl.maximum(highest, top)
        if SOFTPLUS:
            each = tl.maximum(s, 0.0) + log1p_unit(tl.exp(-tl.abs(s)))
            total += tl.sum(each, axis=1 - AXIS).to(tl.float64)
        else:
            higher = tl.maximum(most, tl.max(s, axis=1 - AXIS))
            part = tl.sum(tl.exp(s - tl.expand_dims(finite(higher), 1 - AXIS)), axis=1 - AXIS)
            total = total * tl.exp(most - finite(higher)).to(tl.float64) + part.to(tl.float64)
            most = higher
    value = total
    if not SOFTPLUS:
        log = tl.log(tl.where(total == 0.0, 1.0, total))
        value = tl.where(total == 0.0, float("-inf"), most.to(tl.float64) + log)
    tl.store(out + own, value, mask=there)
    if reference is not None:
        tl.store((mask.row_above if AXIS == 0 else mask.col_above) + own, above, mask=there)
        tl.store((mask.row_highest if AXIS == 0 else mask.col_highest) + own, highest, mask=there)


@triton.jit
def _weights(s, normaliser, g, i, inside, AXIS: tl.constexpr):
    """g exp(s - normaliser), where the normaliser, float64, is subtracted as two floats."""
    value = finite(tl.load(normaliser + i, mask=inside, other=0.0))
    high = value.to(tl.float32)
    low = (value - high.to(tl.float64)).to(tl.float32)
    by = tl.load(g + i, mask=inside, other=0.0).to(tl.float32)
    e = tl.exp((s - tl.expand_dims(high, 1 - AXIS)) - tl.expand_dims(low, 1 - AXIS))
    return tl.expand_dims(by, 1 - AXIS) * e


@triton.jit
def gradients(
    x, y, tiles, mask, row, g_row, col, g_col, out, sums, M, N, D, stride_x, stride_y, AXIS: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes G y (AXIS 0) or G.T x (AXIS 1) to ``out`` (rows, D) and, where given, the sums of G to ``sums``."""
    OWN: tl.constexpr = TILE.block_m if AXIS == 0 else TILE.block_n
    STEP: tl.constexpr = TILE.block_n if AXIS == 0 else TILE.block_m
    row0, row_end, col0, col_end = _tile_of_group(tiles)
    first, end = (col0, col_end) if AXIS == 0 else (row0, row_end)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc_out = tl.zeros((OWN, BD), tl.float32)
    acc_sums = tl.zeros((OWN,), tl.float32)
    for at in range(first, end, STEP):
        tile_row, tile_col = (row0, at) if AXIS == 0 else (at, col0)
        rows, cols = tile_row + tl.arange(0, TILE.block_m), tile_col + tl.arange(0, TILE.block_n)
        acc = products(x, y, tile_row, tile_col, (M, N, D, stride_x, stride_y), MODE, TILE)
        s, c = logits(acc, mask, None, tile_row, row_end, tile_col, col_end, MODE)
        s *= c
        w = tl.zeros((TILE.block_m, TILE.block_n), tl.float32)
        if SOFTPLUS:
            g = tl.load(g_row + rows, mask=rows < row_end, other=0.0).to(tl.float32)
            e = tl.exp(-tl.abs(s))
            w = g[:, None] * (tl.where(s < 0, e, 1.0) / (1.0 + e))
        else:
            if g_row is not None:
                w += _weights(s, row, g_row, rows, rows < row_end, 0)
            if g_col is not None:
                w += _weights(s, col, g_col, cols, cols < col_end, 1)
        if mask.row_ids is not None:
            if MODE.equal_ids == "negate":
                w = tl.where(related(mask, rows, row_end, cols, col_end, MODE), -w, w)
        other = at + tl.arange(0, STEP)
        inside = (other < end)[:, None] & (d < D)[None, :]
        if AXIS == 0:
            features = tl.load(y + other[:, None] * stride_y + d[None, :], mask=inside, other=0.0)
            acc_out = tl.dot(w, features.to(tl.float32), acc_out, input_precision=PRECISION)
        else:
            features = tl.load(x + other[:, None] * stride_x + d[None, :], mask=inside, other=0.0)
            acc_out = tl.dot(tl.trans(w), features.to(tl.float32), acc_out, input_precision=PRECISION)
        if sums is not None:
            acc_sums += tl.sum(w, axis=1 - AXIS)
    own = (row0 if AXIS == 0 else col0) + tl.arange(0, OWN)
    there = own < (row_end if AXIS == 0 else col_end)
    tl.store(out + own[:, None] * D + d[None, :], acc_out, mask=there[:, None] & (d < D)[None, :])
    if sums is not None:
        if tl.program_id(1) == 0:
            tl.store(sums + own, acc_sums, mask=there)
