"""Launches the kernels: walks S in blocks, forward and backward. Nothing here waits for the GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from fused_contrastive.backends.triton import backward as backward_kernels
from fused_contrastive.backends.triton import configs, device, storage, tune
from fused_contrastive.backends.triton import forward as forward_kernels
from fused_contrastive.backends.triton import sigmoid as sigmoid_kernels
from fused_contrastive.backends.triton.problem import Block, Prepared, largest
from fused_contrastive.backends.triton.totals import AnyPartials, Direction, merge
from fused_contrastive.core.spec import Forward, Gradients, Needs, StatsSpec, Upstream, merged, summed_like

# Blocks of S, (height, width): partial statistics of 2 x 17 MB; products of 128 MB; G of 512 MB in half precision.
STATISTICS_BLOCK = (16384, 32768)
FLOAT32_BLOCK = (4096, 8192)
GRADIENT_BLOCK = (16384, 16384)
MERGE_PARTS, MERGE_LENGTH = 32, 64
FINISH_ROWS, FINISH_D = 16, 64
# G in float16 is at most twice this, once for each direction: 1/N of it is far from underflow at N = 1e6.
FP16_TOP = 2.0**14
TARGET_ROWS = 65536
SMALLEST = 1e-30  # replaces a smaller largest |g|, whose reciprocal may not be finite in float32
FUSED = {"enable_fp_fusion": True}  # for kernels without a configuration; see Config.options
# For the exact kernels, so that a logit is rounded to the same float32 number in the forward and the backward.
UNFUSED = {"enable_fp_fusion": False}


def config(p: Prepared, kernel: configs.Kernel) -> configs.Config:
    c = tune.choose(p.device, p.source, kernel, p.dtype, p.d, _work)
    if p.teacher and p.source != "gemm":  # two sets of statistics, or of weights, would spill registers in wide tiles
        return c._replace(block_n=max(32, c.block_n // 2))
    if p.spec.is_ranked():  # likewise what is compared and counted
        return c._replace(block_n=max(32, c.block_n // 2))
    # To find out which of several ids agree takes registers: a thread gets fewer columns than 64.
    return c._replace(block_n=min(c.block_n, 128)) if p.mode.ids > 1 else c


def forward(spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
    shape, dtype = storage.layout(spec.kept_rows, y.shape[0], x.dtype)
    buffer = x.new_empty(shape, dtype=dtype)
    p = Prepared(spec, x, y, buffer)
    pos = x.new_empty(p.m if spec.paired else 0, dtype=torch.float64)
    p.start_counts()
    row = Direction(spec.want_row, p.m, x, p.two, p.teacher)
    col = Direction(spec.want_col or spec.upper, p.n, x, p.two, p.teacher)
    with device.current(x.device):
        p.kept.clear_padding()
        all_blocks = p.blocks(*(FLOAT32_BLOCK if p.by_vendor else STATISTICS_BLOCK))
        room = None
        if p.by_vendor:
            room = storage.scratch(x, *largest([b for b in all_blocks if b.row1 > p.kept_rows]), torch.float32)
        for b in all_blocks:
            kept, gemm_products = p.kept.block(b.rows, b.cols), None
            if room is not None:
                gemm_products = kept.products or storage.block_of(room, b.height, b.width)
                p.products(b, gemm_products.values)
            block_statistics(p, b, gemm_products, kept, pos, row, col)
    if not spec.upper:
        return Forward(pos, p.with_counts(row.result(), 0), p.with_counts(col.result(), 1), buffer)
    if spec.targets is not None:  # a pair below the diagonal has the logit of its mirror image
        pos = pos[torch.minimum(spec.targets, torch.arange(p.m, device=x.device))]
    rows, cols = p.with_counts(row.value, 0), p.with_counts(col.value, 1)
    return Forward(pos, merged(spec, rows, cols), cols.new_empty(0, *rows.shape[1:]), buffer)


def block_statistics(
    p: Prepared, b: Block, gemm_products: storage.Matrix | None, kept: storage.Kept, pos: Tensor, row: Direction,
    col: Direction, top: float = 1.0,
) -> None:  # fmt: skip
    """Adds a block's statistics to those of the blocks before it. Kept sigmoids are multiplied by ``top``."""
    c = config(p, "sums" if p.softplus else "statistics")
    strips, across = b.tiles(c)
    row_parts, related_row_parts = row.partials_of_both(across, b.height)
    col_parts, related_col_parts = col.partials_of_both(strips, b.width)
    pos_to = pos if p.spec.paired else None
    products_to = (None, 0) if gemm_products is not None or kept.products is None else _plain(kept.products)
    if p.softplus:
        sigmoid_kernels.sigmoid_statistics[(strips * across,)](
            *p.features(c), *_plain(gemm_products), p.mask, pos_to, row_parts, related_row_parts,
            *p.tile(kept.exponentials, c), *products_to, *p.sizes, *b, TOP=top, MODE=p.mode, TILE=c, **c.options,
        )  # fmt: skip
    elif not p.exact:
        lost = pos.new_empty(strips, across, dtype=torch.int32)
        forward_kernels.strip_statistics[(strips * across,)](
            *p.features(c), p.mask, pos_to, row_parts, col_parts, lost, *p.tile(kept.exponentials, c), kept.references,
            _stride(kept.references), *p.sizes, *b, MODE=p.mode, TILE=c, **c.options,
        )  # fmt: skip
        forward_kernels.exact_statistics[(across,)](
            *p.features(c.exact), None, 0, p.mask.without_references(), None, row_parts, col_parts, None, None, lost,
            None, 0, *p.sizes, *b, MODE=p.mode, TILE=c.exact, **(c.exact.options | UNFUSED),
        )  # fmt: skip
    else:
        c = c.exact if p.half else c
        forward_kernels.exact_statistics[(strips * across,)](
            *p.features(c), *_plain(gemm_products), p.mask, pos_to, row_parts, col_parts, related_row_parts,
            related_col_parts, None, *products_to, *p.sizes, *b, MODE=p.mode, TILE=c, **(c.options | UNFUSED),
        )  # fmt: skip
    for of_rows, from_rows, of_cols, from_cols, plain in (
        (row, row_parts, col, col_parts, p.softplus),
        (row.related, related_row_parts, col.related, related_col_parts, p.softplus or p.added),
    ):  # fmt: skip
        if of_rows is not None and of_cols is not None:
            add_up(p, b, (from_rows, from_cols), (of_rows, of_cols), (strips, across), c.block_n, plain)


