"""Launches the kernels: walks S in blocks, forward and backward. Nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from fused_contrastive.backends.triton import backward as backward_kernels
from fused_contrastive.backends.triton import forward as forward_kernels
from fused_contrastive.backends.triton import sigmoid as sigmoid_kernels
from fused_contrastive.backends.triton import storage
from fused_contrastive.backends.triton.problem import Block, Problem, scratch
from fused_contrastive.core.spec import Forward, Gradients, Needs, StatsSpec, Upstream

# Blocks of S, (height, width): partial statistics of 2 x 33 MB; products of 128 MB; G of 256 MB in half precision.
STATISTICS_BLOCK = (16384, 32768)
FLOAT32_BLOCK = (4096, 8192)
GRADIENT_BLOCK = (8192, 16384)
MERGE_PARTS, MERGE_LENGTH = 32, 64
FINISH_ROWS, FINISH_D = 16, 64
FP16_TOP = 2.0**14  # G's largest entry in float16 is at most twice this: 1/N of it is far from underflow at N = 1e6

TARGET_ROWS = 65536

SMALLEST = 1e-30  # a largest |g| below this counts as this: its reciprocal must be finite in float32


class _Totals:
    """Running maxima, sums and their logarithms of one direction, all None if it is not asked."""

    def __init__(self, asked: bool, size: int, like: Tensor) -> None:
        self.value = like.new_empty(size if asked else 0, dtype=torch.float64)
        self.asked = asked
        if asked:
            self.top = like.new_empty(size, dtype=torch.float32)
            self.total = torch.empty_like(self.value)

    def partials(self, parts: int, length: int) -> tuple[Tensor | None, Tensor | None]:
        if not self.asked:
            return None, None
        return self.top.new_empty(parts, length), self.top.new_empty(parts, length)

    def views(self, part: slice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.asked:
            return None, None, None
        return self.top[part], self.total[part], self.value[part]


def forward(spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
    shape, dtype = storage.layout(spec.kept_rows, y.shape[0], x.dtype)
    buffer = x.new_empty(shape, dtype=dtype)
    p = Problem(spec, x, y, buffer)
    pos = x.new_empty(p.m, dtype=torch.float64)
    row, col = _Totals(spec.rows, p.m, x), _Totals(spec.cols, p.n, x)
    by_vendor = p.source == "given"
    with p.on_device():
        all_blocks = p.blocks(*(FLOAT32_BLOCK if by_vendor else STATISTICS_BLOCK))
        not_kept = [b for b in all_blocks if b.row1 > p.kept_rows]
        room = scratch(x, not_kept, torch.float32) if by_vendor else None
        for b in all_blocks:
            keep, given = p.kept.block(b.rows, b.cols), None
            if room is not None:
                given = p.products(b, room[: b.height, : b.width] if keep.given is None else keep.given)
            _block_statistics(p, b, given, keep, pos, row, col)
    return Forward(pos, row.value, col.value, buffer)


def _block_statistics(
    p: Problem, b: Block, given: Tensor | None, keep: storage.View, pos: Tensor, row: _Totals, col: _Totals
) -> None:
    config = p.config("sums" if p.softplus else "statistics")
    down, across = b.tiles(config)
    row_parts = row.partials(across, b.height)
    col_parts = col.partials(down, b.width)
    kept_to = keep.given if given is None else None  # the vendor GEMM has written there itself
    if keep.exponentials is not None:
        kept_to = keep.exponentials
    if p.softplus:
        sigmoid_kernels.sigmoid_statistics[(down * across,)](
            *p.features(config), given, p.spec.scale, *p.vectors, pos, *row_parts, kept_to,
            *p.sizes, _stride(given), _stride(kept_to), *b, **p.flags, **config.options,
        )  # fmt: skip
    else:
        forward_kernels.tile_statistics[(down * across,)](
            *p.features(config), given, p.spec.scale, *p.vectors, pos, *row_parts, *col_parts, kept_to, keep.references,
            *p.sizes, _stride(given), _stride(kept_to), _stride(keep.references), *b,
            ROWS=row.asked, COLS=col.asked, **p.flags, **config.options,
        )  # fmt: skip
    longest = max(b.height if row.asked else 0, b.width if col.asked else 0)
    forward_kernels.merge[(triton.cdiv(longest, MERGE_LENGTH), 2)](
        *row_parts, *row.views(b.rows), *col_parts, *col.views(b.cols),
        down, across, b.height, b.width, 0 if p.first_of_rows(b) else b.height, b.width if b.row0 else 0,
        FAST=p.flags["FAST"], PLAIN=p.softplus, PARTS=MERGE_PARTS, LENGTH=MERGE_LENGTH,
    )  # fmt: skip


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b, or out += a @ b, summed in float32 whatever a and b are."""
    if a.dtype == torch.float32 or a.device.type == "cpu":  # CPU: under the interpreter
        torch.addmm(out, a.float(), b.float(), beta=0 if first else 1, out=out)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif torch.torch_version.TorchVersion(torch.__version__) >= "2.10":
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:  # there, addmm wants the summand in the dtype of a
        out += torch.mm(a, b, out_dtype=torch.float32)


