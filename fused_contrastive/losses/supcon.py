"""Supervised contrastive learning: positives are all features of the same label."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor, nn

from fused_contrastive.core import checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.distributed.agreement import Agreed, Group, collective
from fused_contrastive.distributed.collectives import gather_rows
from fused_contrastive.losses import terms
from fused_contrastive.ops.agree import agree
from fused_contrastive.ops.cross_entropy import cross_entropy
from fused_contrastive.ops.normalize import normalized
from fused_contrastive.ops.stats import autocast, self_stats

VARIANTS = ("out", "in")
NO_POSITIVE = ("skip", "zero", "nan")


@observed
@collective
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    variant: Literal["out", "in"] = "out",
    no_positive: Literal["skip", "zero", "nan"] = "skip",
    reduction: Reduction = "mean",
    normalize: bool = False,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor:
    """Supervised contrastive loss without the N x N similarities or masks.

    With P(i) the other features with the label of i, and A(i) all others::

        out: loss_i = -mean over p in P(i) of log(exp(z_i . z_p / T) / sum over a in A(i) of exp(z_i . z_a / T))
        in:  loss_i = -log(mean over p in P(i) of exp(z_i . z_p / T) / sum over a in A(i) of exp(z_i . z_a / T))

    (Khosla et al. 2020, "Supervised Contrastive Learning", arXiv:2004.11362, equations 2 and 3). The sum over the
    positives' logits is closed form: each label's features are summed once.

    Args:
        features: (N, D), or (N, V, D) with V views of each sample; float32, float64, bfloat16 or float16.
        labels: (N,) integers.
        temperature: divides the similarities, a positive number or a 0-d tensor, which gets a gradient; default 0.1.
        logit_scale: multiplies them, instead: 1 / temperature.
        variant: "out" or "in".
        no_positive: what becomes of features whose label nobody shares: "skip" leaves them out of the mean, "zero"
            counts them with loss 0, "nan" with NaN (as 0 / 0 in the formula).
        reduction: "mean", "sum" or "none" ((N * V,), sample by sample; 0 for skipped features).
        normalize: L2-normalise first; rows shorter than 1e-12 get a gradient of zeros.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, the loss is that of the whole batch.

    Returns:
        A scalar, or (N * V,) with ``reduction="none"``; float32 (float64 for float64 features). 0 with zero gradients
        where "skip" leaves nothing.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    features = autocast(features)
    checks.features_or_several("features", features, "N", "V", group is not None)
    count = features.shape[1] if features.dim() == 3 else 1
    labels = checks.vector("labels", labels, features.shape[0], features, of="one per sample", integer=True)
    checks.one_of("variant", variant, VARIANTS)
    checks.one_of("no_positive", no_positive, NO_POSITIVE)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.boolean("normalize", normalize)
    scale = terms.scale_of(temperature, logit_scale, 0.1, features)

    z = features.flatten(0, 1) if features.dim() == 3 else features
    z = normalized(z, backend=backend) if normalize else z
    labels = labels.repeat_interleave(count) if count > 1 else labels
    said = {"views": count, "variant": variant, "no_positive": no_positive, "reduction": reduction}
    agreed = agree(
        group, "supcon_loss", z, z, {**said, "normalize": normalize}, scale,
        memory_budget=memory_budget, backend=backend,
    )  # fmt: skip
    everyone = labels if agreed is None else gather_rows(labels, agreed.rows, agreed.group)
    known = everyone.sort().values
    codes = torch.searchsorted(known, everyone.contiguous())  # below N, the same for equal labels
    code = codes if agreed is None else codes[agreed.own_cols]
    shared = torch.zeros_like(codes).index_add_(0, codes, torch.ones_like(codes))[code] - 1  # |P(i)|
    has = shared > 0
    options = {"memory_budget": memory_budget, "backend": backend, "group": group}
    dtype = compute_dtype(z.dtype)
    if variant == "out":
        if agreed is None:
            z, positives = terms.own_logits(scale, z, functools.partial(_others_of_class, code))
        else:
            wide = z.to(dtype)
            positives = terms.pair_logit(scale, wide, _others_of_class(code, wide, codes.shape[0], agreed))
        positives = positives / shared.clamp_min(1)
        row = self_stats(z, scale, **options)  # type: ignore[arg-type]
        losses = row.masked_fill(~has, 0) - positives.masked_fill(~has, 0)
    else:
        negatives = self_stats(z, scale, ids=code, **options)  # type: ignore[arg-type]
        positives = self_stats(z, scale, ids=code, equal_ids="only", **options)  # type: ignore[arg-type]
        against = cross_entropy(
            positives.masked_fill(~has, 0), negatives.masked_fill(~has, 0), dtype=positives.dtype, reduction="none",
            backend=backend,
        )  # fmt: skip
        losses = (against + shared.clamp_min(1).to(against.dtype).log()).masked_fill(~has, 0)
    if no_positive == "nan":
        losses = losses.masked_fill(~has, torch.nan)
    if reduction == "mean" and no_positive == "skip":
        counted = has.sum() if agreed is None else agreed.sum(has.sum())
        counted = counted.clamp_min(1)
        return (losses.sum() / counted if agreed is None else agreed.reduce(losses, "mean", counted)).to(dtype)
    return terms.reduce_weighted(losses, None, reduction, agreed).to(dtype)


def _others_of_class(code: Tensor, z: Tensor, classes: int = 0, agreed: Agreed | None = None) -> Tensor:
    """(N, D) the sum of the other rows of z with the same code, which is below ``classes`` (default: N)."""
    sums = terms.class_sums(z, code, classes or z.shape[0])
    sums = sums if agreed is None else agreed.sum(sums)
    return terms.rows_at(sums, code) - z


class SupConLoss(nn.Module):
    """``supcon_loss`` as a module. It holds no parameters; options as there.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        variant: Literal["out", "in"] = "out",
        no_positive: Literal["skip", "zero", "nan"] = "skip",
        reduction: Reduction = "mean",
        normalize: bool = False,
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        terms.scale_of(temperature, None, 0.1)
        checks.one_of("variant", variant, VARIANTS)
        checks.one_of("no_positive", no_positive, NO_POSITIVE)
        terms.check_module(reduction, memory_budget, backend, normalize=normalize)
        self.temperature = temperature
        self.variant: Literal["out", "in"] = variant
        self.no_positive: Literal["skip", "zero", "nan"] = no_positive
        self.reduction: Reduction = reduction
        self.normalize = normalize
        self.memory_budget: int | Literal["auto"] = memory_budget
        self.backend = backend
        self.group = group

    def forward(self, features: Tensor, labels: Tensor, *, logit_scale: float | Tensor | None = None) -> Tensor:
        """(N, D) or (N, V, D), (N,) -> loss; a ``logit_scale`` replaces the temperature. See ``supcon_loss``."""
        return supcon_loss(
            features, labels, self.temperature if logit_scale is None else None, logit_scale=logit_scale,
            variant=self.variant, no_positive=self.no_positive,
            reduction=self.reduction, normalize=self.normalize, memory_budget=self.memory_budget,
            backend=self.backend, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, variant={self.variant!r}, no_positive={self.no_positive!r}"
