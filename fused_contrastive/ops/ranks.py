"""Ranks of the positives among the negatives, counted in the same pass as the statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.spec import StatsSpec, compute_dtype
from fused_contrastive.core.unit import LEAST_NORM
from fused_contrastive.distributed.shape import Shape
from fused_contrastive.ops.limits import similarities
from fused_contrastive.ops.positives import of_positives
from fused_contrastive.ops.problem import Problem


def count_ranks(problem: Problem, shape: Shape, both: bool) -> None:
    """Makes a problem with positives compare its logits with them. ``both``: those of the columns too.

    A copy of the positive may have another logit by rounding. The references are raised by a bound of the difference,
    so that ties do not count as above the positive.
    """
    if problem.x.dtype not in (torch.float32, torch.float64):
        problem.unit()  # the products are of the rounded unit vectors
    spec, m = problem.spec, problem.x.shape[0]
    with torch.no_grad():
        x, y = problem.x.detach(), problem.y.detach()
        partner = of_positives(y, spec, shape, m)
        similarity, rounding = similarities(x, partner)
        if problem.normalize:
            norms = (x.norm(dim=1) * partner.norm(dim=1)).clamp_min(LEAST_NORM)
            similarity, rounding = similarity / norms, rounding / norms
        logits = spec.scale * similarity
        if spec.col_bias is not None:
            bias = spec.col_bias.detach()
            logits = logits + (bias if bias.dim() == 0 else of_positives(bias, spec, shape, m))
        slack = spec.scale.abs() * rounding + 8 * torch.finfo(logits.dtype).eps * logits.abs()
        # An infinite norm says nothing about roundings. A positive that is inf or NaN, which is NaN in the statistics
        # too, is ranked last.
        raised = logits + slack.masked_fill(~slack.isfinite(), 0)
        reference = raised.masked_fill(~(logits < torch.inf), -torch.inf)
        of_cols = None
        if both:  # nothing is above inf, for columns without a positive; groups have none of these
            of_cols = torch.cat((reference, reference.new_full((y.shape[0] - m,), torch.inf)))
    problem.spec = spec._replace(row_reference=reference, col_reference=of_cols)


def scaled(spec: StatsSpec, factor: float) -> StatsSpec:
    """The problem with all logits multiplied by the factor; it has no bias."""
    row, col = (None if t is None else t * factor for t in (spec.row_reference, spec.col_reference))
    return spec._replace(scale=spec.scale * factor, row_reference=row, col_reference=col)


class Metrics(NamedTuple):
    """How a loss's positives rank among its negatives, by the logits of this call, without gradient.

    With ``group=``, ranks are among the negatives of all processes, for the rows and columns of this process. With
    groups of rows (``lengths``), M counts the rows of all groups, which have the order of the losses of
    ``reduction="none"``, and each rank is among the negatives of the row's own group.

    Attributes:
        row_rank: (M,) int64, how many of a row's negatives have a higher logit than its positive. Ties, up to
            rounding, do not count, and pairs that the loss leaves out do not either. A logit of NaN is above all, so
            that a positive of NaN is last.
        col_rank: the same for the column of each row's positive, (M,); None if the loss has one direction.
        positive: (M,) logits of the positives, without margins.
        hardest_negative: (M,) the highest logit of a row's negatives; -inf if it has none.
    """

    row_rank: Tensor
    col_rank: Tensor | None
    positive: Tensor
    hardest_negative: Tensor

    def top(self, k: int) -> Tensor:
        """() share of the rows, and of the columns if they have ranks, whose positive is among the first k.

        Raises:
            TypeError, ValueError: k is not an integer of at least 1.
        """
        checks.at_least_1("k", k)
        return (self._ranks() < k).to(self.positive.dtype).mean()

    @property
    def top1(self) -> Tensor:
        """() share of the rows, and of the columns if they have ranks, whose positive is first: the accuracy."""
        return self.top(1)

    @property
    def mean_rank(self) -> Tensor:
        """() mean of the ranks of rows and columns; 0 is the best."""
        return self._ranks().to(self.positive.dtype).mean()

    def summary(self) -> dict[str, float]:
        """Numbers for a logger: top-1 and top-5 accuracy, the mean rank, and the means of the positives' and
        the hardest negatives' logits. On a GPU, only this function waits for the device."""
        values = {
            "top1": self.top1, "top5": self.top(5), "mean_rank": self.mean_rank, "positive": self.positive.mean(),
            "hardest_negative": self.hardest_negative.mean(),
        }  # fmt: skip
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    def _ranks(self) -> Tensor:
        return self.row_rank if self.col_rank is None else torch.cat((self.row_rank, self.col_rank))


def metrics_of(problem: Problem, own_logits: Tensor | None = None) -> Metrics:
    """The metrics of a problem that has run after ``count_ranks``.

    ``own_logits`` (M, K) are further negatives of each row; -inf marks an empty place.
    """
    ranks, reference, dtype = problem.ranks, problem.spec.row_reference, compute_dtype(problem.x.dtype)
    assert ranks is not None
    assert reference is not None
    count, hardest = ranks.row.unbind(dim=1)
    if own_logits is not None:
        own = own_logits.detach()
        count = count + (~(own <= reference[:, None])).sum(dim=1)
        hardest = torch.maximum(hardest, own.amax(dim=1).to(hardest.dtype))
    col_rank = None if ranks.col is None else ranks.col[: len(count), 0].long()
    return Metrics(count.long(), col_rank, ranks.pos.to(dtype), hardest.to(dtype))
