"""Checks of the arguments that cut rows into groups, which are independent problems."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain


def lengths(name: str, value: object, rows: int, of: str, what: str = "rows of each group") -> Tensor:
    """(B,) int64 numbers of rows, at least 0, which sum to ``rows``. In a trace, values are checked when it runs."""
    expected = f"an int64 tensor of shape (B,), the number of {what}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    checks.local(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")
    if value.dim() != 1 or value.shape[0] == 0 or value.layout != torch.strided:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")
    if not is_plain(value):
        checks.all_true(name, value, (value >= 0) & (value.sum() == rows), f"numbers of at least 0 that sum to {of}")
        return value
    least, total = int(value.min()), int(value.sum())
    if least < 0:
        raise ValueError(f"{name}: got a length of {least}, expected lengths of at least 0")
    if total != rows:
        raise ValueError(f"{name}: got lengths that sum to {total}, expected {rows}, {of}")
    if int(value.max()) > rows:  # the sum has overflowed
        raise ValueError(f"{name}: got a length of {int(value.max())}, expected lengths that sum to {rows}, {of}")
    return value


def refuse(**options: object) -> None:
    """Raises NotImplementedError for an option that is in use, neither None nor 0: with groups it is not covered."""
    for name, value in options.items():
        if value is not None and (isinstance(value, Tensor) or value != 0):
            raise NotImplementedError(
                f"{name}: got it together with groups (lengths, or features of shape (B, N, D)), which is not covered: "
                "call the loss once for each group"
            )
