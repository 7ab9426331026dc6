"""Checks of the arguments of the rules that decide which pairs count: ids, and other models' features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.spec import compute_dtype

MOST_IDS = 4  # of a row or column; the losses may add one for the targets (``spec.MOST_IDS``)


def ids(name: str, value: object, length: int, x: Tensor, of: str) -> Tensor:
    """Integers (length,) or (length, K), K <= 4 -> in int64; (length,) for K = 1."""

    def expected() -> str:
        return f"an integer tensor of shape ({length},), or ({length}, K) with K from 1 to {MOST_IDS}, {of}"

    value = checks.integers(name, value, expected)
    if value.dim() not in (1, 2) or value.shape[0] != length or not 1 <= _ids_each(value) <= MOST_IDS:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected()}")
    checks.same_device(name, value, "x", x)
    return value.squeeze(1) if value.dim() == 2 and value.shape[1] == 1 else value


def _ids_each(value: Tensor) -> int:
    return value.shape[1] if value.dim() == 2 else 1


def same_ids(row_name: str, row_ids: Tensor, col_name: str, col_ids: Tensor) -> None:
    """Raises unless rows and columns have equally many ids."""
    rows, cols = _ids_each(row_ids), _ids_each(col_ids)
    if rows != cols:
        raise ValueError(f"{col_name}: got {cols} ids a column, expected {rows}, as many as {row_name} has for a row")


def guide(value: object, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A guide's features, one tensor for each of the loss's ``features``; see ``features_like``."""
    if not isinstance(value, (tuple, list)) or len(value) != len(features):
        got = f"{len(value)} tensors" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"guide: got {got}, expected a tuple of {len(features)}, one for each set of features")
    return features_like([f"guide[{k}]" for k in range(len(value))], value, features)


def features_like(names: Sequence[str], values: Sequence[object], features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Another model's features, in the shapes of ``features`` but with one width G -> in the compute dtype of
    ``features``, without gradient."""
    found: list[Tensor] = []
    for name, t, ours in zip(names, values, features, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor of shape {_with_width(ours)}")
        if t.dtype not in checks.FEATURE_DTYPES:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected float32, float64, bfloat16 or float16")
        if t.layout != torch.strided:
            raise TypeError(f"{name}: got layout {t.layout}, expected a dense tensor")
        width = found[0].shape[-1] if found else t.shape[-1] if t.dim() else 0
        if t.dim() != ours.dim() or t.shape[:-1] != ours.shape[:-1] or t.shape[-1] != width or width == 0:
            shape = tuple(t.shape)
            raise ValueError(f"{name}: got shape {shape}, expected {_with_width(ours)}, the same G >= 1 for all")
        checks.same_device(name, t, "the features", ours)
        found.append(t.detach().to(compute_dtype(ours.dtype)))
    return tuple(found)


def _with_width(features: Tensor) -> str:  # called only to raise: in a trace, formatting a size makes it a constant
    return f"({', '.join(map(str, features.shape[:-1]))}, G)"
