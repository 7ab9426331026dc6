"""How similar a negative may be, given its positive's similarity: margins, as losses and ``rank`` have them."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.ops.own_dots import own_dots


def similarities(x: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) dot products of x (M, D) with its positives (M, D), and (M,) how far roundings may part copies of these."""
    similarity, x_norm, y_norm = (
        own_dots(a, b[:, None]).squeeze(1) for a, b in ((x, positives), (x, x), (positives, positives))
    )
    return similarity, torch.finfo(similarity.dtype).eps * (8 + 4 * x.shape[1] ** 0.5) * (x_norm * y_norm).sqrt()


def highest(positive: Tensor, rounding: Tensor, absolute: float, relative: float) -> Tensor:
    """The highest score that is not left out: positive - absolute - relative * |positive|.

    At a margin of 0 a copy of the positive is at the limit, but for the roundings of a sum of D terms, and is not left
    out. At other margins nothing is at the limit but by chance.
    """
    limit = positive - absolute - relative * positive.abs()
    return limit if absolute or relative else limit + rounding
