"""What every backend can do in plain torch, on any device: used unless a backend declares something better."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core.order import ahead
from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds
from fused_contrastive.core.reduction import Reduction, reduce
from fused_contrastive.core.spec import Forward, Gradients, Needs, StatsSpec, Upstream, compute_dtype
from fused_contrastive.core.tokens import MaxSimForward, MaxSimUpstream, TokenSpec, argmaxima, moved, put_back, real
from fused_contrastive.core.unit import unit_rows

StatsForward = Callable[[StatsSpec, Tensor, Tensor], Forward]
StatsBackward = Callable[[StatsSpec, Tensor, Tensor, Forward, Upstream, Needs], Gradients]

CHUNK_PRODUCTS = 2**24  # products of tokens that max_sim holds at a time


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
    """Late interaction of x (M, T, D) and y (N, P, D), one chunk of R of x's items at a time, each with C of y's."""

    def __init__(self, spec: TokenSpec, x: Tensor, y: Tensor) -> None:
        self.spec, self.columns = spec, spec.own or y.shape[0]
        x, y = moved(spec, x, y)
        self.x_real, y_real = _real(spec.x_lengths, x), _real(spec.y_lengths, y)  # (M, T), (N, P)
        self.x, y = x.to(compute_dtype(x.dtype)), y.to(compute_dtype(x.dtype))
        if spec.x_lengths is not None:
            self.x = self.x.masked_fill(~self.x_real[..., None], 0)
        if spec.y_lengths is not None:
            y = y.masked_fill(~y_real[..., None], 0)
        # Each item's own ones, (M, K, P, D), or the same for all, (1, N, P, D)
        sizes = len(x) if spec.own else 1, self.columns
        self.y, self.y_real = y.reshape(*sizes, *y.shape[1:]), y_real.reshape(*sizes, y.shape[1])

    def chunks(self) -> list[slice]:
        m, t, _ = self.x.shape
        size = max(1, CHUNK_PRODUCTS // (self.columns * t * self.y.shape[2]))
        return [slice(i, min(i + size, m)) for i in range(0, m, size)]

    def of(self, rows: slice) -> slice:
        """Which rows of ``y`` belong to items of x."""
        return rows if self.spec.own else slice(None)

    def products(self, rows: slice) -> Tensor:  # (R, C, T, P)
        x, y = self.x[rows], self.y[self.of(rows)].flatten(1, 2)
        flat = x @ y.transpose(1, 2) if self.spec.own else (x.flatten(0, 1) @ y[0].T).view(*x.shape[:2], -1)
        return flat.view(*x.shape[:2], self.columns, self.y.shape[2]).transpose(1, 2)

    def over_y(self, products: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Sums (R, C) and argmaxima (R, C, T) of the direction x; with ``smooth`` weights (R, C, T, P)."""
        masked = products.masked_fill(~self.y_real[self.of(rows), :, None], -torch.inf)
        if self.spec.smooth:
            top = masked.amax(dim=3, keepdim=True)
            weights = ((masked - top.masked_fill(top == -torch.inf, 0)) / self.spec.smooth).exp()
            total = weights.sum(dim=3, keepdim=True)
            value = (top + self.spec.smooth * total.log()).squeeze(3)
            found = weights / total.masked_fill(total == 0, 1)
        else:
            value, found = masked.max(dim=3)
        return value.masked_fill(~self.x_counts(rows), 0).sum(dim=2), found

    def over_x(self, products: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Sums (R, C) and argmaxima (R, C, P) of the direction y."""
        value, index = products.masked_fill(~self.x_real[rows, None, :, None], -torch.inf).max(dim=2)
        return value.masked_fill(~self.y_counts(rows), 0).sum(dim=2), index

    def x_counts(self, rows: slice) -> Tensor:
        """Which tokens of x have a maximum, (R, C, T): real ones, where y has any."""
        return self.x_real[rows, None] & self.y_real[self.of(rows)].any(dim=2)[..., None]

    def y_counts(self, rows: slice) -> Tensor:
        """Which tokens of y have a maximum, (R, C, P)."""
        return self.y_real[self.of(rows)] & self.x_real[rows].any(dim=1)[:, None, None]

    def gradient_of_products(self, rows: slice, saved: MaxSimForward, upstream: MaxSimUpstream) -> Tensor:
        """(R, C, T, P)"""
        kept = rows.stop <= self.spec.kept_rows
        products = None if kept else self.products(rows)
        t, p = self.x.shape[1], self.y.shape[2]
        grad = self.x.new_zeros(rows.stop - rows.start, self.columns, t, p)
        if upstream.x is not None:
            g, counts = upstream.x[rows, :, None, None], self.x_counts(rows)[..., None]
            found = saved.argmax_x[rows] if products is None else self.over_y(products, rows)[1]
            if self.spec.smooth:
                grad += torch.where(counts, g * found, 0)
            else:
                at = found[..., None] == torch.arange(p, device=g.device)
                grad += torch.where(at & counts, g, 0)
        if upstream.y is not None:
            found = saved.argmax_y[rows] if products is None else self.over_x(products, rows)[1]
            at = found[:, :, None] == torch.arange(t, device=grad.device)[:, None]
            grad += torch.where(at & self.y_counts(rows)[:, :, None], upstream.y[rows, :, None, None], 0)
        return grad


def normalize(*views: Tensor) -> Tensor:
    return unit_rows(torch.cat(views))


def max_sim_forward(spec: TokenSpec, x: Tensor, y: Tensor) -> MaxSimForward:
    maxima = _Maxima(spec, x, y)
    shape = (x.shape[0], maxima.columns)
    x_sums, y_sums = maxima.x.new_empty(shape), maxima.x.new_empty(shape if spec.both else (0, 0))
    argmax_x, argmax_y = argmaxima(spec.kept_rows, maxima.columns, x, y, spec.both)
    for rows in maxima.chunks():
        products = maxima.products(rows)
        x_sums[rows], index = maxima.over_y(products, rows)
        if not spec.smooth:
            argmax_x[rows] = index[: argmax_x[rows].shape[0]].to(argmax_x.dtype)
        if spec.both:
            y_sums[rows], index = maxima.over_x(products, rows)
            argmax_y[rows] = index[: argmax_y[rows].shape[0]].to(argmax_y.dtype)
    return MaxSimForward(x_sums, y_sums, argmax_x, argmax_y)


def max_sim_backward(
    spec: TokenSpec, x: Tensor, y: Tensor, saved: MaxSimForward, upstream: MaxSimUpstream, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    maxima = _Maxima(spec, x, y)
    dx, dy = torch.zeros_like(maxima.x), torch.zeros_like(maxima.y)
    for rows in maxima.chunks():
        grad = maxima.gradient_of_products(rows, saved, upstream)
        flat = grad.transpose(1, 2).flatten(2, 3)  # (R, T, C P)
        if not spec.own:
            flat = flat.flatten(0, 1)[None]  # (1, R T, N P)
        of = maxima.of(rows)
        dx[rows] = (flat @ maxima.y[of].flatten(1, 2)).view_as(dx[rows])
        dy[of] += (flat.transpose(1, 2) @ maxima.x[rows].reshape(len(flat), -1, x.shape[2])).view_as(dy[of])
    # Tokens that are not real have got 0 times their partner, which is NaN where that is inf.
    dx, dy = dx.masked_fill_(~maxima.x_real[..., None], 0), dy.masked_fill_(~maxima.y_real[..., None], 0)
    return (
        put_back(dx.to(x.dtype), spec.x_order) if needs[0] else None,
        put_back(dy.to(y.dtype).view_as(y), spec.y_order) if needs[1] else None,
    )


# Nested prefixes, one after another, by a backend's own functions. ``nothing`` is what it keeps of 0 rows.


def _prefix(t: Tensor, of: Prefixes, k: int, factors: Tensor | None) -> Tensor:
    """Prefix k of the features t, in their dtype, normalised if there are factors."""
    prefix = t[:, : of.dims[k]]
    return prefix if factors is None else (prefix.to(factors.dtype) * factors[k, :, None]).to(t.dtype)


def prefixes_forward(stats_forward: StatsForward, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
    spec = spec._replace(kept_rows=0)
    found = [stats_forward(spec, _prefix(x, of, k, of.row), _prefix(y, of, k, of.col)) for k in range(len(of.dims))]
    pos, row, col = (torch.stack([each[place] for each in found]) for place in range(3))
    return Forward(pos, row, col, x.new_empty(0, 0, dtype=compute_dtype(x.dtype)))


def prefixes_backward(
    stats_backward: StatsBackward, nothing: Tensor, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor,
    saved: Forward, upstream: Upstream, needs: PrefixNeeds,
) -> PrefixGradients:  # fmt: skip
    spec, dtype = spec._replace(kept_rows=0), compute_dtype(x.dtype)
    dx, dy = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (x, y))
    dscale = x.new_zeros((), dtype=dtype)
    for k, dim in enumerate(of.dims):
        own = Forward(saved.pos[k], saved.row[k], saved.col[k], nothing)
        arriving = Upstream(*(None if g is None else g[k].contiguous() for g in upstream))
        sides = _prefix(x, of, k, of.row), _prefix(y, of, k, of.col)
        found = stats_backward(spec, *sides, own, arriving, Needs(needs.x, needs.y, needs.scale, False))
        for total, gradient, unit, factors in ((dx, found.x, sides[0], of.row), (dy, found.y, sides[1], of.col)):
            if gradient is None:
                continue
            gradient, unit = gradient.to(dtype), unit.to(dtype)
            if factors is not None:
                along = (gradient * unit).sum(dim=1, keepdim=True)
                gradient = factors[k, :, None] * (gradient - along * unit)
            total[:, :dim] += gradient
        if found.scale is not None:
            dscale += found.scale
    return PrefixGradients(
        dx.to(x.dtype) if needs.x else None, dy.to(y.dtype) if needs.y else None, dscale if needs.scale else None
    )


def merge_top_k(scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None:
    (m, n), k = scores.shape, values.shape[1]
    filled = min(first_column, k)
    columns = torch.arange(first_column, first_column + n, device=scores.device)
    scores = torch.cat((values[:, :filled], scores), dim=1)
    columns = torch.cat((indices[:, :filled], columns.expand(m, n)), dim=1)
    # Sorted by the negated score, ascending, NaN comes last. The stable sort keeps equal scores in column order.
    best = torch.sort(0 - scores, dim=1, stable=True).indices[:, :k]
    values[:, : best.shape[1]] = scores.gather(1, best)
    indices[:, : best.shape[1]] = columns.gather(1, best)


def count_ahead(scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor) -> None:
    columns = torch.arange(first_column, first_column + scores.shape[1], device=scores.device)
    counts += ahead(scores, columns, target_scores[:, None], targets[:, None]).sum(dim=1)
