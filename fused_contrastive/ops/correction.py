"""Corrections of the sum over negatives: for positives hidden among them, and towards the hard ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.distributed.shape import Shape
from fused_contrastive.ops.problem import Problem, log_add


class Correction(NamedTuple):
    """With N negatives, their sum n, and the exponential p of the positive's logit, in each row and column::

        hardness b:  n = N sum exp((1 + b) s) / sum exp(b s)              (Robinson et al. 2021, arXiv:2010.04592)
        debias t:    n = max((n - N t p) / (1 - t), N exp(-scale))        (Chuang et al. 2020, arXiv:2007.00224)

    The second takes the result of the first.
    """

    hardness: float
    debias: Tensor | None  # () or (M,); None is no correction, without the least sum
    row_count: Tensor  # () or (M,): how many negatives a row has
    col_count: Tensor  # () or (M,): the same for the column of its positive


def statistics(
    problem: Problem, shape: Shape, correction: Correction | None, own_logits: Tensor | None, asked: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """pos (M,), row (M,) and col, corrected, of the first M columns, or of no column if only rows are asked.

    A hardness takes two passes, at (1 + hardness) times the scale and at hardness times. ``own_logits`` (M, K) are
    further negatives of each row, -inf for none.
    """
    times = (1.0,) if correction is None or not correction.hardness else (1 + correction.hardness, correction.hardness)
    spec, passes = problem.spec, []
    for factor in times:
        problem.spec = spec._replace(scale=spec.scale * factor) if factor != 1 else spec
        pos, row, col = problem.run(shape, **asked)
        if own_logits is not None:
            row = log_add(row, (own_logits.to(row.dtype) * factor).logsumexp(dim=1))
        passes.append((pos, row, col[: pos.shape[0]] if asked["want_col"] else col))
    problem.spec = spec
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
