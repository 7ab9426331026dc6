"""L2 normalisation, as losses that take an encoder's output begin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.ops import dispatch


def normalized(*views: Tensor, backend: str = "auto") -> Tensor:
    """``F.normalize(torch.cat(views), dim=-1)``, by way of float32: in float16 a row of zeros would become NaN.

    The gradient that the result is given must be for it alone: the backward writes to it. Where something traces, it is
    the plain formula, for the compiler to fuse.
    """
    if is_plain(*views) and views[0].dtype in (torch.float32, torch.float64):
        backend = dispatch.resolve(backend, views[0].device, views[0].dtype)
        return dispatch.BACKENDS[backend].normalize(*views)
    x = torch.cat(views) if len(views) > 1 else views[0]
    return F.normalize(x.to(compute_dtype(x.dtype)), dim=-1).to(x.dtype)
