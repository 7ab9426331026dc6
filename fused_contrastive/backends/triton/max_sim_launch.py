"""Late interaction: launches the kernels of max_sim.py, forward and backward. Nothing here waits for the GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fused_contrastive.backends.triton import configs, device, max_sim
from fused_contrastive.backends.triton.problem import aligned, multiplied, products_from
from fused_contrastive.core.tokens import (
    MaxSimForward,
    MaxSimUpstream,
    TokenSpec,
    argmaxima,
    bytes_of_row,
    moved,
    put_back,
    real,
)

PROGRAMS = 2**30  # the most of one launch
ROOM = 2**27  # bytes of partial maxima at a time, or of argmaxima that the backward makes again


class Tiles(NamedTuple):
    """How the kernels cut the problem."""

    m: int  # rows, tokens of x
    n: int
    k: int
    warps: int
    stages: int
    own: int  # the gradient kernel's blocks: tokens of its own side,
    other: int  # of the other one,
    d: int  # and columns
    smooth_warps: int = 4  # of the gradient of smooth maxima, which makes two products

    def of_maxima(self, rows: int) -> dict[str, Any]:
        """For a tile of so many rows: fewer than ``m`` if it has one item of x."""
        return {
            "BM": rows, "BN": self.n, "BK": self.k, "GROUP": 8, "num_warps": self.warps if rows == self.m else 4,
            "num_stages": self.stages, "enable_fp_fusion": True,
        }  # fmt: skip

    @property
    def of_gradient(self) -> dict[str, Any]:
        return {
            "BT": self.own, "BQ": self.other, "BD": self.d, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True
        }  # fmt: skip


def tiles(architecture: str, source: configs.Source) -> Tiles:
    """The tiles were chosen by what they compile to, not by timing. "gemm" stands for float32 at full precision: these
    kernels make its products too, without matrix units on NVIDIA."""
    if architecture == "interpreter":  # small, so that small problems have several
        return Tiles(32, 16, 16, 4, 1, own=16, other=16, d=16)
    small = source == "gemm" or (source, architecture) == ("tf32", "sm_80")  # where larger blocks spill registers
    k, own = 64 if source == "half" else 32, 32 if small else 64
    smooth_warps = 8 if (source, architecture) == ("gemm", "sm_90") else 4
    stages = 2 if architecture == "gfx942" else 3
    return Tiles(128, 64, k, warps=8, stages=stages, own=own, other=32, d=64, smooth_warps=smooth_warps)


def token_block(t: int, rows: int) -> int:
    """How many of a tile's rows an item of x takes: T rounded up to a power of two, and at least 16 to bound the number
    of kernels that are compiled."""
    return min(max(16, 1 << (t - 1).bit_length()), rows)


class _Side(NamedTuple):
    """Some items of x, or of y."""

    tokens: Tensor  # (items * size, D)
    multiplied: Tensor  # the same, as products take them
    lengths: Tensor | None
    size: int  # tokens of an item


class _Prepared:
    """Arguments that all launches of one problem share."""

    def __init__(self, spec: TokenSpec, x: Tensor, y: Tensor) -> None:
        self.spec = spec
        x, y = moved(spec, x, y)
        (self.m, self.t, self.d), (self.n, self.p, _) = x.shape, y.shape
        source, on = products_from(x), device.of(x.device)
        self.tiles = tiles(on.architecture, source)
        self.precision = "tf32" if source == "tf32" else "ieee"
        self.gradient_precision = "tf32x3" if source == "tf32" else "ieee"
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        self.multiplied = multiplied(x, y, source, on)  # for maxima
        # Gradients are sums of the features themselves, by a product with ones and zeros.
        self.x, self.y = (aligned(x), aligned(y)) if source == "tf32" else self.multiplied
        self.columns = spec.own or self.n
        self.block = token_block(self.t, self.tiles.m)
        self.rows = self.block if spec.own else self.tiles.m  # of a tile of products
        self.x_lengths, self.y_lengths = spec.x_lengths, spec.y_lengths

    def side(self, which: int, first: int, last: int) -> _Side:
        """Items [first, last) of x (0) or of y (1)."""
        size, lengths = (self.t, self.x_lengths) if which == 0 else (self.p, self.y_lengths)
        rows = slice(first * size, last * size)
        tokens = (self.x, self.y)[which][rows]
        return _Side(tokens, self.multiplied[which][rows], None if lengths is None else lengths[first:last], size)

    def maxima(
        self, first: int, last: int, x_sums: Tensor | None, y_sums: Tensor | None, argmax_x: Tensor | None,
        argmax_y: Tensor | None, arg_first: int, arg_last: int, both: bool,
    ) -> None:  # fmt: skip
        """The maxima of items [first, last) of x. Argmaxima, or the values of smooth maxima in float32, are written for
        [arg_first, arg_last), from row 0 on."""
        in_parts = both and self.t > self.block
        items = self.rows // self.block
        step = max(1, PROGRAMS // self.columns) * items
        if in_parts:
            step = min(step, max(1, ROOM // (8 * triton.cdiv(self.t, self.block) * self.n * self.p)))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            part_best = part_index = None
            if in_parts:
                shape = (triton.cdiv(self.t, self.block), end - begin, self.n, self.p)
                part_best = self.x.new_empty(shape, dtype=torch.float32)
                part_index = self.x.new_empty(shape, dtype=torch.int32)
            x, y = self.multiplied
            max_sim.maxima[(triton.cdiv(end - begin, items) * self.columns,)](
                x, y, self.x_lengths, self.y_lengths, x_sums, y_sums, argmax_x, argmax_y, part_best,
                part_index, begin, end, arg_first, arg_last, self.columns, self.t, self.p, self.d, x.stride(0),
                y.stride(0), self.spec.smooth, BOTH=both, OWN=self.spec.own > 0, SMOOTH=self.spec.smooth > 0,
                PRECISION=self.precision, TB=self.block, **self.tiles.of_maxima(self.rows),
            )  # fmt: skip
            if part_best is not None and part_index is not None:
                best, which = part_best.max(dim=0)  # the first block with the maximum
                index = part_index.gather(0, which[None])[0]
                if y_sums is not None:
                    y_sums[begin:end] = torch.where(self._counts(begin, end), best, 0).sum(dim=2)
                if argmax_y is not None:
                    rows = slice(max(begin, arg_first) - arg_first, max(min(end, arg_last) - arg_first, 0))
                    argmax_y[rows] = index[: argmax_y[rows].shape[0]].to(argmax_y.dtype)

    def _counts(self, begin: int, end: int) -> Tensor:
        """Which tokens of y have a maximum: real ones, where x has any. Broadcasts to (R, N, P)."""
        counts = torch.ones(1, 1, 1, dtype=torch.bool, device=self.x.device)
        if self.y_lengths is not None:
            counts = real(self.y_lengths, self.p)[None]
        if self.x_lengths is not None:
            counts = counts & (self.x_lengths[begin:end] > 0)[:, None, None]
        return counts


def forward(spec: TokenSpec, x: Tensor, y: Tensor) -> MaxSimForward:
    p = _Prepared(spec, x, y)
    x_sums = x.new_empty(p.m, p.columns, dtype=torch.float32)
    y_sums = x.new_empty((p.m, p.columns) if spec.both else (0, 0), dtype=torch.float32)
    argmax_x, argmax_y = argmaxima(spec.kept_rows, p.columns, x, y, spec.both)
    with device.current(p.x.device):
        for begin, end, kept in ((0, spec.kept_rows, True), (spec.kept_rows, p.m, False)):
            p.maxima(
                begin, end, x_sums, y_sums if spec.both else None, argmax_x if kept else None,
                argmax_y if kept and spec.both else None, 0, end, spec.both,
            )  # fmt: skip
    return MaxSimForward(x_sums, y_sums, argmax_x, argmax_y)


def backward(
    spec: TokenSpec, x: Tensor, y: Tensor, saved: MaxSimForward, upstream: MaxSimUpstream, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    p = _Prepared(spec, x, y)
    dx, dy = (
        torch.zeros(t.shape, dtype=torch.float32, device=x.device) if asked else None
        for t, asked in zip((x, y), needs, strict=True)
    )
    g_x, g_y = (None if g is None else g.float().contiguous() for g in upstream)
    both = g_y is not None
    bytes_of_item = 4 * p.columns * p.t if spec.smooth else bytes_of_row(p.columns, x, y, both)
    step = max(p.rows // p.block, ROOM // bytes_of_item)
    with device.current(p.x.device):
        for begin in (*range(0, spec.kept_rows, step), *range(spec.kept_rows, p.m, step)):
            end = min(begin + step, spec.kept_rows if begin < spec.kept_rows else p.m)
            if begin < spec.kept_rows:
                argmax_x, argmax_y = saved.argmax_x[begin:end], saved.argmax_y[begin:end]
            else:
                argmax_x, argmax_y = argmaxima(end - begin, p.columns, x, y, both)
                if spec.smooth:
                    argmax_x = argmax_x.new_empty(argmax_x.shape, dtype=torch.float32)
                p.maxima(begin, end, None, None, argmax_x, argmax_y if both else None, begin, end, both)
            _add(p, begin, end, g_x, g_y, argmax_x, argmax_y, dx, dy)
    return (
        None if dx is None else put_back(dx.to(x.dtype), spec.x_order),
        None if dy is None else put_back(dy.to(y.dtype), spec.y_order),
    )


def _add(
    p: _Prepared, begin: int, end: int, g_x: Tensor | None, g_y: Tensor | None, argmax_x: Tensor, argmax_y: Tensor,
    dx: Tensor | None, dy: Tensor | None,
) -> None:  # fmt: skip
    """Adds the part of items [begin, end) of x to dx and dy.

    Programs have one item of x for dx and one item of y for dy, so that every sum has one writer.
    """
    columns, own = p.columns, p.spec.own
    g_x, g_y = (None if g is None else g[begin:end] for g in (g_x, g_y))
    of_x, of_y = None if g_x is None else argmax_x, None if g_y is None else argmax_y
    x, y = p.side(0, begin, end), p.side(1, begin * own, end * own) if own else p.side(1, 0, p.n)
    if dx is not None:
        others = (columns, columns, 1) if own else (columns, 0, 1)
        _launch(p, dx[begin:end], x, y, others, (columns, 1), (g_x, g_y), (of_x, of_y))
    if dy is not None:
        others = (1, 1, columns) if own else (end - begin, 0, 1)
        out = dy[begin * own : end * own] if own else dy
        _launch(p, out, y, x, others, (1, 0 if own else columns), (g_y, g_x), (of_y, of_x))


def _launch(
    p: _Prepared, out: Tensor, own: _Side, other: _Side, others: tuple[int, int, int], steps: tuple[int, int],
    g: tuple[Tensor | None, Tensor | None], found: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Adds to ``out`` the gradient of the items of one side.

    Args:
        others: how many other items each has, and the first of them, as the factor and the divisor of its own index.
        steps: how far apart two items, and two other items, are in a matrix (M, C).
        g, found: gradients (M, C) and what ``maxima`` found, of the own tokens' maxima and of the others'.
    """
    grid = (out.shape[0], triton.cdiv(own.size, p.tiles.own), triton.cdiv(p.d, p.tiles.d))
    of_own, of_other = ([step * side.size for step in steps] for side in (own, other))
    if not p.spec.smooth:
        max_sim.gradient[grid](
            out, other.tokens, own.lengths, other.lengths, *g, *found, *others, own.size, other.size, p.d,
            other.tokens.stride(0), *steps, *of_own, *of_other, PRECISION=p.gradient_precision, **p.tiles.of_gradient,
        )  # fmt: skip
        return
    is_x = g[0] is not None  # smooth maxima are of x's tokens alone
    max_sim.smooth_gradient[grid](
        out, own.multiplied, other.multiplied, other.tokens, own.lengths, other.lengths, g[not is_x], found[not is_x],
        *others, own.size, other.size, p.d, own.multiplied.stride(0), other.multiplied.stride(0),
        other.tokens.stride(0), *steps, *(of_own if is_x else of_other), p.spec.smooth, OF_OWN=is_x,
        PRECISION=p.precision, GRADIENT_PRECISION=p.gradient_precision, BK=p.tiles.k,
        **(p.tiles.of_gradient | {"num_warps": p.tiles.smooth_warps}),
    )  # fmt: skip
