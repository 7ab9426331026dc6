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
from fused_contrastive.core.tokens import MaxSimForward, MaxSimUpstream, TokenSpec, argmaxima, real
from fused_contrastive.core.unit import unit_rows

CHUNK_ROWS = 1024
CHUNK_PRODUCTS = 2**24  # of tokens, in max_sim


def unavailable() -> str | None:
    return None


def supports(device_type: str, dtype: torch.dtype) -> bool:
    return True


def kept(rows: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    return (rows, n), compute_dtype(dtype)


def _targets(spec: StatsSpec, x: Tensor) -> Tensor:  # (M,)
    return torch.arange(x.shape[0], device=x.device) if spec.targets is None else spec.targets


def _equal_ids(spec: StatsSpec, rows: slice) -> Tensor | None:
    """(R, N) bool."""
    if spec.row_ids is None or spec.col_ids is None:
        return None
    return spec.row_ids[rows, None] == spec.col_ids


def _logits(spec: StatsSpec, products: Tensor, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows' products -> their logits with -inf where excluded, (R, N), and the positives' logits, (R,)."""
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
        if spec.reduction == "softplus":
            row[rows] = torch.logaddexp(logits, logits.new_zeros(())).sum(dim=1)
            continue
        if spec.rows:
            row[rows] = _log_sum_exp(logits, dim=1)
        if spec.cols:
            col = torch.logaddexp(col, _log_sum_exp(logits, dim=0))
    return Forward(pos, row, col, products_kept)


def _log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    """NaN, as a softmax is, where a logit is +inf."""
    value = logits.logsumexp(dim=dim)
    return value.masked_fill(value == torch.inf, torch.nan)


def _weights(logits: Tensor, normaliser: Tensor) -> Tensor:
    """exp(logits - normaliser), 0 where nothing was left to normalise (normaliser -inf)."""
    return (logits - normaliser.masked_fill(normaliser == -torch.inf, 0)).exp()


def _negatives(spec: StatsSpec, logits: Tensor, rows: slice, saved: Forward, upstream: Upstream) -> Tensor:
    """G without the positives, (R, N)."""
    grad = torch.zeros_like(logits)
    if upstream.row is not None and spec.reduction == "softplus":
        grad += upstream.row[rows, None] * logits.sigmoid()
        if spec.equal_ids == "negate" and (equal := _equal_ids(spec, rows)) is not None:
            grad = torch.where(equal, -grad, grad)
    elif upstream.row is not None:
        grad += upstream.row[rows, None] * _weights(logits, saved.row[rows, None])
    if upstream.col is not None:
        grad += upstream.col * _weights(logits, saved.col)
    return grad


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
        grad = _negatives(spec, logits, rows, saved, upstream).to(dtype)
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


def _real(lengths: Tensor | None, tokens: Tensor) -> Tensor:
    """(B,) lengths of (B, L, D) tokens -> (B, L) bool."""
    return tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if lengths is None else real(lengths, tokens.shape[1])


class _Maxima:
    """Late interaction of x (M, T, D) and y (N, P, D), one chunk of x's items at a time."""

    def __init__(self, spec: TokenSpec, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.to(compute_dtype(x.dtype)), y.to(compute_dtype(x.dtype))
        self.x_real, self.y_real = _real(spec.x_lengths, x), _real(spec.y_lengths, y)  # (M, T), (N, P)

    def chunks(self) -> list[slice]:
        (m, t, _), (n, p, _) = self.x.shape, self.y.shape
        size = max(1, CHUNK_PRODUCTS // (n * t * p))
        return [slice(i, min(i + size, m)) for i in range(0, m, size)]

    def products(self, rows: slice) -> Tensor:  # (R, N, T, P)
        flat = self.x[rows].flatten(0, 1) @ self.y.flatten(0, 1).T
        return flat.view(-1, self.x.shape[1], *self.y.shape[:2]).transpose(1, 2)

    def over_y(self, products: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Sums (R, N) and argmaxima (R, N, T) of the direction x."""
        value, index = products.masked_fill(~self.y_real[None, :, None], -torch.inf).max(dim=3)
        return value.masked_fill(~self.x_counts(rows), 0).sum(dim=2), index

    def over_x(self, products: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Sums (R, N) and argmaxima (R, N, P) of the direction y."""
        value, index = products.masked_fill(~self.x_real[rows, None, :, None], -torch.inf).max(dim=2)
        return value.masked_fill(~self.y_counts(rows), 0).sum(dim=2), index

    def x_counts(self, rows: slice) -> Tensor:
        """Which tokens of x have a maximum, (R, N, T): real ones, where y has any."""
        return self.x_real[rows, None] & self.y_real.any(dim=1)[None, :, None]

    def y_counts(self, rows: slice) -> Tensor:
        """Which tokens of y have a maximum, (R, N, P)."""
        return self.y_real[None] & self.x_real[rows].any(dim=1)[:, None, None]


def normalize(*views: Tensor) -> Tensor:
    return unit_rows(torch.cat(views))


def max_sim_forward(spec: TokenSpec, x: Tensor, y: Tensor) -> MaxSimForward:
    maxima = _Maxima(spec, x, y)
    shape = (x.shape[0], y.shape[0])
    x_sums, y_sums = maxima.x.new_empty(shape), maxima.x.new_empty(shape if spec.both else (0, 0))
    argmax_x, argmax_y = argmaxima(spec.kept_rows, x, y, spec.both)
    for rows in maxima.chunks():
        products = maxima.products(rows)
        x_sums[rows], index = maxima.over_y(products, rows)
        argmax_x[rows] = index[: argmax_x[rows].shape[0]].to(argmax_x.dtype)
        if spec.both:
            y_sums[rows], index = maxima.over_x(products, rows)
            argmax_y[rows] = index[: argmax_y[rows].shape[0]].to(argmax_y.dtype)
    return MaxSimForward(x_sums, y_sums, argmax_x, argmax_y)


def max_sim_backward(
    spec: TokenSpec, x: Tensor, y: Tensor, saved: MaxSimForward, upstream: MaxSimUpstream, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    maxima = _Maxima(spec, x, y)
    t, (n, p, _) = x.shape[1], y.shape
    dx, dy = torch.zeros_like(maxima.x), torch.zeros_like(maxima.y)
    for rows in maxima.chunks():
        kept = rows.stop <= spec.kept_rows
        products = None if kept else maxima.products(rows)
        grad = x.new_zeros(rows.stop - rows.start, n, t, p, dtype=dx.dtype)  # of the products: 0 but at the maxima
        if upstream.x is not None:
            index = saved.argmax_x[rows] if products is None else maxima.over_y(products, rows)[1]
            at = index[..., None] == torch.arange(p, device=x.device)
            grad += torch.where(at & maxima.x_counts(rows)[..., None], upstream.x[rows, :, None, None], 0)
        if upstream.y is not None:
            index = saved.argmax_y[rows] if products is None else maxima.over_x(products, rows)[1]
            at = index[:, :, None] == torch.arange(t, device=x.device)[:, None]
            grad += torch.where(at & maxima.y_counts(rows)[:, :, None], upstream.y[rows, :, None, None], 0)
        flat = grad.transpose(1, 2).reshape(-1, n * p)  # (R T, N P)
        dx[rows] = (flat @ maxima.y.flatten(0, 1)).view_as(dx[rows])
        dy += (flat.T @ maxima.x[rows].flatten(0, 1)).view_as(dy)
    dx, dy = dx.masked_fill_(~maxima.x_real[..., None], 0), dy.masked_fill_(~maxima.y_real[..., None], 0)  # 0 times inf
    return dx.to(x.dtype) if needs[0] else None, dy.to(y.dtype) if needs[1] else None


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
