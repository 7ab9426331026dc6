"""The order of candidates: higher scores first, equal scores by the smaller index, NaN last (by index among itself).

It is total, so that every backend, block size and number of threads gives the same ranking of the same scores.
"""

from __future__ import annotations

from torch import Tensor


def ahead(scores: Tensor, columns: Tensor, score: Tensor, column: Tensor) -> Tensor:
    """Whether candidates stand ahead of one, all broadcast against each other -> bool; none is ahead of itself."""
    tie = (scores == score) | (scores.isnan() & score.isnan())
    return (scores > score) | (score.isnan() & ~scores.isnan()) | (tie & (columns < column))
