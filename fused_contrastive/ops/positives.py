"""The columns of the positives, and by how much two equal similarities may differ."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.distributed.shape import LocalShape, Shape


def of_positives(values: Tensor, targets: Tensor | None, shape: Shape, m: int) -> Tensor:
    """(n, ...) of this process's columns -> (m, ...) of each row's positive, without gradient."""
    if isinstance(shape, LocalShape):
        if targets is None:
            return values[:m]
        checks.target_range(targets, len(values))
        return values[targets]
    if targets is None and shape.rows == shape.keys:
        return values[:m]
    return shape.gather(values)[shape.columns_of(targets, values.device)]


def rounding(dtype: torch.dtype, d: int) -> float:
    """By how much, times both norms, two sums of d terms of equal features may differ."""
    return float(torch.finfo(dtype).eps * (8 + 4 * d**0.5))
