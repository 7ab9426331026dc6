"""The papers' formulas on materialised matrices, in whatever dtype they are given.

In float64 they are the oracle that every backend is measured against; in the features' own dtype they are eager
PyTorch, whose error the budget allows. ``logits`` is how x, y and a scale become scale * x @ y.T: ``oracle.exact``, or
a form of ``oracle.LOGITS``. Nothing here is shared with the losses under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.testing.oracle import Logits, logsumexp
from fused_contrastive.testing.textbook_related import (
    corrected_loss,
    reduced,
    related,
    several_positives,
    too_similar,
    unit,
)


def contrastive_stats(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    targets: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    row_limit: Tensor | None = None,
    col_limit: Tensor | None = None,
    exclude_self: bool = False,
    directions: Sequence[str] = ("row", "col"),
) -> dict[str, Tensor]:
    """Returns "pos" (M,), and "row" (M,) and "col" (N,) if they are among the ``directions``."""
    m, n = len(x), len(y)
    s = similarity = logits(x, y, scale)
    if col_bias is not None:
        s = s + col_bias
    i = torch.arange(m, device=x.device)
    t = i if targets is None else targets
    excluded = torch.zeros(m, n, dtype=torch.bool, device=x.device)
    excluded[i, t] = True
    if row_ids is not None and col_ids is not None:
        excluded |= related(row_ids, col_ids)
    if exclude_self:
        excluded |= i[:, None] == torch.arange(n, device=x.device)
    negatives = s.masked_fill(excluded, -torch.inf)
    of_rows = negatives if row_limit is None else negatives.masked_fill(similarity > row_limit[:, None], -torch.inf)
    of_cols = negatives if col_limit is None else negatives.masked_fill(similarity > col_limit, -torch.inf)
    denominators = {"row": logsumexp(of_rows, 1), "col": logsumexp(of_cols, 0)}
    return {"pos": s[i, t], **{name: denominators[name] for name in directions}}


def clip(
    logits: Logits,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal_ids: str = "exclude",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """CLIP's loss as training code writes it; for DCL, the diagonal is masked out of the denominator."""
    if normalize:
        image, text = unit(image), unit(text)
    s = logits(image, text, logit_scale)
    (m, n), one = s.shape, torch.ones_like(logit_scale)
    t = torch.arange(m, device=s.device)
    equal = torch.zeros_like(s, dtype=torch.bool)
    if row_ids is not None and col_ids is not None:
        equal = related(row_ids, col_ids)
    if equal_ids != "exclude":
        positives = equal | torch.eye(m, dtype=torch.bool, device=s.device) if m == n else equal
        directions = [several_positives(a, p, equal_ids, decoupled) for a, p in ((s, positives), (s.T, positives.T))]
        if reduction == "none":
            return torch.stack([losses for losses, _ in directions]).mean(dim=0)
        return torch.stack([reduced(*each, weight, reduction) for each in directions]).mean()
    excluded = [equal, equal.T]
    if debias is not None or hardness:
        both = [
            corrected_loss(each, t, drop, decoupled, logit_scale, debias, hardness)
            for each, drop in zip((s, s.T), excluded, strict=True)
        ]
        return _weighted((both[0] + both[1]) / 2, weight, reduction)
    if absolute_margin is not None or relative_margin is not None:
        similarity = logits(image, text, one) if guide is None else (guide[0] @ guide[1].T).to(s.dtype)
        excluded = [
            each | too_similar(own, t, absolute_margin, relative_margin)
            for each, own in zip(excluded, (similarity, similarity.T), strict=True)
        ]
    rows, cols = (
        softmax_loss(each, t, drop, decoupled, label_smoothing)
        if decoupled or drop.any()
        else F.cross_entropy(each, t, label_smoothing=label_smoothing, reduction="none")
        for each, drop in zip((s, s.T), excluded, strict=True)
    )
    return _weighted((rows + cols) / 2, weight, reduction)


