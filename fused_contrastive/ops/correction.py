"""Corrections of the sum over negatives: for positives hidden among them, and for weights on hard negatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core.spec import Ranks
from fused_contrastive.distributed.shape import Shape
from fused_contrastive.ops.problem import Problem, log_add
from fused_contrastive.ops.ranks import scaled


class Correction(NamedTuple):
    """Corrections of n, the sum of exp(s) over the N negatives of a row or column, whose positive has p = exp(s)::

        hardness b:  n = N sum exp((1 + b) s) / sum exp(b s)              (Robinson et al. 2021, arXiv:2010.04592)
        debias t:    n = max((n - N t p) / (1 - t), N exp(-scale))        (Chuang et al. 2020, arXiv:2007.00224)

    Debiasing is applied to the result of the hardness.
    """

    hardness: float
    debias: Tensor | None  # () or (M,); None: neither the subtraction nor the lower bound N exp(-scale)
    row_count: Tensor  # () or (M,): how many negatives a row has
    col_count: Tensor  # () or (M,): the same for the column of its positive


def statistics(
    problem: Problem, shape: Shape, correction: Correction | None, own_logits: Tensor | None, asked: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics pos (M,), row (M,) and col, after the correction if there is one.

    ``col`` is (M,), of the first M columns, or (0,) if only rows are asked for. A hardness takes two passes, at
    (1 + hardness) and at hardness times the scale. ``own_logits`` (M, K) are further negatives of each row; -inf marks
    an empty place.
    """
    times = (1.0,) if correction is None or not correction.hardness else (1 + correction.hardness, correction.hardness)
    spec, passes, ranks = problem.spec, [], None
    for factor in times:
        problem.spec = spec if factor == 1 else scaled(spec, factor)
        pos, row, col = problem.run(shape, **asked)
        ranks = ranks or problem.ranks
        if own_logits is not None:
            row = log_add(row, (own_logits.to(row.dtype) * factor).logsumexp(dim=1))
        passes.append((pos, row, col[: pos.shape[0]] if asked["want_col"] else col))
    problem.spec = spec
    if ranks is not None:
        highest = ranks.row[:, 1] / times[0]
        row_ranks = torch.stack((ranks.row[:, 0], highest), dim=1)
        problem.ranks = Ranks(ranks.pos / times[0], row_ranks, ranks.col)
    pos, row, col = passes[0]
    if correction is None:
        return pos, row, col
    pos = pos / times[0] if correction.hardness else pos
    counts = (correction.row_count, correction.col_count)
    normalisers = []
    for k, count in enumerate(counts if asked["want_col"] else counts[:1], start=1):
        log_count = count.to(pos.dtype).log()
        normaliser = passes[0][k]
        if correction.hardness:
            empty = normaliser == -torch.inf
            hard, easy = (each[k].masked_fill(empty, 0) for each in passes)
            normaliser = (hard - easy + log_count).masked_fill(empty, -torch.inf)
        if correction.debias is not None:
            normaliser = _debiased(normaliser, pos, log_count, correction.debias.to(pos.dtype), spec.scale)
        normalisers.append(normaliser)
    return pos, normalisers[0], normalisers[1] if asked["want_col"] else col


def _debiased(normaliser: Tensor, pos: Tensor, log_count: Tensor, share: Tensor, scale: Tensor) -> Tensor:
    """log max((exp(normaliser) - N share exp(pos)) / (1 - share), N exp(-scale))."""
    hidden = pos + log_count + share.log() - normaliser  # log of the share of the sum that is taken away
    least = log_count - scale.to(pos.dtype)
    some = (hidden < 0) & (normaliser > -torch.inf)
    left = normaliser + torch.log1p(-torch.where(some, hidden, -1.0).exp()) - torch.log1p(-share)
    return torch.where(some & (left > least), left, least)
