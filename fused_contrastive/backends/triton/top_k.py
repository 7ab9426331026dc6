"""Ranking on a GPU with torch's own operators. Nothing here waits for the GPU.

``torch.topk`` does not say which of equal values it keeps. So a score and its column are packed into
one int64 key, the score's bits above the column's complement: keys are unique, and ordered as in ``core/order.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMN_BITS = 32
COLUMN_MASK = (1 << COLUMN_BITS) - 1
NAN_BITS = -(1 << 31)  # the smallest int32, ranked below -inf; _swap makes it the bits of a NaN again


def _swap(bits: Tensor) -> Tensor:
    """Maps float32 bits to int32 in the order of the floats, and back. The bits of negative floats run downwards."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _keys(scores: Tensor, columns: Tensor) -> Tensor:
    """The int64 keys of float32 scores and their int64 columns, below 2^32. A larger key ranks first."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which equals it
    ordered = _swap(bits).masked_fill_(scores.isnan(), NAN_BITS)
    return (ordered.long() << COLUMN_BITS).bitwise_or_(COLUMN_MASK - columns)


def merge_top_k(scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None:
    n, k = scores.shape[1], values.shape[1]
    filled = min(first_column, k)
    columns = torch.arange(first_column, first_column + n, device=scores.device)
    keys = _keys(scores, columns).topk(min(k, n), dim=1).values
    if filled:
        keys = torch.cat((_keys(values[:, :filled], indices[:, :filled]), keys), dim=1)
        keys = keys.topk(min(k, keys.shape[1]), dim=1).values
    values[:, : keys.shape[1]] = _swap((keys >> COLUMN_BITS).int()).view(torch.float32)
    indices[:, : keys.shape[1]] = COLUMN_MASK - (keys & COLUMN_MASK)
