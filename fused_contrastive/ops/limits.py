"""How similar a negative may be, given its positive's similarity: margins, as losses and ``rank`` have them."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import compute_dtype

# How many elements of x are converted to the compute dtype and multiplied at a time, on a CPU and on a GPU.
ELEMENTS, GPU_ELEMENTS = 1 << 18, 1 << 24


def similarities(x: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) dot products of x (M, D) with its positives (M, D), and (M,) bounds of their rounding errors.

    Two computations of the dot product with the same vector differ by at most the bound.
    """
    elements = ELEMENTS if x.device.type == "cpu" else GPU_ELEMENTS
    if is_plain(x, positives) and x.numel() > elements:
        size = max(1, elements // x.shape[1])
        parts = [_similarities(*part) for part in zip(x.split(size), positives.split(size), strict=True)]
        similarity, norms = map(torch.cat, zip(*parts, strict=True))
    else:
        similarity, norms = _similarities(x, positives)
    return similarity, torch.finfo(similarity.dtype).eps * (8 + 4 * x.shape[1] ** 0.5) * norms


def _similarities(x: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) dot products, and (M,) products of the two norms, in the compute dtype."""
    x, positives = (t.to(compute_dtype(t.dtype)) for t in (x, positives))
    return (x * positives).sum(dim=1), x.norm(dim=1) * positives.norm(dim=1)


def highest(positive: Tensor, rounding: Tensor, absolute: float, relative: float) -> Tensor:
    """The highest score that is not left out: positive - absolute - relative * |positive|.

    At a margin of 0 a copy of the positive is at the limit, but for the roundings of a sum of D terms, and is not left
    out. At other margins nothing is at the limit but by chance.
    """
    limit = positive - absolute - relative * positive.abs()
    return limit if absolute or relative else limit + rounding
