"""Terms that losses share, beside ``ops.cross_entropy``."""

from __future__ import annotations

from torch import Tensor

from fused_contrastive.core.spec import compute_dtype


def mean_logit(scale: float | Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(M,) mean of each row of ``scale * x @ y.T``, in closed form: ``scale * x_i . mean_j y_j``."""
    dtype = compute_dtype(x.dtype)
    return scale * (x.to(dtype) * y.to(dtype).mean(dim=0)).sum(dim=1)
