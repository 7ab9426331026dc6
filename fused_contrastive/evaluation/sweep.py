"""The loss and the weights of the negatives at several temperatures, in one pass; ``negatives`` has the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.evaluation.negatives import Negatives, chunks
from fused_contrastive.ops.ranking import plain

HARDEST = (1, 10, 100)


@dataclass(frozen=True)
class Row:
    """One temperature, as means over all rows and both directions."""

    temperature: float
    loss: float  # CLIP's
    effective: float  # number of negatives, 1 to N - 1
    shares: Tensor  # (min(100, N - 1),) weight of the hardest 1, 2, ... negatives

    def share(self, k: int) -> float:
        return self.shares[min(k, len(self.shares)) - 1].item()


def sweep(x: Tensor, y: Tensor, temperatures: Sequence[float]) -> list[Row]:
    """The same (N, D) pairs at each temperature, smallest first. Features are normalised here, as CLIP does.

    It makes one pass over chunks of rows, 2 matrix products in all. See ``diagnose`` for the quantities and for what
    is raised.
    """
    checks.feature_pair("x", x, "y", y)
    checks.same_rows("x", x, "y", y)
    if len(x) < 2:
        raise ValueError(f"x: got {len(x)} row, expected at least 2, so that there are negatives")
    for temperature in temperatures:
        checks.positive("temperatures", temperature)
    ordered = sorted(set(temperatures))
    with plain(x):
        x, y = (F.normalize(features.to(compute_dtype(features.dtype)), dim=1) for features in (x, y))
        scales = [1 / temperature for temperature in ordered]
        of_x, of_y = (Negatives(len(x), scales, max(HARDEST), x.device) for _ in range(2))
        for rows in chunks(len(x)):
            of_x.add(x[rows] @ y.T, rows.start)
            of_y.add(y[rows] @ x.T, rows.start)
    return [
        Row(temperature, (a.loss + b.loss) / 2, (a.effective + b.effective) / 2, (a.shares + b.shares) / 2)
        for temperature, a, b in zip(ordered, of_x.means(), of_y.means(), strict=True)
    ]
