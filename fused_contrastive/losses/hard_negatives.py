"""Negatives that ``info_nce_loss`` is given: shared by all queries, or of each query's own."""

from __future__ import annotations

from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain


def keys_alone(targets: Tensor, keys: int, columns: int) -> Tensor:
    """Checks that targets are keys: the operator would also take a shared negative for one."""
    if is_plain(targets):
        checks.target_range(targets, keys)
        return targets
    return targets.masked_fill(targets >= keys, columns)  # the operator's check, which sees the values, refuses these


def checked(negatives: object, query: Tensor, empty: bool) -> Tensor:
    m, d = query.shape

    def expected() -> str:  # called only to raise: in a trace, formatting a size makes it a constant
        return f"a tensor of shape (K, {d}) or ({m}, K, {d})"

    if not isinstance(negatives, Tensor):
        raise TypeError(f"negatives: got {type(negatives).__name__}, expected {expected()}")
    if negatives.dtype != query.dtype:
        raise TypeError(f"negatives: got dtype {negatives.dtype}, expected {query.dtype}, the dtype of query")
    shape = negatives.shape
    right = negatives.dim() in (2, 3) and shape[-1] == d and (negatives.dim() == 2 or shape[0] == m)
    if not right or 0 in shape[1 if empty else 0 :]:
        raise ValueError(f"negatives: got shape {tuple(shape)}, expected {expected()}")
    checks.same_device("negatives", negatives, "query", query)
    return negatives
