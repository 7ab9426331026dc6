"""The reference backend: the primitive in plain torch, on any device, one chunk of rows at a time.

It is written to be read beside the formulas, and needs nothing but torch. Products are in the compute dtype;
exponentials of the logits and their sums are in the statistics' dtype (``core/spec.py`` defines both).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.backends.contract import Backend
from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds
from fused_contrastive.core.spec import (
    Forward,
    Gradients,
    Needs,
    StatsSpec,
    Upstream,
    compute_dtype,
    empty,
    merged,
    statistics_dtype,
    summed_like,
)

CHUNK_ROWS = 1024


class Reference(Backend):
    def unavailable(self) -> str | None:
        return None

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        return True

    def kept(self, rows: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        return (rows, n), compute_dtype(dtype)

    def stats_forward(self, spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
        dtype, statistics = compute_dtype(x.dtype), statistics_dtype(x.device)
        x, y = x.to(dtype), y.to(dtype)
        targets = _targets(spec, x)
        m, n = x.shape[0], y.shape[0]
        parts = math.prod(spec._replace(want_row=True).shapes(1, 1)[1])
        pos = x.new_empty(m if spec.paired else 0, dtype=statistics)
        row = x.new_empty(m if spec.want_row else 0, parts, dtype=statistics)
        col = empty(spec, (n if spec.want_col or spec.upper else 0, parts), x)
        products_kept = x.new_empty(spec.kept_rows, n)
        for rows in _chunks(m):
            products = x[rows] @ y.T
            products_kept[rows] = products[: products_kept[rows].shape[0]]
            tile = masked_logits(spec, products, rows, targets)
            if spec.paired:
                pos[rows] = tile.pos
            of_rows, of_cols = ([t.to(statistics) for t in part] for part in (tile.of_rows, tile.of_cols))
            row_ranks = _ranks(tile.of_rows[0], tile.negated, spec.row_reference, rows, 1, statistics)
            col_ranks = _ranks(tile.of_cols[0], tile.negated, spec.col_reference, slice(None), 0, statistics)
            if spec.statistic == "softplus":
                sums = [torch.logaddexp(s, s.new_zeros(())).sum(dim=1) for s in of_rows]
                row[rows] = torch.stack(sums + row_ranks, dim=1)
                continue
            if spec.statistic == "teacher":
                teacher = (tile.teacher, of_rows[0])
                if spec.want_row:
                    row[rows] = _by_teacher(*teacher, dim=1)
                if len(col):
                    col = merged(spec, col, _by_teacher(*teacher, dim=0))
                continue
            added = None if tile.added is None else torch.where(tile.added, of_rows[0], 0)
            if spec.want_row:
                row[rows] = torch.stack([_log_sum_exp(s, dim=1) for s in of_rows] + _sums(added, 1) + row_ranks, dim=1)
            if len(col):
                part = torch.stack([_log_sum_exp(s, dim=0) for s in of_cols] + _sums(added, 0) + col_ranks, dim=1)
                col = merged(spec, col, part)
        if parts == 1:
            row, col = row.squeeze(1), col.squeeze(1)
        if spec.upper:
            return Forward(pos, merged(spec, row, col), col.new_empty(0, *row.shape[1:]), products_kept)
        return Forward(pos, row, col, products_kept)

    def stats_backward(
        self, spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
    ) -> Gradients:
        x_dtype, y_dtype, dtype = x.dtype, y.dtype, compute_dtype(x.dtype)
        x, y = x.to(dtype), y.to(dtype)
        targets = _targets(spec, x)
        if spec.upper:  # the lower triangle's pairs are the columns of the upper one
            saved, upstream = saved._replace(col=saved.row), upstream._replace(col=upstream.row)
        dx, dy, dbias = torch.zeros_like(x), torch.zeros_like(y), x.new_zeros(y.shape[0])
        for rows in _chunks(x.shape[0]):
            products = saved.kept[rows] if rows.stop <= spec.kept_rows else x[rows] @ y.T
            tile = masked_logits(spec, products, rows, targets)
            grad = _negatives(spec, tile, rows, saved, upstream, statistics_dtype(x.device)).to(dtype)
            dx[rows] = grad @ y
            dy += grad.T @ x[rows]
            dbias += grad.sum(dim=0)
        if upstream.pos is not None and spec.paired:
            g_pos = upstream.pos.to(dtype)
            dx += g_pos[:, None] * y[targets]
            dy.index_add_(0, targets, g_pos[:, None] * x)
            dbias.index_add_(0, targets, g_pos)
        dscale = (x * dx).sum() if needs.scale else None
        if needs.joint:
            dx += dy
        return Gradients(
            x=(spec.scale * dx).to(x_dtype) if needs.x else None,
            y=(spec.scale * dy).to(y_dtype) if needs.y else None,
            scale=dscale,
            col_bias=summed_like(spec.col_bias, dbias) if needs.col_bias else None,
        )

    def prefixes_forward(self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
        return _prefixes_forward(spec, of, x, y)

    def prefixes_backward(
        self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream,
        needs: PrefixNeeds,
    ) -> PrefixGradients:  # fmt: skip
        return _prefixes_backward(spec, of, x, y, saved, upstream, needs)


def _targets(spec: StatsSpec, x: Tensor) -> Tensor:  # (M,)
    return torch.arange(x.shape[0], device=x.device) if spec.targets is None else spec.targets


def _related(spec: StatsSpec, rows: slice) -> Tensor | None:
    """Which pairs of some rows have equal ids, (R, N) bool; None if the problem has no ids."""
    if spec.row_ids is None or spec.col_ids is None:
        return None
    if spec.row_ids.dim() == 1:
        return spec.row_ids[rows, None] == spec.col_ids
    return (spec.row_ids[rows, None] == spec.col_ids).any(dim=2)


class MaskedLogits(NamedTuple):
    """Logits of some rows, -inf where excluded: one (R, N), or two with ``equal_ids="apart"``."""

    of_rows: list[Tensor]
    of_cols: list[Tensor]  # the same unless there are limits
    pos: Tensor  # (R,) logits of the positives
    negated: Tensor | None  # (R, N) bool: whose logits have changed sign
    added: Tensor | None  # (R, N) bool: whose logits are added up
    teacher: Tensor  # (R, N) the teacher's logits, -inf in columns whose bias is; anything without a teacher


def masked_logits(spec: StatsSpec, products: Tensor, rows: slice, targets: Tensor) -> MaskedLogits:
    """Turns some rows' products into logits. A new rule of exclusion belongs here: forward and backward call it."""
    logits = similarities = spec.scale * products
    if spec.row_guide is not None and spec.col_guide is not None:
        similarities = spec.row_guide[rows].to(products.dtype) @ spec.col_guide.to(products.dtype).T
    if spec.col_bias is not None:
        logits = logits + spec.col_bias
    columns = torch.arange(products.shape[1], device=products.device)
    own = torch.arange(rows.start, rows.stop, device=products.device)[:, None]
    excluded = torch.zeros_like(products, dtype=torch.bool)
    pos = logits.new_empty(0)
    if spec.paired:
        positive = targets[rows, None]  # (R, 1)
        pos = logits.gather(1, positive).squeeze(1)
        pos = pos.masked_fill(pos == torch.inf, torch.nan)
        excluded = columns == positive
    if spec.exclude_self:
        excluded |= columns == own
    if spec.upper:
        excluded |= columns <= own
    related, negated, added = _related(spec, rows), None, None
    if related is not None:
        if spec.equal_ids == "negate" or (spec.equal_ids == "apart" and spec.statistic == "softplus"):
            logits, negated = torch.where(related, -logits, logits), related
        if spec.equal_ids == "exclude":
            excluded |= related
        elif spec.equal_ids == "only":
            excluded |= ~related
        elif spec.equal_ids == "add":
            added = related & ~excluded
    logits = logits.masked_fill(excluded, -torch.inf)
    of_rows = of_cols = [logits]
    if spec.equal_ids == "apart" and related is not None:
        of_rows = of_cols = [logits.masked_fill(related, -torch.inf), logits.masked_fill(~related, -torch.inf)]
    if spec.row_limit is not None:
        above = similarities > spec.row_limit[rows, None]
        of_rows = [s.masked_fill(above, -torch.inf) for s in of_rows]
    if spec.col_limit is not None:
        above = similarities > spec.col_limit
        of_cols = [s.masked_fill(above, -torch.inf) for s in of_cols]
    teacher = similarities
    if spec.col_bias is not None:
        teacher = teacher.masked_fill(spec.col_bias == -torch.inf, -torch.inf)
    return MaskedLogits(of_rows, of_cols, pos, negated, added, teacher)