class _Backward:
    """One backward: what its steps share."""

    def __init__(self, p: Problem, saved: Forward, upstream: Upstream, needs: Needs, dtype: torch.dtype) -> None:
        self.p, self.saved, self.needs = p, saved, needs
        self.g_pos, self.g_row, self.g_col = (None if g is None else g.contiguous() for g in upstream)
        self.by_rows = needs.x or (needs.scale and not needs.y)  # the scale's gradient comes with that of x, or of y
        self.largest: Tensor | None = None
        self.top = 1.0
        normalised = [g for g in (self.g_row, self.g_col) if g is not None]
        if dtype == torch.float16 and normalised:
            together = torch.cat(normalised) if len(normalised) > 1 else normalised[0]
            self.largest = torch.linalg.vector_norm(together, ord=torch.inf).clamp_min(SMALLEST)
            self.top = FP16_TOP
        self.has_negatives = bool(normalised)
        self.dots: list[Tensor] = []

    def gradient(self, b: Block, room: Tensor) -> Tensor:
        """G of a block, its positives 0, times top / largest."""
        p, keep = self.p, self.p.kept.block(b.rows, b.cols)
        out, given = room[: b.height, : b.width], keep.given
        if p.source == "given" and given is None:
            given = p.products(b, out)  # each tile is read before it is overwritten
        config = p.config("gradient" if keep.exponentials is None else "kept")
        down, across = b.tiles(config)
        if p.softplus:
            sigmoid_kernels.sigmoid_gradient[(down * across,)](
                *p.features(config), given, keep.exponentials, p.spec.scale, *p.vectors, self.g_row, self.largest, out,
                *p.sizes, _stride(given), _stride(keep.exponentials), _stride(out), *b,
                TOP=self.top, **p.flags, **config.options,
            )  # fmt: skip
            return out
        backward_kernels.tile_gradient[(down * across,)](
            *p.features(config), given, keep.exponentials, keep.references, p.spec.scale, *p.vectors,
            self.saved.row, self.saved.col, self.g_row, self.g_col, self.largest, out,
            *p.sizes, _stride(given), _stride(keep.exponentials), _stride(keep.references), _stride(out), *b,
            TOP=self.top, **p.flags, **config.options,
        )  # fmt: skip
        return out

    def finish(
        self, grad: Tensor, out: Tensor | None, own: Tensor, other: Tensor, targets: Tensor | None,
        first: int, paired: int, dots: bool, largest: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes ``grad``'s rows, the problem's from ``first`` on, to ``out`` as gradients of the features."""
        rows = grad.shape[0]
        programs = triton.cdiv(rows, FINISH_ROWS)
        parts = grad.new_empty(programs, dtype=torch.float64) if dots else None
        backward_kernels.finish[(programs,)](
            grad, own, other, self.g_pos, targets, self.p.spec.scale, largest, out, parts,
            rows, first, paired, self.p.d, own.stride(0), other.stride(0),
            TOP=self.top if largest is not None else 1.0, ROWS=FINISH_ROWS, BD=FINISH_D,
        )  # fmt: skip
        if parts is not None:
            self.dots.append(parts)


def gradient_of_one_block(
    spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
) -> Callable[[], object]:
    """The first block's G and nothing else, to be called again and again: for tuning."""
    p = Problem(spec, x, y, saved.kept)
    run = _Backward(p, saved, upstream, needs, x.dtype)
    block = p.blocks(*(FLOAT32_BLOCK if p.exact else GRADIENT_BLOCK))[0]
    room = scratch(x, [block], x.dtype)
    return lambda: run.gradient(block, room)


def backward(spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs) -> Gradients:
    p = Problem(spec, x, y, saved.kept)
    run = _Backward(p, saved, upstream, needs, x.dtype)
    targets = p.vectors[0]
    gx = x.new_empty(p.m, p.d) if needs.x else None
    gy = y.new_empty(p.n, p.d) if needs.y else None
    with p.on_device():
        all_blocks = p.blocks(*(FLOAT32_BLOCK if p.exact else GRADIENT_BLOCK))
        height = max(b.height for b in all_blocks)
        # The sums over the negatives: of x a row of blocks at a time, of y and the bias to the end.
        new = torch.empty if run.has_negatives else torch.zeros
        dx = new(height if run.by_rows else 0, p.d, dtype=torch.float32, device=x.device)
        dy = new(p.n if needs.y else 0, p.d, dtype=torch.float32, device=x.device)
        dbias = torch.zeros(p.n if needs.col_bias else 0, dtype=torch.float32, device=x.device)
        room = scratch(x, all_blocks if run.has_negatives else [], x.dtype)
        for b in all_blocks:
            if run.has_negatives:
                g = run.gradient(b, room)
                if run.by_rows:
                    add_product(dx[: b.height], g, p.y[b.cols], first=p.first_of_rows(b))
                if needs.y:
                    add_product(dy[b.cols], g.T, p.x[b.rows], first=b.row0 == 0)
                if needs.col_bias:
                    dbias[b.cols] += g.sum(dim=0, dtype=torch.float32)
            if run.by_rows and b.col1 == p.n:
                run.finish(dx[: b.height], gx, p.x, p.y, targets, b.row0, p.m, needs.scale, run.largest)
        if run.largest is not None:
            dbias *= run.largest / run.top
        if needs.y:
            largest, paired = run.largest, p.m
            if run.g_pos is not None and targets is not None:
                if largest is not None:
                    dy *= largest / run.top
                    largest = None
                # Sorted, so deterministic where several rows share a positive; index_add_ on a GPU is not. In
                # parts, as the terms are float32.
                for i in range(0, p.m, TARGET_ROWS):
                    rows = slice(i, i + TARGET_ROWS)
                    terms = run.g_pos[rows, None].float() * p.x[rows].float()
                    dy.index_put_((targets[rows],), terms, accumulate=True)
                paired = 0
            run.finish(dy, gy, p.y, p.x, None, 0, paired, needs.scale and not run.by_rows, largest)
        if needs.col_bias and run.g_pos is not None:
            if targets is None:
                dbias[: p.m] += run.g_pos
            else:
                dbias.index_put_((targets,), run.g_pos.float(), accumulate=True)
        dscale = torch.cat(run.dots).sum().float() if needs.scale else None
    return Gradients(gx, gy, dscale, dbias if needs.col_bias else None)
