"""The reference backend: the primitive in plain torch, on any device, one chunk of rows at a time.

It is written to be read beside the formulas, and needs nothing but torch. Products are in the compute dtype;
exponentials of the logits and their sums are in the statistics' dtype (``core/spec.py`` defines both).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.backends.contract import Backend
from fused_contrastive.core.spec import (
    Forward,
    Gradients,
    Needs,
    StatsSpec,
    Upstream,
    compute_dtype,
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
        pos = x.new_empty(m, dtype=statistics)
        row = x.new_empty(m if spec.want_row else 0, dtype=statistics)
        col = x.new_full((n if spec.want_col or spec.upper else 0,), -torch.inf, dtype=statistics)
        products_kept = x.new_empty(spec.kept_rows, n)
        for rows in _chunks(m):
            products = x[rows] @ y.T
            products_kept[rows] = products[: products_kept[rows].shape[0]]
            logits, pos[rows] = masked_logits(spec, products, rows, targets)
            logits = logits.to(statistics)
            if spec.statistic == "softplus":
                row[rows] = torch.logaddexp(logits, logits.new_zeros(())).sum(dim=1)
                continue
            if spec.want_row:
                row[rows] = _log_sum_exp(logits, dim=1)
            if len(col):
                col = torch.logaddexp(col, _log_sum_exp(logits, dim=0))
        if spec.upper:
            return Forward(pos, torch.logaddexp(row, col), col.new_empty(0), products_kept)
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
            logits, _ = masked_logits(spec, products, rows, targets)
            logits = logits.to(statistics_dtype(x.device))
            grad = _negatives(spec, logits, rows, saved, upstream).to(dtype)
            dx[rows] = grad @ y
            dy += grad.T @ x[rows]
            dbias += grad.sum(dim=0)
        if upstream.pos is not None:
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


def _targets(spec: StatsSpec, x: Tensor) -> Tensor:  # (M,)
    return torch.arange(x.shape[0], device=x.device) if spec.targets is None else spec.targets


def _equal_ids(spec: StatsSpec, rows: slice) -> Tensor | None:
    """Which pairs of some rows have equal ids, (R, N) bool; None if the problem has no ids."""
    if spec.row_ids is None or spec.col_ids is None:
        return None
    return spec.row_ids[rows, None] == spec.col_ids


def masked_logits(spec: StatsSpec, products: Tensor, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turns some rows' products into logits, (R, N), -inf where excluded, and the positives' logits, (R,).

    A new rule of exclusion belongs here; forward and backward both call it.
    """
    logits = spec.scale * products
    if spec.col_bias is not None:
        logits = logits + spec.col_bias
    positive = targets[rows, None]  # (R, 1)
    pos = logits.gather(1, positive).squeeze(1)
    pos = pos.masked_fill(pos == torch.inf, torch.nan)
    columns = torch.arange(products.shape[1], device=products.device)
    own = torch.arange(rows.start, rows.stop, device=products.device)[:, None]
    excluded = columns == positive
    if spec.exclude_self:
        excluded |= columns == own
    if spec.upper:
        excluded |= columns <= own
    if (equal := _equal_ids(spec, rows)) is not None:
        if spec.equal_ids == "negate":
            logits = torch.where(equal, -logits, logits)
        else:
            excluded |= equal if spec.equal_ids == "exclude" else ~equal
    return logits.masked_fill(excluded, -torch.inf), pos


def _chunks(m: int) -> list[slice]:
    return [slice(i, min(i + CHUNK_ROWS, m)) for i in range(0, m, CHUNK_ROWS)]


def _log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """logsumexp, but NaN where a logit is +inf, as a softmax is."""
    value = logits.logsumexp(dim=dim)
    return value.masked_fill(value == torch.inf, torch.nan)


def _weights(logits: Tensor, normaliser: Tensor) -> Tensor:
    """exp(logits - normaliser); 0 where all pairs are excluded (normaliser -inf)."""
    return (logits - normaliser.masked_fill(normaliser == -torch.inf, 0)).exp()


def _negatives(spec: StatsSpec, logits: Tensor, rows: slice, saved: Forward, upstream: Upstream) -> Tensor:
    """G without the positives, (R, N)."""
    grad = torch.zeros_like(logits)
    if upstream.row is not None and spec.statistic == "softplus":
        grad += upstream.row[rows, None] * logits.sigmoid()
        if spec.equal_ids == "negate" and (equal := _equal_ids(spec, rows)) is not None:
            grad = torch.where(equal, -grad, grad)
    elif upstream.row is not None:
        grad += upstream.row[rows, None] * _weights(logits, saved.row[rows, None])
    if upstream.col is not None:
        grad += upstream.col * _weights(logits, saved.col)
    return grad


BACKEND = Reference()
