"""The last step of most losses, from statistics to the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import BackendName
from fused_contrastive.ops import dispatch


def cross_entropy(
    pos: Tensor,
    *normalisers: Tensor,
    dtype: torch.dtype,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    backend: BackendName = "auto",
) -> Tensor:
    """-log softmax at the positives, the mean over the given directions.

    ``-log(e^pos / (e^pos + e^normaliser)) = softplus(normaliser - pos)``: the normalisers leave the positive out, so
    nothing cancels when it dominates. ``decoupled`` leaves it out of the denominator: ``normaliser - pos`` (Yeh et al.
    2022, "Decoupled Contrastive Learning").

    pos and each normaliser are (M,); the result is a scalar of ``dtype``, or (M,) with ``reduction="none"``. Where
    something traces, it is the plain formula, for the compiler to fuse.
    """
    name = "reference"
    if is_plain(pos):  # a backend that was named takes these vectors whatever the features' dtype
        name = dispatch.resolve(backend, pos.device, dtype if backend == "auto" else torch.float32)
    return dispatch.BACKENDS[name].cross_entropy(pos, normalisers, decoupled, reduction, dtype)
