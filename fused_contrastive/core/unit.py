"""L2 normalisation of rows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_NORM = 1e-12  # as in F.normalize


def unit_rows(x: Tensor) -> Tensor:
    """``F.normalize(x, dim=-1)``, but the gradient of a row of zeros is zeros and not 1e12 times that of the result.

    Such a row has no direction: it stays zeros, as there. Shorter rows than 1e-12 are divided by 1e-12, as there.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit: Tensor = x / norm.clamp_min(LEAST_NORM).masked_fill(norm == 0, torch.inf)
    return unit
