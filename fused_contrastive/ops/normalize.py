"""L2 normalisation, the first step of losses that take an encoder's output as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.core.unit import unit_rows
from fused_contrastive.ops import dispatch


def normalized(*views: Tensor, backend: BackendName = "auto") -> Tensor:
    """``unit_rows(torch.cat(views))``, half features in float32, since in float16 a row of zeros would become NaN.

    The backward overwrites the gradient that arrives at the result, so nothing else may hold that tensor. Where
    something traces, the plain formula is used, which a compiler can fuse.
    """
    if is_plain(*views) and views[0].dtype in (torch.float32, torch.float64):
        chosen = dispatch.resolve(backend, views[0].device, views[0].dtype)
        return dispatch.BACKENDS[chosen].normalize(*views)
    x = torch.cat(views) if len(views) > 1 else views[0]
    return unit_rows(x.to(compute_dtype(x.dtype))).to(x.dtype)
