"""The formulas of false negatives and several positives on materialised matrices, in the manner of ``textbook``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.testing.oracle import Logits, logsumexp


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1; those shorter than 1e-12 are divided by that and have no gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    of_norm_1: Tensor = torch.where(norm < 1e-12, x.detach(), x) / norm.clamp_min(1e-12)
    return of_norm_1


def related(row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """(M, N) bool: which ids (M,) and (N,), or (M, K) and (N, K) in any of the K places, are equal."""
    if row_ids.dim() == 1:
        return row_ids[:, None] == col_ids
    return (row_ids[:, None] == col_ids).any(dim=2)


def too_similar(similarity: Tensor, targets: Tensor, absolute: float | None, relative: float | None) -> Tensor:
    """(M, N) bool: whose similarity lies above the row's positive's minus a margin."""
    positive = similarity.gather(1, targets[:, None])
    limit = positive - absolute if absolute is not None else positive - (relative or 0.0) * positive.abs()
    return similarity > limit


def several_positives(
    s: Tensor, positives: Tensor, form: str, decoupled: bool = False, margin: float | Tensor = 0.0,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(M,) losses of the rows of logits s (M, N), 0 without a positive, and which rows have one.

    own: (M, K) logits of further negatives.
    """
    if isinstance(margin, Tensor) and margin.dim() == 1:
        margin = margin[:, None]
    s = s - margin * positives.to(s.dtype)
    everything = s.masked_fill(positives, -torch.inf) if decoupled else s
    if own is not None:
        everything = torch.cat((everything, own), dim=1)
    denominator = logsumexp(everything, 1)
    count = positives.sum(dim=1)
    if form == "mean":
        losses = denominator - torch.where(positives, s, 0).sum(dim=1) / count.clamp_min(1)
    else:
        numerator = logsumexp(s.masked_fill(~positives, -torch.inf), 1)
        losses = denominator - numerator.masked_fill(count == 0, 0)
    return torch.where(count > 0, losses, 0), count > 0


def distillation(
    logits: Logits, x: Tensor, y: Tensor, logit_scale: Tensor, *, teacher_x: Tensor, teacher_y: Tensor,
    teacher_scale: float, symmetric: bool = True, targets_weight: float = 0.0, weight: Tensor | None = None,
    reduction: str = "mean", normalize: bool = False,
) -> Tensor:  # fmt: skip
    teacher_x, teacher_y = teacher_x.to(x.dtype), teacher_y.to(x.dtype)
    if normalize:
        x, y, teacher_x, teacher_y = (unit(t) for t in (x, y, teacher_x, teacher_y))
    s = logits(x, y, logit_scale)
    t = (teacher_scale * teacher_x @ teacher_y.T).to(s.dtype)
    losses = []
    for ours, theirs in ((s, t), (s.T, t.T)) if symmetric else ((s, t),):
        hard = torch.eye(*ours.shape, dtype=s.dtype, device=s.device)
        target = (1 - targets_weight) * theirs.softmax(dim=1) + targets_weight * hard
        losses.append(-(target * ours.log_softmax(dim=1)).sum(dim=1))
    each = torch.stack(losses).mean(dim=0)
    return reduced(each, torch.ones_like(each), weight, reduction)


def _corrected(
    negatives: Tensor, pos: Tensor, scale: Tensor, debias: float | Tensor | None, hardness: float
) -> Tensor:  # fmt: skip
    """(M,) log of the corrected sum over negatives, from their logits (M, N), -inf where excluded."""
    count = (negatives > -torch.inf).sum(dim=1).to(negatives.dtype)
    log_sum = logsumexp(negatives, 1)
    if hardness:  # the weights are exp(hardness * s), divided by their mean
        some = negatives.masked_fill((count == 0)[:, None], 0)
        log_sum = logsumexp(some + (hardness * some).log_softmax(dim=1), 1) + count.log()
    if debias is None:
        return log_sum
    most = torch.maximum(log_sum, pos).detach()
    left = ((log_sum - most).exp() - count * debias * (pos - most).exp()) / (1 - debias)
    least = count * (-scale - most).exp()
    above = left > least
    # The gradient of log(0) is not finite, and torch.where would make it NaN even where it takes the other value.
    return torch.where(above, torch.where(above, left, 1.0).log() + most, count.log() - scale)


def corrected_loss(
    s: Tensor, targets: Tensor, excluded: Tensor, decoupled: bool, scale: Tensor, debias: float | Tensor | None,
    hardness: float,
) -> Tensor:  # fmt: skip
    """(M,) losses with corrected sums over the negatives, which are all but the targets and what is excluded."""
    positive = F.one_hot(targets, s.shape[1]).bool()
    pos = s.gather(1, targets[:, None]).squeeze(1)
    z = _corrected(s.masked_fill(excluded | positive, -torch.inf), pos, scale, debias, hardness) - pos
    return z if decoupled else torch.logaddexp(z, z.new_zeros(()))


def reduced(losses: Tensor, counts: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The mean is over those that count, weighted."""
    if reduction == "none":
        return losses if weight is None else losses * weight
    each = counts.to(losses.dtype) if weight is None else weight.to(losses.dtype) * counts
    total = (losses * each).sum()
    return total / each.sum().clamp_min(1e-30) if reduction == "mean" else total