def clip_stable(
    logits: Logits,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """The same without cancellation where the positives dominate."""
    if options:
        return clip(
            logits, image, text, logit_scale, decoupled=decoupled, label_smoothing=label_smoothing,
            reduction=reduction, **options,
        )  # fmt: skip
    pos, *denominators = contrastive_stats(logits, image, text, logit_scale).values()
    zero = pos.new_zeros(())
    rows, cols = (d - pos if decoupled else torch.logaddexp(d - pos, zero) for d in denominators)
    loss = (rows + cols) / 2
    if label_smoothing:
        s = logits(image, text, logit_scale)
        loss = loss + label_smoothing * (pos - (s.mean(dim=0) + s.mean(dim=1)) / 2)
    return reduce(loss, reduction)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def softmax_loss(logits: Tensor, targets: Tensor, excluded: Tensor, decoupled: bool, smoothing: float) -> Tensor:
    """(M,) -log softmax at the targets; ``excluded`` (M, N) never counts."""
    i = torch.arange(len(logits), device=logits.device)
    positive = F.one_hot(targets, logits.shape[1]).bool()
    drop = (excluded & ~positive) | (positive if decoupled else torch.zeros_like(positive))
    goal = logits[i, targets]
    if smoothing:
        goal = (1 - smoothing) * goal + smoothing * logits.mean(dim=1)
    return logsumexp(logits.masked_fill(drop, -torch.inf), 1) - goal


def _weighted(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is None:
        return reduce(losses, reduction)
    weight = weight.to(losses.dtype)
    return (losses * weight).sum() / weight.sum() if reduction == "mean" else reduce(losses * weight, reduction)


def info_nce(
    logits: Logits,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    *,
    negatives: Tensor | None = None,
    col_bias: Tensor | None = None,
    targets: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal_ids: str = "exclude",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    symmetric: bool = False,
    decoupled: bool = False,
    margin: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    if normalize:
        query, key = unit(query), unit(key)
        negatives = None if negatives is None else unit(negatives)
    m, n = len(query), len(key)
    t = torch.arange(m, device=query.device) if targets is None else targets
    shared = negatives is not None and negatives.dim() == 2
    columns = torch.cat((key, negatives)) if shared and negatives is not None else key
    s = logits(query, columns, logit_scale)
    if col_bias is not None:
        s = s + col_bias.to(s.dtype)
    excluded = torch.zeros_like(s, dtype=torch.bool)
    if row_ids is not None and col_ids is not None:
        excluded = related(row_ids, col_ids)
    own = None
    if negatives is not None and not shared:
        own = (query[:, None] * negatives).sum(dim=2)
        drop_own = torch.zeros_like(own, dtype=torch.bool)
    if equal_ids != "exclude":
        positives = excluded
        if targets is not None or m == n:
            positives = positives | F.one_hot(t, s.shape[1]).bool()
        scaled = None if own is None else logit_scale * own
        directions = [several_positives(s, positives, equal_ids, decoupled, margin, scaled)]
        if symmetric:
            directions.append(several_positives(s[:, :n].T, positives[:, :n].T, equal_ids, decoupled, margin))
        if reduction == "none":
            return torch.stack([losses for losses, _ in directions]).mean(dim=0)
        return torch.stack([reduced(*each, weight, reduction) for each in directions]).mean()
    of_columns = excluded[:, :n].T
    if absolute_margin is not None or relative_margin is not None:
        similarity = logits(query, columns, torch.ones_like(logit_scale))
        if guide is not None:
            similarity = (guide[0] @ guide[1].T).to(s.dtype)
        excluded = excluded | too_similar(similarity, t, absolute_margin, relative_margin)
        if symmetric:
            of_columns = of_columns | too_similar(similarity[:, :n].T, t, absolute_margin, relative_margin)
        if own is not None:
            together = torch.cat((similarity, own), dim=1)
            drop_own = too_similar(together, t, absolute_margin, relative_margin)[:, s.shape[1] :]
    of_each = margin[:, None] if isinstance(margin, Tensor) and margin.dim() == 1 else margin
    s = s - of_each * F.one_hot(t, s.shape[1]).to(s.dtype)
    both = s[:, :n].T
    if own is not None:
        s = torch.cat((s, logit_scale * own), dim=1)
        excluded = torch.cat((excluded, drop_own), dim=1)
    if debias is not None or hardness:
        losses = corrected_loss(s, t, excluded, decoupled, logit_scale, debias, hardness)
        if symmetric:
            of_keys = corrected_loss(both, t, of_columns, decoupled, logit_scale, debias, hardness)
            losses = (losses + of_keys) / 2
        return _weighted(losses, weight, reduction)
    losses = softmax_loss(s, t, excluded, decoupled, label_smoothing)
    if symmetric:
        losses = (losses + softmax_loss(both, t, of_columns, decoupled, label_smoothing)) / 2
    return _weighted(losses, weight, reduction)


def nt_xent(
    logits: Logits,
    *views: Tensor,
    temperature: Tensor,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    decoupled: bool = False,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    z = torch.cat([unit(v) if normalize else v for v in views])
    s = logits(z, z, 1 / temperature)
    sample = torch.arange(len(views[0]), device=z.device).repeat(len(views))
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    same = sample[:, None] == sample
    if debias is not None or hardness:
        n = len(views[0])
        targets = torch.arange(2 * n, device=z.device).roll(n)
        debias = debias.repeat(2) if isinstance(debias, Tensor) and debias.dim() else debias
        return reduce(corrected_loss(s, targets, own, decoupled, 1 / temperature, debias, hardness), reduction)
    positives = same & ~own
    denominator = logsumexp(s.masked_fill(same if decoupled else own, -torch.inf), 1)
    mean = torch.where(positives, s, 0).sum(dim=1) / positives.sum(dim=1)
    return reduce(denominator - mean, reduction)


def supcon(
    logits: Logits,
    features: Tensor,
    temperature: Tensor,
    *,
    labels: Tensor,
    variant: str = "out",
    no_positive: str = "skip",
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    if features.dim() == 3:
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    z = unit(features) if normalize else features
    s = logits(z, z, 1 / temperature)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels[:, None] == labels) & ~own
    count = positives.sum(dim=1)
    log_prob = s - logsumexp(s.masked_fill(own, -torch.inf), 1)[:, None]
    if variant == "out":
        losses = -torch.where(positives, log_prob, 0).sum(dim=1) / count.clamp_min(1)
    else:
        losses = count.clamp_min(1).to(s.dtype).log() - logsumexp(log_prob.masked_fill(~positives, -torch.inf), 1)
    losses = torch.where(count > 0, losses, torch.nan if no_positive == "nan" else 0)
    if reduction == "mean" and no_positive == "skip":
        return losses.sum() / (count > 0).sum().clamp_min(1)
    return reduce(losses, reduction)


def siglip(
    logits: Logits,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positive_weight: str = "one",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    s = logits(image, text, logit_scale)
    if logit_bias is not None:
        s = s + logit_bias
    m, n = s.shape
    positive = torch.eye(m, n, dtype=torch.bool, device=s.device) & (m == n)
    if row_ids is not None and col_ids is not None:
        positive = positive | related(row_ids, col_ids)
    z = torch.where(positive, 1.0, -1.0).to(s.dtype)
    each = -F.logsigmoid(z * s)
    if positive_weight == "mean":
        each = torch.where(positive, each / positive.sum(dim=1, keepdim=True).clamp_min(1), each)
    return _weighted(each.sum(dim=1), weight, reduction)
