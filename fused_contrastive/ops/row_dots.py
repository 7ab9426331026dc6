"""Dot products of features with partners made of the same features, a few columns at a time.

Positives in closed form are such products: the partner of a feature is its other view, or the sum of its class. Written
as ``(z * partners(z)).sum(dim=1)``, they would hold several more copies of the features until the backward. Each column
of the features can be computed by itself, so no more than a few columns are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import compute_dtype

RowMap = Callable[[Tensor], Tensor]  # (N, C) -> (N, C), a new tensor: linear, and the same for every column

ELEMENTS = 1 << 18  # how many elements of the features one step takes
LEAST_COLUMNS = 8
GPU_TIMES = 2  # on a GPU, where a step is several launches, it takes this many times as many columns


def row_dots(z: Tensor, partners: RowMap, transposed: RowMap | None = None) -> tuple[Tensor, Tensor]:
    """z, and (N,) ``z_i . partners(z)_i`` in the compute dtype.

    Use the returned z once only: the backward adds to its gradient in place.

    Args:
        z: (N, D) features.
        partners: a linear map of rows, A.
        transposed: A.T. Default: A, for an A that is symmetric.
    """
    if not is_plain(z):
        wide = z.to(compute_dtype(z.dtype))
        return z, (wide * partners(wide)).sum(dim=1)
    return _RowDots.apply(z, partners, transposed or partners)  # type: ignore[no-any-return, no-untyped-call]


class _RowDots(torch.autograd.Function):
    """``dz = g * A z + A.T (g * z)``; with ``create_graph=True``, autograd records these operations."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, partners: RowMap, transposed: RowMap) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z)
        ctx.maps = partners, transposed
        dots = z.new_zeros(z.shape[0], dtype=compute_dtype(z.dtype))
        for columns in _columns(z):
            part = z[:, columns].to(dots.dtype)
            dots += (part * partners(part)).sum(dim=1)
        return z, dots

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        if g is None:
            return dz, None, None
        (z,) = ctx.saved_tensors
        partners, transposed = ctx.maps
        if dz is None:
            dz = torch.zeros_like(z)
        elif torch.is_grad_enabled():
            dz = dz.clone()
        g = g.unsqueeze(1)
        for columns in _columns(z):
            part = z[:, columns].to(g.dtype)
            gained = transposed(g * part)  # a new tensor, which may be written to
            dz[:, columns] += gained.addcmul_(g, partners(part))
        return dz, None, None


def _columns(z: Tensor) -> Iterator[slice]:
    n, d = z.shape
    size = max(LEAST_COLUMNS, ELEMENTS // max(n, 1)) * (1 if z.device.type == "cpu" else GPU_TIMES)
    return (slice(first, first + size) for first in range(0, d, size))
