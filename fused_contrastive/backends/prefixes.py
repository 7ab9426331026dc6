"""Prefixes one after another, by a backend's own statistics: what a backend does that has nothing better."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds
from fused_contrastive.core.spec import Forward, Needs, StatsSpec, Upstream, compute_dtype

if TYPE_CHECKING:
    from fused_contrastive.backends.contract import Backend


def _prefix(t: Tensor, of: Prefixes, k: int, factors: Tensor | None) -> Tensor:
    """Prefix k of the features t, in their dtype, normalised if there are factors."""
    prefix = t[:, : of.dims[k]]
    return prefix if factors is None else (prefix.to(factors.dtype) * factors[k, :, None]).to(t.dtype)


def one_by_one(backend: Backend, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
    spec = spec._replace(kept_rows=0)
    found = [
        backend.stats_forward(spec, _prefix(x, of, k, of.row), _prefix(y, of, k, of.col)) for k in range(len(of.dims))
    ]
    pos, row, col = (torch.stack([each[place] for each in found]) for place in range(3))
    return Forward(pos, row, col, x.new_empty(0, 0, dtype=compute_dtype(x.dtype)))


def backward_one_by_one(
    backend: Backend, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream,
    needs: PrefixNeeds,
) -> PrefixGradients:  # fmt: skip
    spec, dtype = spec._replace(kept_rows=0), compute_dtype(x.dtype)
    dx, dy = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (x, y))
    dscale = x.new_zeros((), dtype=dtype)
    shape, kept_dtype = backend.kept(0, y.shape[0], x.dtype)
    nothing = x.new_empty(shape, dtype=kept_dtype)
    for k, dim in enumerate(of.dims):
        own = Forward(saved.pos[k], saved.row[k], saved.col[k], nothing)
        arriving = Upstream(*(None if g is None else g[k].contiguous() for g in upstream))
        sides = _prefix(x, of, k, of.row), _prefix(y, of, k, of.col)
        found = backend.stats_backward(spec, *sides, own, arriving, Needs(needs.x, needs.y, needs.scale, False))
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