def add_up(
    p: Prepared, b: Block, parts: tuple[AnyPartials | None, AnyPartials | None], to: tuple[Direction, Direction],
    tiles: tuple[int, int], part_width: int, plain: bool = False,
) -> None:  # fmt: skip
    """Adds a block's partial statistics, those of its rows and its columns, to the Directions ``to``.

    tiles: how many parts there are for a column and for a row, down and across the block.
    """
    row, col = to
    longest = max(b.height if row.asked else 0, b.width if col.asked else 0)
    merge[(triton.cdiv(longest, MERGE_LENGTH), 2)](
        parts[0], row.totals(b.rows), parts[1], col.totals(b.cols), *tiles, b.height, b.width,
        0 if p.first_of_rows(b) else b.height, b.width if b.row0 else 0, b.row0 - b.col0,
        MODE=p.mode, PLAIN=plain, PART_WIDTH=part_width, PARTS=MERGE_PARTS, LENGTH=MERGE_LENGTH, **FUSED,
    )  # fmt: skip


def _plain(matrix: storage.Matrix | None) -> tuple[Tensor | None, int]:
    return (None, 0) if matrix is None else (matrix.whole, matrix.stride)


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


def block_of_weights(
    p: Prepared, b: Block, kept: storage.Kept, rows: backward_kernels.Direction | None,
    cols: backward_kernels.Direction | None, out: storage.Matrix,
    related_rows: backward_kernels.Direction | None = None, related_cols: backward_kernels.Direction | None = None,
) -> None:  # fmt: skip
    """Writes G of a softmax, 0 at the positives, from what is kept of the block or from products made again.

    ``out`` may be the memory of what is kept: each tile is read before it is overwritten.
    """
    gemm_products = kept.products
    if p.half:
        exact = config(p, "statistics").exact
    elif gemm_products is not None and p.mask.row_guide is None:
        exact = configs.default(p.device, "gemm", "gradient")
    else:  # Limits need the forward's tiles. These are also small enough for the registers that two parts take.
        exact = config(p, "statistics" if p.limited or p.two else "gradient")
    if kept.exponentials is not None:
        c = config(p, "kept")
        backward_kernels.gradient_of_kept[(math.prod(b.tiles(c)),)](
            *p.tile(kept.exponentials, c), kept.references, _stride(kept.references), rows, cols, *p.tile(out, c), *b,
            MODE=p.mode, TILE=c, **c.options,
        )  # fmt: skip
    elif not p.exact:
        c = config(p, "gradient")
        backward_kernels.gradient[(math.prod(b.tiles(c)),)](
            *p.features(c), p.mask, rows, cols, *p.tile(out, c), *p.sizes, *b, MODE=p.mode, TILE=c,
            SEGMENT=configs.TILE, **c.options,
        )  # fmt: skip
    down, across = b.tiles(exact._replace(strip=1))
    backward_kernels.exact_gradient[(down, across if p.exact else 1)](
        *p.features(exact), *_plain(gemm_products), kept.references, _stride(kept.references), p.mask, rows, cols,
        related_rows, related_cols, *_plain(out), *p.sizes, *b, ONLY_FAR=not p.exact, MODE=p.mode, TILE=exact,
        SEGMENT=configs.TILE, **(exact.options | UNFUSED),
    )  # fmt: skip


