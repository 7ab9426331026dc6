"""L2 normalisation, as losses that take an encoder's output begin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.ops import dispatch
from fused_contrastive.ops.autograd import is_plain


def normalized(x: Tensor, backend: str = "auto") -> Tensor:
    """``F.normalize`` along the last dimension, by way of float32: in float16 a row of zeros would become NaN.

    Where something traces, it is the plain formula, for the compiler to fuse.
    """
    if is_plain(x) and x.dtype in (torch.float32, torch.float64):
        return dispatch.BACKENDS[dispatch.resolve(backend, x.device, x.dtype)].normalize(x)
    return F.normalize(x.to(compute_dtype(x.dtype)), dim=-1).to(x.dtype)
