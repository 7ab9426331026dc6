"""The reference backend: the primitive in plain torch, on any device, one chunk of rows at a time.

Written to be read beside the formulas, and needs nothing but torch. Products are taken in the compute dtype; the
logits' exponentials and sums in the statistics' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core.order import ahead
from fused_contrastive.core.reduction import Reduction, reduce
from fused_contrastive.core.spec import Forward, Gradients, Needs, StatsSpec, Upstream, compute_dtype, statistics_dtype

CHUNK_ROWS = 1024


def unavailable() -> str | None:
    return None


def supports(device_type: str, dtype: torch.dtype) -> bool:
    return True


def kept(rows: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    return (rows, n), compute_dtype(dtype)


def _targets(spec: StatsSpec, x: Tensor) -> Tensor:  # (M,)
    return torch.arange(x.shape[0], device=x.device) if spec.targets is None else spec.targets


def _logits(spec: StatsSpec, products: Tensor, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows' products -> their logits with -inf where excluded, (R, N), and the positives' logits, (R,)."""
    logits = spec.scale * products
    if spec.col_bias is not None:
        logits = logits + spec.col_bias
    positive = targets[rows, None]  # (R, 1)
    pos = logits.gather(1, positive).squeeze(1)
    pos = pos.masked_fill(pos == torch.inf, torch.nan)
    columns = torch.arange(products.shape[1], device=products.device)
    excluded = columns == positive
    if spec.exclude_self:
        excluded |= columns == torch.arange(rows.start, rows.stop, device=products.device)[:, None]
    if spec.row_ids is not None and spec.col_ids is not None:
        excluded |= spec.row_ids[rows, None] == spec.col_ids
    return logits.masked_fill(excluded, -torch.inf), pos


def _chunks(m: int) -> list[slice]:
    return [slice(i, min(i + CHUNK_ROWS, m)) for i in range(0, m, CHUNK_ROWS)]


def stats_forward(spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
    dtype, statistics = compute_dtype(x.dtype), statistics_dtype(x.device)
    x, y = x.to(dtype), y.to(dtype)
    targets = _targets(spec, x)
    m, n = x.shape[0], y.shape[0]
    pos = x.new_empty(m, dtype=statistics)
    row = x.new_empty(m if spec.rows else 0, dtype=statistics)
    col = x.new_full((n if spec.cols else 0,), -torch.inf, dtype=statistics)
    products_kept = x.new_empty(spec.kept_rows, n)
    for rows in _chunks(m):
        products = x[rows] @ y.T
        products_kept[rows] = products[: products_kept[rows].shape[0]]
        logits, pos[rows] = _logits(spec, products, rows, targets)
        logits = logits.to(statistics)
        if spec.rows:
            row[rows] = logits.logsumexp(dim=1)
        if spec.cols:
            col = torch.logaddexp(col, logits.logsumexp(dim=0))
    return Forward(pos, row, col, products_kept)


def _weights(logits: Tensor, normaliser: Tensor) -> Tensor:
    """exp(logits - normaliser), 0 where nothing was left to normalise (normaliser -inf)."""
    return (logits - normaliser.masked_fill(normaliser == -torch.inf, 0)).exp()


def stats_backward(
    spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
) -> Gradients:
    x_dtype, y_dtype, dtype = x.dtype, y.dtype, compute_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    targets = _targets(spec, x)
    dx, dy, dbias = torch.zeros_like(x), torch.zeros_like(y), x.new_zeros(y.shape[0])
    for rows in _chunks(x.shape[0]):
        products = saved.kept[rows] if rows.stop <= spec.kept_rows else x[rows] @ y.T
        logits, _ = _logits(spec, products, rows, targets)
        logits = logits.to(statistics_dtype(x.device))
        grad = torch.zeros_like(logits)  # G without the positives, (R, N)
        if upstream.row is not None:
            grad += upstream.row[rows, None] * _weights(logits, saved.row[rows, None])
        if upstream.col is not None:
            grad += upstream.col * _weights(logits, saved.col)
        grad = grad.to(dtype)
        dx[rows] = grad @ y
        dy += grad.T @ x[rows]
        dbias += grad.sum(dim=0)
    if upstream.pos is not None:
        g_pos = upstream.pos.to(dtype)
        dx += g_pos[:, None] * y[targets]
        dy.index_add_(0, targets, g_pos[:, None] * x)
        dbias.index_add_(0, targets, g_pos)
    return Gradients(
        x=(spec.scale * dx).to(x_dtype) if needs.x else None,
        y=(spec.scale * dy).to(y_dtype) if needs.y else None,
        scale=(x * dx).sum() if needs.scale else None,
        col_bias=dbias if needs.col_bias else None,
    )


def cross_entropy(
    pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: Reduction, dtype: torch.dtype
) -> Tensor:
    margins = pos - torch.stack(tuple(normalisers))  # (directions, M)
    # softplus(x) as -logsigmoid(-x), which keeps full relative precision: F.softplus turns linear above 20.
    losses = -(margins if decoupled else F.logsigmoid(margins)).mean(dim=0)
    return reduce(losses, reduction).to(dtype)


def merge_top_k(scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None:
    (m, n), k = scores.shape, values.shape[1]
    filled = min(first_column, k)
    columns = torch.arange(first_column, first_column + n, device=scores.device)
    scores = torch.cat((values[:, :filled], scores), dim=1)
    columns = torch.cat((indices[:, :filled], columns.expand(m, n)), dim=1)
    # Ascending by the negated score, NaN comes last; a stable sort leaves equal scores in the order of their columns.
    best = torch.sort(0 - scores, dim=1, stable=True).indices[:, :k]
    values[:, : best.shape[1]] = scores.gather(1, best)
    indices[:, : best.shape[1]] = columns.gather(1, best)


def count_ahead(scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor) -> None:
    columns = torch.arange(first_column, first_column + scores.shape[1], device=scores.device)
    counts += ahead(scores, columns, target_scores[:, None], targets[:, None]).sum(dim=1)
