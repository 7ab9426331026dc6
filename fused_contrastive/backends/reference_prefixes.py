"""The reference's statistics of nested prefixes: products that grow from prefix to prefix, some rows at a time.

Each prefix's logits go through the functions of one problem. The columns that prefix k adds to the one before get the
sum of the G of all prefixes that contain them, so that the gradients take the products of one problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.backends import reference
from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds
from fused_contrastive.core.spec import Forward, StatsSpec, Upstream, compute_dtype, merged, statistics_dtype


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


def forward(spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
    dtype, statistics, count = compute_dtype(x.dtype), statistics_dtype(x.device), len(of.dims)
    x, y = x.to(dtype), y.to(dtype)
    m, n = x.shape[0], y.shape[0]
    targets = spec.positive_columns(m)
    pos, row = (x.new_empty(count, m, dtype=statistics) for _ in range(2))
    col = x.new_full((count, n if spec.want_col else 0), -torch.inf, dtype=statistics)
    for rows in reference.chunks(m):
        for k, cosines in enumerate(_cosines(of, x, y, rows)):
            tile = reference.masked_logits(spec, cosines, rows, targets)
            logits = tile.of_rows[0].to(statistics)
            pos[k, rows], row[k, rows] = tile.pos, reference.log_sum_exp(logits, dim=1)
            if spec.want_col:
                col[k] = merged(spec, col[k], reference.log_sum_exp(logits, dim=0))
    return Forward(pos, row, col, x.new_empty(0, 0))


def backward(
    spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: PrefixNeeds
) -> PrefixGradients:
    x_dtype, y_dtype, dtype, statistics = x.dtype, y.dtype, compute_dtype(x.dtype), statistics_dtype(x.device)
    x, y = x.to(dtype), y.to(dtype)
    targets = spec.positive_columns(x.shape[0])
    dx, dy, dscale = torch.zeros_like(x), torch.zeros_like(y), x.new_zeros((), dtype=statistics)
    along_x, along_y = (t.new_zeros(len(of.dims), t.shape[0], dtype=statistics) for t in (x, y))
    for rows in reference.chunks(x.shape[0]):
        positive = targets[rows, None]
        grad, of_positive = x.new_zeros(rows.stop - rows.start, y.shape[0]), x.new_zeros(rows.stop - rows.start, 1)
        for k, cosines in reversed(list(enumerate(_cosines(of, x, y, rows)))):
            of_prefix = Upstream(*(None if g is None else g[k] for g in upstream))
            own = saved._replace(row=saved.row[k], col=saved.col[k])
            tile = reference.masked_logits(spec, cosines, rows, targets)
            g = reference.negatives(spec, tile, rows, own, of_prefix, statistics).to(dtype)
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
    for t, gradient, factors, along in ((x, dx, of.row, along_x), (y, dy, of.col, along_y)):
        if factors is not None:  # what would change the length of a prefix is taken away, for all that contain a column
            share = (spec.scale * along * factors.square()).flip(0).cumsum(dim=0).flip(0).to(dtype)
            for k, part in enumerate(of.parts):
                gradient[:, part] -= share[k, :, None] * t[:, part]
    return PrefixGradients(
        dx.to(x_dtype) if needs.x else None,
        dy.to(y_dtype) if needs.y else None,
        dscale.to(dtype) if needs.scale else None,
    )
