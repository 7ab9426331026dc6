"""``diagnose``: whether a feature space is aligned, spread out, and trained by many negatives or by few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.core import checks, hints
from fused_contrastive.core.forks import guarded
from fused_contrastive.core.spec import compute_dtype, statistics_dtype
from fused_contrastive.evaluation.negatives import Negatives, chunks
from fused_contrastive.ops.ranking import plain


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found, as plain numbers. "x_to_y": rows of x against all of y.

    Attributes:
        alignment: mean squared distance of a pair, 0 (equal) to 4 (opposite).
        uniformity_x: 0 if all of x is one point, to about -4 if it is spread over the sphere.
        uniformity_y: likewise of y.
        top1_x_to_y: the share of rows whose own partner comes first.
        top1_y_to_x: likewise of y's rows.
        effective_negatives_x_to_y: how many negatives count, 1 to N - 1.
        effective_negatives_y_to_x: likewise of y's rows.
        hardest_share_x_to_y: the weight of the k hardest negatives, 0 to 1.
        hardest_share_y_to_x: likewise of y's rows.
        k: how many negatives count as hardest.
        effective_negatives: the mean of both directions.
        hardest_share: the mean of both directions.
    """

    alignment: float
    uniformity_x: float
    uniformity_y: float
    top1_x_to_y: float
    top1_y_to_x: float
    effective_negatives_x_to_y: float
    effective_negatives_y_to_x: float
    hardest_share_x_to_y: float
    hardest_share_y_to_x: float
    k: int

    @property
    def effective_negatives(self) -> float:
        """The mean of both directions."""
        return (self.effective_negatives_x_to_y + self.effective_negatives_y_to_x) / 2

    @property
    def hardest_share(self) -> float:
        """The mean of both directions."""
        return (self.hardest_share_x_to_y + self.hardest_share_y_to_x) / 2


@guarded
def diagnose(x: Tensor, y: Tensor, scale: float | Tensor, *, k: int = 10) -> Diagnosis:
    """Describes paired features (row i of x belongs to row i of y) and what the contrastive loss does with them.

    On normalised features, the two properties of Wang & Isola 2020 ("Understanding Contrastive Representation Learning
    through Alignment and Uniformity on the Hypersphere")::

        alignment  = mean over i of |x_i - y_i|^2
        uniformity = log of the mean over pairs i != j of exp(-2 |x_i - x_j|^2), for x and for y

    On the features as given, as the loss has them, the weights of a row's negatives in its gradient::

        w[i, j] = exp(scale x_i . y_j) / sum over l != i of exp(scale x_i . y_l)        j != i

    (the relative penalty of Wang & Liu 2021, "Understanding the Behaviour of Contrastive Loss"). Two means over the
    rows are reported: the effective number of negatives, exp(-sum_j w log w), and the share of the k hardest, which is
    the sum of the k largest weights. With a smaller temperature the hardest negative outweighs all others. If only a
    few of thousands of negatives are effective, the rest of the batch hardly trains; if nearly all N - 1 are, hard
    negatives count no more than easy ones. Wrong pairs and duplicates among the negatives also do more harm at a
    smaller temperature.

    One pass over chunks of rows, in plain torch on any device, in O(chunk x N) memory: 4 matrix products in all.

    Args:
        x: (N, D) float32, float64, bfloat16 or float16, N >= 2.
        y: (N, D), same dtype and device.
        scale: the logit scale, 1 / temperature: a number or a 0-d tensor, above 0.
        k: how many negatives count as hardest; from N - 1 on, their share is 1.

    Returns:
        Diagnosis; sums are taken in float64. NaN among the features gives NaN. Its fields are Python numbers: on a GPU
        the host waits for them, and for a scale that is a tensor.

    Warns:
        UserWarning: once a process, if the features are not normalised; also if they are and the scale is below 1,
            because then it is probably a logarithm or a temperature.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    checks.feature_pair("x", x, "y", y)
    checks.same_rows("x", x, "y", y)
    n = len(x)
    if n < 2:
        raise ValueError(f"x: got {n} row, expected at least 2, so that there are negatives")
    scale = checks.scalar("scale", scale)
    factor = scale.item() if isinstance(scale, Tensor) else scale
    checks.positive("scale", factor)
    checks.at_least_1("k", k)
    hints.warn_once(hints.hint({"x": x, "y": y}, "scale", factor))
    with plain(x):
        x, y = x.to(compute_dtype(x.dtype)), y.to(compute_dtype(x.dtype))
        unit_x, unit_y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        of_x, of_y = (Negatives(n, [factor], k, x.device) for _ in range(2))
        spread_x = spread_y = torch.zeros((), dtype=statistics_dtype(x.device), device=x.device)
        for rows in chunks(n):
            of_x.add(x[rows] @ y.T, rows.start)
            of_y.add(y[rows] @ x.T, rows.start)
            spread_x = spread_x + _spread(unit_x, rows)
            spread_y = spread_y + _spread(unit_y, rows)
        (x_to_y,), (y_to_x,) = of_x.means(), of_y.means()
        distances = (unit_x - unit_y).square().sum(dim=1, dtype=spread_x.dtype)
    return Diagnosis(
        alignment=distances.mean().item(),
        uniformity_x=(spread_x / n / (n - 1)).log().item(),
        uniformity_y=(spread_y / n / (n - 1)).log().item(),
        top1_x_to_y=of_x.accuracy(),
        top1_y_to_x=of_y.accuracy(),
        effective_negatives_x_to_y=x_to_y.effective,
        effective_negatives_y_to_x=y_to_x.effective,
        hardest_share_x_to_y=x_to_y.shares[-1].item(),
        hardest_share_y_to_x=y_to_x.shares[-1].item(),
        k=k,
    )


def _spread(unit: Tensor, rows: slice) -> Tensor:
    """The sum of exp(-2 |a_i - a_j|^2) over some rows i and all j != i."""
    exponents = uniformity_exponents(unit[rows], unit)
    exponents.diagonal(rows.start).fill_(-torch.inf)
    return exponents.exp_().sum(dtype=statistics_dtype(unit.device))


def uniformity_exponents(a: Tensor, b: Tensor) -> Tensor:
    """(R, N) -2 |a_i - b_j|^2 = 4 a_i.b_j - 2 |a_i|^2 - 2 |b_j|^2."""
    squares_a, squares_b = a.square().sum(dim=1), b.square().sum(dim=1)
    return (a @ b.T).mul_(4).sub_(2 * squares_b).sub_(2 * squares_a[:, None])
