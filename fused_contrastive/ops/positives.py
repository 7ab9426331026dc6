"""The columns of the positives."""

from __future__ import annotations

from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.spec import StatsSpec
from fused_contrastive.distributed.shape import LocalShape, Shape


def of_positives(values: Tensor, spec: StatsSpec, shape: Shape, m: int) -> Tensor:
    """(n, ...) of this process's columns -> (m, ...) of each row's positive, without gradient."""
    targets = spec.targets
    if isinstance(shape, LocalShape):
        if targets is None and spec.row_lengths is spec.col_lengths:  # no groups, or square groups
            return values[:m]
        if targets is not None:
            checks.target_range(targets, spec.columns_of_rows(len(values)))
        return values[spec.positive_columns(m)]
    if targets is None and shape.rows == shape.keys:
        return values[:m]
    return shape.gather(values)[shape.columns_of(targets, values.device)]