def block_of_sigmoids(
    p: Prepared, b: Block, kept: storage.Kept, g_row: Tensor | None, largest: Tensor | None, top: float,
    out: storage.Matrix, related_g: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes G of the softplus reduction, times top / largest, as ``block_of_weights`` does for a softmax."""
    c = config(p, "gradient" if kept.exponentials is None else "kept")
    sigmoid_kernels.sigmoid_gradient[(math.prod(b.tiles(c)),)](
        *p.features(c), *_plain(kept.products), *p.tile(kept.exponentials, c), p.mask, g_row, related_g, largest,
        *(p.tile(out, c) if p.half else _plain(out)), *p.sizes, *b, TOP=top, MODE=p.mode, TILE=c, **c.options,
    )  # fmt: skip


def direction_of(size: int, like: Tensor) -> backward_kernels.Direction:
    """Memory for a Direction of ``size`` rows or columns: views of one buffer, each at a 16-byte boundary."""
    sizes = [size] * 3 + [triton.cdiv(size, configs.TILE)] * 2
    starts = list(itertools.accumulate((-(-s // 4) * 4 for s in sizes), initial=0))
    buffer = like.new_empty(starts[-1], dtype=torch.float32)
    return backward_kernels.Direction(*(buffer[i : i + s] for i, s in zip(starts, sizes, strict=False)))


def prepare(
    p: Prepared, row: Tensor, g_row: Tensor | None, rows: backward_kernels.Direction | None, col: Tensor | None,
    g_col: Tensor | None, cols: backward_kernels.Direction | None, largest: Tensor | None, top: float,
) -> None:  # fmt: skip
    """Fills the Directions from the normalisers and from their gradients times top / largest."""
    m, n = row.shape[0], 0 if col is None else col.shape[0]
    backward_kernels.prepare[(triton.cdiv(max(m, n), configs.TILE), 2)](
        row, g_row, rows, col, g_col, cols, largest, m, n, MODE=p.mode, TOP=top, SEGMENT=configs.TILE, **FUSED
    )


def finish(
    p: Prepared, grad: Tensor, out: Tensor | None, own: Tensor, other: Tensor, g_pos: Tensor | None,
    targets: Tensor | None, first: int, paired: int, largest: Tensor | None, top: float, dots: list[Tensor] | None,
    along: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes ``grad``'s rows, the problem's from ``first`` on, to ``out`` as gradients of the features.

    ``grad`` is too large by the factor top / largest. Parts of the scale's gradient are appended to ``dots``. A row's
    own features times ``along`` (M,) are subtracted before the scale multiplies; the scale's gradient is without them.
    """
    rows = grad.shape[0]
    programs = triton.cdiv(rows, FINISH_ROWS)
    parts = None if dots is None else grad.new_empty(programs, dtype=torch.float64)
    backward_kernels.finish[(programs,)](
        grad, own, other, g_pos, along, targets, p.spec.scale, largest, out, parts,
        rows, first, paired, grad.shape[1], grad.stride(0), own.stride(0), other.stride(0), _stride(out),
        TOP=top if largest is not None else 1.0, ROWS=FINISH_ROWS, BD=FINISH_D, **FUSED,
    )  # fmt: skip
    if dots is not None and parts is not None:
        dots.append(parts)


def add_positives(p: Prepared, dy: Tensor, dbias: Tensor | None, g_pos: Tensor) -> bool:
    """Adds the positives' part to ``dbias`` and, if rows have targets, to ``dy``, the sums over the negatives.

    Returns whether ``finish`` has yet to add it to ``dy``, as it does without targets.
    """
    targets = p.mask.targets
    if targets is None:
        if dbias is not None:
            dbias[: p.m] += g_pos
        return True
    # index_put_ sorts, so it is deterministic if several rows share a positive; index_add_ on a GPU is not. It takes
    # TARGET_ROWS at a time because its terms are float32 copies.
    for i in range(0, p.m if dy.shape[0] else 0, TARGET_ROWS):
        rows = slice(i, i + TARGET_ROWS)
        dy.index_put_((targets[rows],), g_pos[rows, None].float() * p.x[rows].float(), accumulate=True)
    if dbias is not None:
        dbias.index_put_((targets,), g_pos.float(), accumulate=True)
    return False


class _Backward:
    """What the steps of one backward share."""

    def __init__(self, p: Prepared, saved: Forward, upstream: Upstream, needs: Needs) -> None:
        self.p, self.needs = p, needs
        self.g_pos, g_row, g_col = (None if g is None else g.contiguous() for g in upstream)
        if not p.spec.paired:
            self.g_pos = None
        self.by_rows = needs.x or (needs.scale and not needs.y)  # dscale is formed with dx, or else with dy
        self.largest: Tensor | None = None
        self.top = 1.0
        if p.teacher:  # nothing arrives at the teacher's log-sum-exp
            g_row, g_col = (None if g is None else g[:, :2] for g in (g_row, g_col))
        normalised = [g for g in (g_row, g_col) if g is not None]
        if p.dtype == torch.float16 and normalised:
            together = torch.cat(normalised) if len(normalised) > 1 else normalised[0]
            self.largest = torch.linalg.vector_norm(together, ord=torch.inf).clamp_min(SMALLEST)
            self.top = FP16_TOP / 2 if p.added or p.teacher else FP16_TOP  # a pair may gain from both parts
        self.has_negatives = bool(normalised)
        self.dots: list[Tensor] = []
        # Of all pairs; or of those that are not related, and of those that are; or of all, and the sums of related; or
        # of all by our logits, and by the teacher's, whose log-sum-exp is the last part of the statistic.
        self.g_rows = _parts(p, g_row)
        self.directions: list[tuple[backward_kernels.Direction | None, backward_kernels.Direction | None]] = []
        if p.softplus or not self.has_negatives:
            return
        for row, of_row, col, of_col in zip(
            _parts(p, saved.row), self.g_rows, _parts(p, saved.col), _parts(p, g_col), strict=True
        ):
            assert row is not None
            rows, cols = (None if g is None else direction_of(n, g) for g, n in ((of_row, p.m), (of_col, p.n)))
            prepare(p, row, of_row, rows, col, of_col, cols, self.largest, self.top)
            self.directions.append((rows, cols))

    def gradient(self, b: Block, room: Tensor) -> Tensor:
        """G of a block, its positives 0, times top / largest."""
        p, kept = self.p, self.p.kept.block(b.rows, b.cols)
        out, gemm_products = storage.block_of(room, b.height, b.width), kept.products
        if p.by_vendor and gemm_products is None:
            gemm_products = out  # each tile is read before it is overwritten
            p.products(b, gemm_products.values)
        kept = kept._replace(products=gemm_products)
        if p.softplus:
            g_row, *related_g = self.g_rows
            block_of_sigmoids(p, b, kept, g_row, self.largest, self.top, out, *related_g)
        else:
            (rows, cols), *related = self.directions
            block_of_weights(p, b, kept, rows, cols, out, *itertools.chain(*related))
        return out.values


def _parts(p: Prepared, t: Tensor | None) -> list[Tensor | None]:
    """A statistic's normalisers, or their gradients: one, or two where related pairs are apart or added up, or where
    there is a teacher.
    """
    if t is None or not p.two:
        return [t] * (2 if p.two else 1)
    return [t[:, k].contiguous() for k in (0, -1)]


def backward(spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs) -> Gradients:
    if needs.joint:
        both = backward(spec, x, y, saved, upstream, needs._replace(y=True, joint=False))
        assert both.x is not None
        assert both.y is not None
        return both._replace(x=both.x + both.y, y=None)
    if spec.upper:  # the lower triangle's pairs are the columns of the upper one
        saved, upstream = saved._replace(col=saved.row), upstream._replace(col=upstream.row)
    p = Prepared(spec, x, y, saved.kept)
    gx = x.new_empty(p.m, p.d) if needs.x else None
    gy = y.new_empty(p.n, p.d) if needs.y else None
    with device.current(x.device):
        run = _Backward(p, saved, upstream, needs)
        all_blocks = p.blocks(*(GRADIENT_BLOCK if p.half else FLOAT32_BLOCK))
        height, width = largest(all_blocks if run.has_negatives else [])
        # The sums over the negatives: dx holds one row of blocks at a time; dy and dbias are summed to the end.
        new = torch.empty if run.has_negatives else torch.zeros
        dx_height = largest(all_blocks)[0] if run.by_rows else 0
        dx = new(dx_height, p.d, dtype=torch.float32, device=x.device)
        dy = new(p.n if needs.y else 0, p.d, dtype=torch.float32, device=x.device)
        dbias = torch.zeros(p.n if needs.col_bias else 0, dtype=torch.float32, device=x.device)
        room = storage.scratch(x, height, width, x.dtype)
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
                finish(
                    p, dx[: b.height], gx, p.x, p.y, run.g_pos, p.mask.targets, b.row0, p.m, run.largest, run.top,
                    run.dots if needs.scale else None,
                )  # fmt: skip
        factor, paired = run.largest, p.m
        if factor is not None:
            dbias *= factor / run.top
            if needs.y and run.g_pos is not None and p.mask.targets is not None:
                dy *= factor / run.top
                factor = None
        if run.g_pos is not None and not add_positives(p, dy, dbias if needs.col_bias else None, run.g_pos):
            paired = 0
        if needs.y:
            dots = run.dots if needs.scale and not run.by_rows else None
            finish(p, dy, gy, p.y, p.x, run.g_pos, None, 0, paired, factor, run.top, dots)
        dscale = torch.cat(run.dots).sum().float() if needs.scale else None
    return Gradients(gx, gy, dscale, summed_like(spec.col_bias, dbias) if needs.col_bias else None)


TRIAL_SIZE = 8192  # rows and columns of the problem to measure on


def _work(trial: tune.Trial) -> Callable[[], object]:
    """A function that runs a trial's kernel once, and as little else as possible, on random features."""
    where = torch.device(trial.device.type)
    size = 64 if trial.device.interpreted else TRIAL_SIZE
    generator = torch.Generator(where).manual_seed(0)  # the user's random numbers stay as they are
    features = (torch.randn(size, trial.d, device=where, generator=generator) for _ in range(2))
    x, y = (torch.nn.functional.normalize(t, dim=1).to(trial.dtype) for t in features)
    scale = torch.full((), 20.0, device=where)
    spec = StatsSpec(scale, kept_rows=size if trial.kernel == "kept" else 0)
    if trial.kernel == "sums":
        spec = spec._replace(want_col=False, statistic="softplus")
    if trial.kernel in ("statistics", "sums"):
        return lambda: forward(spec, x, y)
    saved = forward(spec, x, y)
    g = torch.full((size,), 1 / size, dtype=torch.float64, device=where)
    p = Prepared(spec, x, y, saved.kept)
    run = _Backward(p, saved, Upstream(None, g, g), Needs(True, True, True, False))
    block = p.blocks(*(GRADIENT_BLOCK if p.half else FLOAT32_BLOCK))[0]
    room = storage.scratch(x, block.height, block.width, x.dtype)
    return lambda: run.gradient(block, room)
