"""Dot products of rows with columns of their own, some rows at a time: hard negatives that belong to one query each.

``(x[:, None] * own).sum(dim=2)`` would hold the product, (M, K, D) in the compute dtype, until the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.core.unit import LEAST_NORM, unit_rows
from fused_contrastive.ops.schema import without_autocast

ELEMENTS = 1 << 20  # how many elements of ``own`` are held in the compute dtype at a time
GPU_ELEMENTS = 1 << 24


def own_dots(x: Tensor, own: Tensor, mask: Tensor | None = None, unit: bool = False) -> Tensor:
    """(M, K) ``x_i . own_ik`` in the compute dtype.

    Args:
        x: (M, D) features.
        own: (M, K, D), same dtype and device.
        mask: (M, K) bool, False for a column that does not count: its features may be anything, its dot product is 0
            and it passes no gradient on.
        unit: the columns are L2-normalised first.
    """
    if is_plain(x, own, mask):
        return _OwnDots.apply(x, own, mask, unit)  # type: ignore[no-any-return, no-untyped-call]
    return _formula(x, own, mask, unit)


def _formula(x: Tensor, own: Tensor, mask: Tensor | None, unit: bool) -> Tensor:
    wide = _wide(own, mask)
    return (x.to(wide.dtype)[:, None] * (unit_rows(wide) if unit else wide)).sum(dim=2)


def _wide(own: Tensor, mask: Tensor | None) -> Tensor:
    wide = own.to(compute_dtype(own.dtype))
    return wide if mask is None else wide.masked_fill(~mask[:, :, None], 0)


class _OwnDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, mask: Tensor | None, unit: bool) -> Tensor:
        dots = x.new_empty(own.shape[:2], dtype=compute_dtype(x.dtype))
        norms = torch.empty_like(dots) if unit else None
        with without_autocast(x):
            for rows in _chunks(own):
                part = _wide(own[rows], None if mask is None else mask[rows])
                dots[rows] = torch.bmm(part, x[rows].to(dots.dtype).unsqueeze(2)).squeeze(2)
                if norms is not None:
                    norms[rows] = torch.linalg.vector_norm(part, dim=2)
        if norms is not None:
            dots /= norms.clamp_min(LEAST_NORM)
        ctx.save_for_backward(x, own, mask, norms, dots if unit else None)
        return dots

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, own, mask, norms, dots = ctx.saved_tensors
        needs_x, needs_own = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True
            x, own = x.view_as(x), own.view_as(own)  # if own was computed from x, x's gradient would include own's
            leaves = [t for t, needed in ((x, needs_x), (own, needs_own)) if needed]
            found = iter(torch.autograd.grad(_formula(x, own, mask, norms is not None), leaves, g, create_graph=True))
            return next(found) if needs_x else None, next(found) if needs_own else None, None, None
        along = g if mask is None else g.masked_fill(~mask, 0)  # the gradient of own_ik is this times x_i,
        along_own, back = along, None  # with ``unit`` minus its component along own_ik
        if norms is not None:
            along, short = along / norms.clamp_min(LEAST_NORM), norms < LEAST_NORM
            along_own = along.masked_fill(short, 0)
            back = (along * dots / norms).masked_fill(short, 0).unsqueeze(2)
        dx = torch.empty_like(x) if needs_x else None
        d_own = torch.empty_like(own) if needs_own else None
        with without_autocast(x):
            for rows in _chunks(own):
                part = _wide(own[rows], None if mask is None else mask[rows])
                if dx is not None:
                    dx[rows] = torch.bmm(along[rows].unsqueeze(1), part).squeeze(1)
                if d_own is not None:
                    part_gradient = along_own[rows].unsqueeze(2) * x[rows].to(g.dtype).unsqueeze(1)
                    if back is not None:
                        part_gradient.addcmul_(back[rows], part, value=-1)
                    if mask is not None:  # x may be infinite
                        part_gradient.masked_fill_(~mask[rows].unsqueeze(2), 0)
                    d_own[rows] = part_gradient
        return dx, d_own, None, None


def _chunks(own: Tensor) -> Iterator[slice]:
    elements = ELEMENTS if own.device.type == "cpu" else GPU_ELEMENTS
    size = max(1, elements // (own.shape[1] * own.shape[2]))
    return (slice(first, first + size) for first in range(0, len(own), size))
