"""How similar a negative may be, given its positive's similarity: margins, as losses and ``rank`` have them."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.ops.schema import without_autocast

ELEMENTS = 1 << 18  # how many elements of the features are multiplied at a time


def similarities(x: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) dot products of x (M, D) with its positives (M, D), and (M,) how far roundings may part copies of these."""
    (m, d), dtype = x.shape, compute_dtype(x.dtype)
    size = max(1, ELEMENTS // max(d, 1) if is_plain(x, positives) else m)
    with without_autocast(x):
        found = [_products(a.to(dtype), b.to(dtype)) for a, b in zip(x.split(size), positives.split(size), strict=True)]
    similarity, x_square, y_square = torch.cat(found, dim=1)
    return similarity, torch.finfo(dtype).eps * (8 + 4 * d**0.5) * (x_square * y_square).sqrt()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(3, M) of the rows of a with those of b, and of each with themselves."""
    return torch.stack([torch.linalg.vecdot(*pair) for pair in ((a, b), (a, a), (b, b))])


def highest(positive: Tensor, rounding: Tensor, absolute: float, relative: float) -> Tensor:
    """The highest score that is not left out: positive - absolute - relative * |positive|.

    At a margin of 0 a copy of the positive is at the limit, but for the roundings of a sum of D terms, and is not left
    out. At other margins nothing is at the limit but by chance.
    """
    limit = positive - absolute - relative * positive.abs()
    return limit if absolute or relative else limit + rounding
