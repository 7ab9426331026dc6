"""Late interaction: the kernels. max_sim_launch.py calls them."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_contrastive.backends.triton.tiles import tile_at

NONE = tl.constexpr(2**30)  # larger than every index


@triton.jit
def _products(
    x, y, x_rows, y_rows, D, stride_x, stride_y, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x[x_rows] @ y[y_rows].T in float32, (BM, BN)."""
    acc = tl.zeros((BM, BN), tl.float32)
    ks = tl.arange(0, BK)
    x_tile = x + x_rows[:, None] * stride_x + ks[None, :]
    y_tile = y + y_rows[None, :] * stride_y + ks[:, None]
    for k in range(0, D, BK):
        inside = ks < D - k
        a = tl.load(x_tile, mask=inside[None, :], other=0.0)
        b = tl.load(y_tile, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_tile += BK
        y_tile += BK
    return acc


@triton.jit
def _first_maximum(s, index, AXIS: tl.constexpr, FIND: tl.constexpr):
    """Maxima along an axis, NaN where s has a NaN, and with FIND the index of the first. ``index`` broadcasts to s."""
    top = tl.max(s, axis=AXIS)
    at = tl.zeros_like(top).to(tl.int32)
    if FIND:
        at = tl.min(tl.where(s == tl.expand_dims(top, AXIS), index, NONE), axis=AXIS)
        at = tl.where(at == NONE, 0, at)  # all NaN
    is_nan = tl.max((s != s).to(tl.int32), axis=AXIS) > 0
    return tl.where(is_nan, float("nan"), top), at


@triton.jit
def _length(lengths, item, inside, size):
    """The number of real tokens of items: ``size`` if no lengths are given, 0 where not ``inside``."""
    if lengths is not None:
        return tl.load(lengths + item, mask=inside, other=0).to(tl.int32)
    return tl.where(inside, size, 0)


@triton.jit(do_not_specialize=["first", "last", "arg_first", "arg_last", "N", "T", "P"])
def maxima(
    x, y, x_lengths, y_lengths, x_sums, y_sums, argmax_x, argmax_y, part_best, part_index,
    first, last, arg_first, arg_last, N, T, P, D, stride_x, stride_y, tau,
    BOTH: tl.constexpr, OWN: tl.constexpr, SMOOTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, TB: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program takes BM / TB items of x in [first, last) with one item of y.

    With OWN, which needs BM = TB, each item of x has N items of y of its own. With SMOOTH a maximum is
    tau * log(sum of exp(s / tau)), and argmax_x gets these values, in float32.

    x (M * T, D), y (N * P, D). The products of TB tokens of each item of x with BN tokens of y are in registers at a
    time, rows of one item together; the direction x takes maxima along them and goes on from block to block of y, the
    direction y (BOTH) takes them down the TB rows of each item. It writes sums (M, N), if not None, and argmaxima, if
    not None, of items in [arg_first, arg_last): their first row is item arg_first.

    If T > TB, no program has all of x's tokens at once: the maxima of the direction y and their indices go to
    part_best and part_index, (blocks of T, last - first, N, P), to be compared afterwards.
    """
    ITEMS: tl.constexpr = BM // TB
    tile, column = tile_at(tl.program_id(0), tl.cdiv(last - first, ITEMS), N, GROUP)
    item0 = first + tile * ITEMS
    n = column.to(tl.int64)
    if OWN:
        n += item0.to(tl.int64) * N
    r = tl.arange(0, BM)
    item = item0 + r // TB  # of each row
    inside = item < last
    own = item0 + tl.arange(0, ITEMS)
    own_inside = own < last
    x_length = _length(x_lengths, item, inside, T)
    own_length = _length(x_lengths, own, own_inside, T)
    y_length = P
    if y_lengths is not None:
        y_length = tl.load(y_lengths + n).to(tl.int32)
    pair = item.to(tl.int64) * N + column
    own_pair = own.to(tl.int64) * N + column
    x_total = tl.zeros((ITEMS,), tl.float32)
    y_total = tl.zeros((ITEMS,), tl.float32)

    for t0 in range(0, T, TB):
        t = t0 + r % TB
        is_real = inside & (t < x_length)
        x_rows = tl.minimum(item, last - 1).to(tl.int64) * T + tl.minimum(t, T - 1)
        best = tl.full((BM,), float("-inf"), tl.float32)
        index = tl.zeros((BM,), tl.int32)
        exps = tl.zeros((BM,), tl.float32)
        for p0 in range(0, y_length, BN):
            p = p0 + tl.arange(0, BN)
            y_rows = n * P + tl.minimum(p, P - 1)
            acc = _products(x, y, x_rows, y_rows, D, stride_x, stride_y, BM, BN, BK, PRECISION)
            s = tl.where((p < y_length)[None, :], acc, float("-inf"))
            if SMOOTH:
                top = tl.maximum(best, tl.max(s, axis=1))
                reference = tl.where(top == float("-inf"), 0.0, top)
                exps = exps * tl.exp((best - reference) / tau)
                exps += tl.sum(tl.exp((s - reference[:, None]) / tau), axis=1)
                best = top
            else:
                top, at = _first_maximum(s, p[None, :], 1, argmax_x is not None)
                higher = (top > best) | (top != top)
                best = tl.where(higher, top, best)
                index = tl.where(higher, at, index)
            if BOTH:
                by_item = tl.reshape(tl.where(is_real[:, None], acc, float("-inf")), (ITEMS, TB, BN))
                ts = (t0 + tl.arange(0, TB))[None, :, None]
                top_y, at_y = _first_maximum(by_item, ts, 1, (argmax_y is not None) or (part_index is not None))
                counts = (own_length > 0)[:, None] & (p < y_length)[None, :]
                if part_best is not None:
                    block = (t0 // TB) * (last - first).to(tl.int64) + (own - first)
                    where = (block * N + n)[:, None] * P + p[None, :]
                    tl.store(part_best + where, top_y, mask=counts)
                    tl.store(part_index + where, at_y, mask=counts)
                else:
                    y_total += tl.sum(tl.where(counts, top_y, 0.0), axis=1)
                    if argmax_y is not None:
                        where = (own_pair - arg_first.to(tl.int64) * N)[:, None] * P + p[None, :]
                        held = counts & ((own >= arg_first) & (own < arg_last))[:, None]
                        tl.store(argmax_y + where, at_y.to(argmax_y.dtype.element_ty), mask=held)
        if SMOOTH:
            best += tau * tl.log(tl.where(exps == 0, 1.0, exps))  # all products are -inf where the sum is 0
        counts = inside & (t < tl.where(y_length > 0, x_length, 0))
        x_total += tl.sum(tl.reshape(tl.where(counts, best, 0.0), (ITEMS, TB)), axis=1)
        if argmax_x is not None:
            where = (pair - arg_first.to(tl.int64) * N) * T + t
            held = counts & (item >= arg_first) & (item < arg_last)
            tl.store(argmax_x + where, (best if SMOOTH else index).to(argmax_x.dtype.element_ty), mask=held)
    if x_sums is not None:
        tl.store(x_sums + own_pair, x_total, mask=own_inside)
    if y_sums is not None and part_best is None:
        tl.store(y_sums + own_pair, y_total, mask=own_inside)


@triton.jit(do_not_specialize=["others", "first", "share", "own_size", "other_size"])
def gradient(
    out, other, own_lengths, other_lengths, g_own, g_other, index_own, index_other, others, first, share,
    own_size, other_size, D, stride_other, g_step, g_other_step, own_step, own_other_step, other_step,
    other_other_step, PRECISION: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Adds to out (items * own_size, D) the gradient of one side's tokens. One program per item, BT tokens, BD columns.

    index_own has, for each own token, which token of the other item it is paired with: that row is gathered.
    index_other has, for each other token, which own token it is paired with: the rows are added by a product with
    the matrix that is 1 at these pairs and 0 elsewhere. Either may be None. The weight g of a pair of items multiplies
    the result, in float32. Other items are taken in order: ``others`` of them, from i * first // share on.

    Strides, in own and in other items: g_step, g_other_step of g_own and g_other; own_step, own_other_step of
    index_own; other_step, other_other_step of index_other.
    """
    i = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    own_length = own_size
    if own_lengths is not None:
        own_length = tl.load(own_lengths + i).to(tl.int32)
    where = out + (i * own_size + t)[:, None] * D + d[None, :]
    mask = (t < own_length)[:, None] & (d < D)[None, :]
    acc = tl.load(where, mask=mask, other=0.0)
    j = tl.full((), 0, tl.int64)
    for _ in range(0, others):
        other_item = i * first // share + j
        rows = other + other_item * other_size * stride_other
        other_length = other_size
        if other_lengths is not None:
            other_length = tl.load(other_lengths + other_item).to(tl.int32)
        if index_own is not None:
            g = tl.load(g_own + i * g_step + j * g_other_step)
            held = t < tl.where(other_length > 0, own_length, 0)
            at = tl.load(index_own + i * own_step + j * own_other_step + t, mask=held, other=0).to(tl.int64)
            there = held & (at >= 0) & (at < other_length)  # masks may have been written to since the forward
            value = tl.load(rows + at[:, None] * stride_other + d[None, :], mask=mask & there[:, None], other=0.0)
            acc += g * value.to(tl.float32)
        if index_other is not None:
            g_pair = tl.load(g_other + i * g_step + j * g_other_step)
            for q0 in range(0, other_length, BQ):
                q = q0 + tl.arange(0, BQ)
                paired = q < tl.where(own_length > 0, other_length, 0)
                to = tl.load(index_other + i * other_step + j * other_other_step + q, mask=paired, other=0)
                pairs = paired[None, :] & (to.to(tl.int32)[None, :] == t[:, None])
                block = tl.load(
                    rows + q.to(tl.int64)[:, None] * stride_other + d[None, :],
                    mask=paired[:, None] & (d < D)[None, :], other=0.0,
                )  # fmt: skip
                acc += g_pair * tl.dot(pairs.to(block.dtype), block, input_precision=PRECISION)
        j += 1
    tl.store(where, acc, mask=mask)


@triton.jit(do_not_specialize=["others", "first", "share", "own_size", "other_size"])
def smooth_gradient(
    out, own, other, other_rows, own_lengths, other_lengths, g, smoothed, others, first, share, own_size,
    other_size, D, stride_own, stride_other, stride_rows, g_step, g_other_step, own_step, own_other_step, tau,
    OF_OWN: tl.constexpr, PRECISION: tl.constexpr, GRADIENT_PRECISION: tl.constexpr, BT: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``gradient`` where maxima are smooth: the weight of a product s is exp((s - smoothed) / tau), ``smoothed`` being
    what ``maxima`` found for its token of x, which is the own one if OF_OWN.

    ``own`` and ``other`` are multiplied; ``other_rows``, with rows of ``stride_rows``, are added up.
    """
    i = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    own_length = own_size
    if own_lengths is not None:
        own_length = tl.load(own_lengths + i).to(tl.int32)
    where = out + (i * own_size + t)[:, None] * D + d[None, :]
    mask = (t < own_length)[:, None] & (d < D)[None, :]
    acc = tl.load(where, mask=mask, other=0.0)
    own_at = i * own_size + tl.minimum(t, own_size - 1)
    j = tl.full((), 0, tl.int64)
    for _ in range(0, others):
        other_item = i * first // share + j
        other_length = other_size
        if other_lengths is not None:
            other_length = tl.load(other_lengths + other_item).to(tl.int32)
        g_pair = tl.load(g + i * g_step + j * g_other_step)
        values = smoothed + i * own_step + j * own_other_step
        for q0 in range(0, other_length, BQ):
            q = q0 + tl.arange(0, BQ)
            real = (t < own_length)[:, None] & (q < other_length)[None, :]
            other_at = other_item * other_size + tl.minimum(q, other_size - 1)
            s = _products(own, other, own_at, other_at, D, stride_own, stride_other, BT, BQ, BK, PRECISION)
            if OF_OWN:
                value = tl.load(values + t, mask=t < own_length, other=0.0)[:, None]
            else:
                value = tl.load(values + q, mask=q < other_length, other=0.0)[None, :]
            value = tl.where(value == float("-inf"), 0.0, value)
            weights = tl.exp(tl.where(real, (s - value) / tau, float("-inf")))
            block = tl.load(
                other_rows + other_at[:, None] * stride_rows + d[None, :],
                mask=(q < other_length)[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            acc += g_pair * tl.dot(weights.to(block.dtype), block, input_precision=GRADIENT_PRECISION)
        j += 1
    tl.store(where, acc, mask=mask)
