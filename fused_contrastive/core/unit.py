"""L2 normalisation of rows, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_NORM = 1e-12  # as in F.normalize


def unit_rows(x: Tensor) -> Tensor:
    """``F.normalize(x, dim=-1)``, but rows shorter than 1e-12 get a gradient of zeros, not 1e12 times the result's.

    Such rows are divided by 1e-12, as in ``F.normalize``, so a row of zeros stays zeros.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit: Tensor = torch.where(norm < LEAST_NORM, x.detach(), x) / norm.clamp_min(LEAST_NORM)
    return unit
