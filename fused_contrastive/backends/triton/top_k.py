"""Ranking on a GPU with torch's own operators. Nothing here waits for the GPU.

``torch.topk`` does not say which of equal values it keeps. So a score and its column become one int64 key, whose order
is that of ``core/order.py`` and which no other column shares: the score's bits above, the column's complement below.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMN_BITS = 32
COLUMN_MASK = (1 << COLUMN_BITS) - 1
NAN_BITS = -(1 << 31)  # the smallest integer, below -inf; as bits of a score: NaN again


def _swap(bits: Tensor) -> Tensor:
    """float32 bits as int32 -> integers in the order of the floats, and back: negative floats' bits run downwards."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _keys(scores: Tensor, columns: Tensor) -> Tensor:
    """float32 scores and their int64 columns, below 2^32 -> int64 keys, larger is better."""
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
