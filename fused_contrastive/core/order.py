"""The order of candidates: by falling score, equal scores by rising index; NaN scores last, also by rising index.

It is total, so that every backend, block size and number of threads gives the same ranking of the same scores.
"""

from __future__ import annotations

from torch import Tensor


def ahead(scores: Tensor, columns: Tensor, score: Tensor, column: Tensor) -> Tensor:
    """Whether (scores, columns) stand ahead of (score, column), all broadcast -> bool; none is ahead of itself."""
    tie = (scores == score) | (scores.isnan() & score.isnan())
    return (scores > score) | (score.isnan() & ~scores.isnan()) | (tie & (columns < column))