def _chunks(m: int) -> list[slice]:
    return [slice(i, min(i + CHUNK_ROWS, m)) for i in range(0, m, CHUNK_ROWS)]


def _log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """logsumexp, but NaN where a logit is +inf, as a softmax is."""
    value = logits.logsumexp(dim=dim)
    return value.masked_fill(value == torch.inf, torch.nan)


def _by_teacher(teacher: Tensor, logits: Tensor, dim: int) -> Tensor:
    """The log-sum-exp of the logits, their mean by the teacher's softmax, and its log-sum-exp, along ``dim``."""
    teacher = teacher.to(logits.dtype)
    total = _log_sum_exp(teacher, dim=dim)
    weighted = torch.where(teacher == -torch.inf, 0, logits) * _weights(teacher, total.unsqueeze(dim))
    return torch.stack((_log_sum_exp(logits, dim=dim), weighted.sum(dim=dim), total), dim=1)


def _sums(added: Tensor | None, dim: int) -> list[Tensor]:
    return [] if added is None else [added.sum(dim=dim)]


def _ranks(
    logits: Tensor, positives: Tensor | None, reference: Tensor | None, some: slice, dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """How many logits are above some of the references, and the highest of them, along ``dim``, without ``positives``.

    A NaN is above every reference, and is never the highest.
    """
    if reference is None:
        return []
    counted = logits if positives is None else logits.masked_fill(positives, -torch.inf)
    above = (~(counted <= reference[some].unsqueeze(dim))).sum(dim=dim)
    return [above.to(dtype), counted.masked_fill(counted.isnan(), -torch.inf).amax(dim=dim).to(dtype)]


def _weights(logits: Tensor, normaliser: Tensor) -> Tensor:
    """exp(logits - normaliser); 0 where all pairs are excluded (normaliser -inf)."""
    return (logits - normaliser.masked_fill(normaliser == -torch.inf, 0)).exp()


def _negatives(
    spec: StatsSpec, tile: MaskedLogits, rows: slice, saved: Forward, upstream: Upstream, dtype: torch.dtype
) -> Tensor:
    """G without the positives, (R, N)."""
    grad = torch.zeros_like(tile.of_rows[0], dtype=dtype)
    if spec.statistic == "teacher":
        s, t = tile.of_rows[0].to(dtype), tile.teacher.to(dtype)
        for value, g, dim in ((saved.row, upstream.row, 1), (saved.col, upstream.col, 0)):
            if g is not None:
                value, g = (each[rows] if dim else each for each in (value, g))
                grad += g[:, 0].unsqueeze(dim) * _weights(s, value[:, 0].unsqueeze(dim))
                grad += g[:, 1].unsqueeze(dim) * _weights(t, value[:, 2].unsqueeze(dim))
        return grad
    if upstream.row is not None:
        g_row, row = upstream.row[rows].view(len(grad), -1), saved.row[rows].view(len(grad), -1)
        for k, logits in enumerate(tile.of_rows):
            s = logits.to(dtype)
            grad += g_row[:, k, None] * (s.sigmoid() if spec.statistic == "softplus" else _weights(s, row[:, k, None]))
    if upstream.col is not None:
        n = grad.shape[1]
        g_col, col = upstream.col.view(n, -1), saved.col.view(n, -1)
        for k, logits in enumerate(tile.of_cols):
            grad += g_col[:, k] * _weights(logits.to(dtype), col[:, k])
    if tile.added is not None:
        for g, dim in ((upstream.row, 1), (upstream.col, 0)):
            if g is not None:
                g = g[rows] if dim else g
                grad += torch.where(tile.added, g[:, 1].unsqueeze(dim), 0)
    return grad if tile.negated is None else torch.where(tile.negated, -grad, grad)


# Nested prefixes: products grow from prefix to prefix, and each prefix's logits go through the functions of a problem.
# The columns that a prefix adds to the one before get the sum of the G of all prefixes that contain them, so that the
# gradients take the products of one problem.


def _cosines(of: Prefixes, x: Tensor, y: Tensor, rows: slice) -> list[Tensor]:
    """The (R, N) products of each prefix, times its factors."""
    products = x.new_zeros(rows.stop - rows.start, y.shape[0])
    found = []
    for k, part in enumerate(of.parts):
        products = products + x[rows, part] @ y[:, part].T
        found.append(products * _factors(of, k, rows, x))
    return found


def _factors(of: Prefixes, k: int, rows: slice, like: Tensor) -> Tensor:
    """(R, N), or ()."""
    return like.new_ones(()) if of.row is None or of.col is None else of.row[k, rows, None] * of.col[k]


def _prefixes_forward(spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
    dtype, statistics, count = compute_dtype(x.dtype), statistics_dtype(x.device), len(of.dims)
    x, y = x.to(dtype), y.to(dtype)
    m, n = x.shape[0], y.shape[0]
    targets = spec.positive_columns(m)
    pos, row = (x.new_empty(count, m, dtype=statistics) for _ in range(2))
    col = x.new_full((count, n if spec.want_col else 0), -torch.inf, dtype=statistics)
    for rows in _chunks(m):
        for k, cosines in enumerate(_cosines(of, x, y, rows)):
            tile = masked_logits(spec, cosines, rows, targets)
            logits = tile.of_rows[0].to(statistics)
            pos[k, rows], row[k, rows] = tile.pos, _log_sum_exp(logits, dim=1)
            if spec.want_col:
                col[k] = merged(spec, col[k], _log_sum_exp(logits, dim=0))
    return Forward(pos, row, col, x.new_empty(0, 0))


def _prefixes_backward(
    spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: PrefixNeeds
) -> PrefixGradients:
    x_dtype, y_dtype, dtype, statistics = x.dtype, y.dtype, compute_dtype(x.dtype), statistics_dtype(x.device)
    x, y = x.to(dtype), y.to(dtype)
    targets = spec.positive_columns(x.shape[0])
    dx, dy, dscale = torch.zeros_like(x), torch.zeros_like(y), x.new_zeros((), dtype=statistics)
    along_x, along_y = (t.new_zeros(len(of.dims), t.shape[0], dtype=statistics) for t in (x, y))
    for rows in _chunks(x.shape[0]):
        positive = targets[rows, None]
        grad, of_positive = x.new_zeros(rows.stop - rows.start, y.shape[0]), x.new_zeros(rows.stop - rows.start, 1)
        for k, cosines in reversed(list(enumerate(_cosines(of, x, y, rows)))):
            of_prefix = Upstream(*(None if g is None else g[k] for g in upstream))
            own = saved._replace(row=saved.row[k], col=saved.col[k])
            tile = masked_logits(spec, cosines, rows, targets)
            g = _negatives(spec, tile, rows, own, of_prefix, statistics).to(dtype)
            factors, part = _factors(of, k, rows, x), of.parts[k]
            dots = (g * cosines).to(statistics)  # x . dx of the prefix, before the scale
            grad = grad + g * factors
            if of_prefix.pos is not None:
                g_pos = of_prefix.pos[rows, None].to(dtype)
                dots.scatter_add_(1, positive, (g_pos * cosines.gather(1, positive)).to(statistics))
                of_positive = of_positive + g_pos * (factors.gather(1, positive) if of.row is not None else 1)
            along_x[k, rows] = dots.sum(dim=1)
            along_y[k] += dots.sum(dim=0)
            dscale += dots.sum()
            dx[rows, part] = spec.scale * (grad @ y[:, part] + of_positive * y[positive[:, 0], part])
            dy[:, part] += spec.scale * (grad.T @ x[rows, part]).index_add(
                0, positive[:, 0], of_positive * x[rows, part]
            )
    for t, gradient, inverse, along in ((x, dx, of.row, along_x), (y, dy, of.col, along_y)):
        if inverse is not None:  # what would change the length of a prefix is taken away, for all that contain a column
            share = (spec.scale * along * inverse.square()).flip(0).cumsum(dim=0).flip(0).to(dtype)
            for k, part in enumerate(of.parts):
                gradient[:, part] -= share[k, :, None] * t[:, part]
    return PrefixGradients(
        dx.to(x_dtype) if needs.x else None,
        dy.to(y_dtype) if needs.y else None,
        dscale.to(dtype) if needs.scale else None,
    )


BACKEND = Reference()
