"""The error budget: our error against eager's, both against float64, in the maximum norm.

    |ours - fp64| <= 2 |eager - fp64| + 8 eps(dtype) (max |fp64| + the largest term before cancellation)

Eager PyTorch sets the measure: where it is far off (scale 1000 in bfloat16), we may be off twice as far; where it is
exact, we may be off by a few roundings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def allowed(eager_error: float, dtype: torch.dtype, largest: float, roundings: int = 8) -> float:
    """The error that is allowed where eager's is ``eager_error`` and a rounding is eps(dtype) * ``largest``."""
    return 2 * eager_error + roundings * torch.finfo(dtype).eps * largest


@dataclass(frozen=True)
class Deviation:
    """One value or gradient against the formula in float64.

    Attributes:
        quantity: its name, "loss" or "dx" for example.
        error: our largest error.
        eager_error: the largest error of the same formula in plain PyTorch, in our dtype.
        allowed: the largest error that the budget allows us.
    """

    quantity: str
    error: float
    eager_error: float
    allowed: float

    @property
    def share(self) -> float:
        """The part of the budget used; above 1 is a breach. A NaN error counts as infinite, and so does an infinite
        one unless eager's is infinite too, for example beyond float16's range."""
        if not math.isfinite(self.error):
            return 0.0 if self.error == self.eager_error else math.inf
        return self.error / self.allowed if self.allowed else float(self.error > 0)


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b|; equal infinities agree, NaN stays NaN."""
    return torch.where(a == b, 0, (a - b).abs()).max().item()


def largest_finite(t: Tensor) -> float:
    """max |t| over its finite elements; 0 where there are none."""
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
