"""Supervised contrastive learning: positives are all features of the same label."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fused_contrastive.core import checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName, RowLoss, compute_dtype
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.distributed.shape import LocalShape, Shape
from fused_contrastive.losses import terms
from fused_contrastive.ops.groups import grouped
from fused_contrastive.ops.problem import Problem, autocast
from fused_contrastive.ops.row_loss import cross_entropy, in_the_forward

VARIANTS = ("out", "in")
NO_POSITIVE = ("skip", "zero", "nan")
DEFAULT_TEMPERATURE = 0.1


@observed
@collective
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    lengths: Tensor | None = None,
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
        features: (N, D), or (N, V, D) with V views of each sample; float32, float64, bfloat16 or float16. Or
            (B, N, V, D), V >= 1: B groups, each with a loss of its own.
        labels: (N,) integers.
        temperature: divides the similarities, a positive number or a 0-d tensor, which gets a gradient; default 0.1.
        logit_scale: multiplies them, instead: 1 / temperature.
        lengths: (B,) int64, the samples of each of B groups; see ``clip_loss``. N here stands for the samples of all
            groups. Equal labels of two groups are not related. Not together with group.
        variant: "out" or "in".
        no_positive: what to do with features whose label no other has: "skip" leaves them out of the mean, "zero"
            counts them with loss 0, "nan" with NaN (as 0 / 0 in the formula).
        reduction: "mean", "sum" or "none" ((N * V,), sample by sample; 0 for skipped features).
        normalize: L2-normalise first; rows shorter than 1e-12 get a gradient of zeros.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, it is the loss of the whole batch.

    Returns:
        A scalar, or (N * V,) with ``reduction="none"``; float32 (float64 for float64 features). 0 with zero gradients
        where "skip" leaves nothing.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    call = call_of(group)
    groups, (features,) = grouped(call, lengths, {"features": autocast(features)}, dims=3)
    checks.features_or_several("features", features, "N", "V", call.spread)
    count = features.shape[1] if features.dim() == 3 else 1
    labels = checks.vector("labels", labels, features.shape[0], features, of="one per sample", integer=True)
    checks.one_of("variant", variant, VARIANTS)
    checks.one_of("no_positive", no_positive, NO_POSITIVE)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.boolean("normalize", normalize)
    scale = terms.scale_of(temperature, logit_scale, DEFAULT_TEMPERATURE, features)
    z = features.flatten(0, 1) if features.dim() == 3 else features
    labels = labels if groups is None else groups.distinct(labels)
    labels = labels.repeat_interleave(count) if count > 1 else labels
    groups = groups if groups is None else groups.times(count)
    problem = Problem(
        z, z, scale, memory_budget=memory_budget, backend=backend, normalize=normalize, groups=groups
    )  # fmt: skip
    options = {"views": count, "variant": variant, "no_positive": no_positive}
    shape = problem.agree(call, "supcon_loss", {**options, "reduction": reduction, "normalize": normalize})
    if variant == "out" and reduction != "none" and no_positive != "nan" and isinstance(shape, LocalShape):
        over_counted = reduction == "mean" and no_positive == "skip"
        each = RowLoss(labels=labels, over_counted=over_counted)
        loss = in_the_forward(problem, each, reduction == "mean", {"upper": True, "want_col": False})
        if loss is not None:
            return loss
    everyone = shape.gather(labels)
    codes = torch.searchsorted(everyone.sort().values, everyone)  # below N, the same for equal labels
    code = shape.own_cols(codes)
    shared = torch.zeros_like(codes).index_add_(0, codes, torch.ones_like(codes))[code] - 1  # |P(i)|
    has = shared > 0
    losses = (_out if variant == "out" else _in)(problem, shape, code, shared.clamp_min(1), has)
    if no_positive == "nan":
        losses = losses.masked_fill(~has, torch.nan)
    counted = shape.sum(has.sum()).clamp_min(1) if no_positive == "skip" else None
    return shape.reduce(losses, reduction, counted).to(compute_dtype(z.dtype))


def _out(problem: Problem, shape: Shape, code: Tensor, shared: Tensor, has: Tensor) -> Tensor:
    """(N,) losses of the variant "out", 0 for those without a positive."""
    problem.unit()

    def others(part: Tensor) -> Tensor:
        """(N, C) the sum of the other rows with the same code."""
        sums = shape.sum(terms.class_sums(part, code, shape.all_rows))
        return terms.rows_at(sums, code).sub_(part)

    z, positives = terms.own_logits(problem.spec.scale, problem.x, others)
    problem.x, problem.y = z, z
    _, row, _ = problem.run(shape, upper=True, want_col=False)
    return row.masked_fill(~has, 0) - (positives / shared).masked_fill(~has, 0)


def _in(problem: Problem, shape: Shape, code: Tensor, shared: Tensor, has: Tensor) -> Tensor:
    """(N,) losses of the variant "in", 0 for those without a positive."""
    problem.unit()
    problem.spec = problem.spec._replace(row_ids=code, col_ids=code)
    negatives, positives = (
        problem.run(shape, upper=True, want_col=False, equal_ids=equal)[1].masked_fill(~has, 0)
        for equal in ("exclude", "only")
    )
    losses = cross_entropy(positives, negatives, dtype=positives.dtype, reduction="none", backend=problem.backend)
    return (losses + shared.to(losses.dtype).log()).masked_fill(~has, 0)


class SupConLoss(nn.Module):
    """``supcon_loss`` as a module. It holds no parameters; its options are the function's.

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
        terms.scale_of(temperature, None, DEFAULT_TEMPERATURE)
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

    def forward(
        self, features: Tensor, labels: Tensor, *, logit_scale: float | Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(N, D) or (N, V, D), (N,) -> loss; a ``logit_scale`` replaces the temperature. See ``supcon_loss``."""
        return supcon_loss(
            features, labels, self.temperature if logit_scale is None else None, logit_scale=logit_scale,
            lengths=lengths, variant=self.variant, no_positive=self.no_positive,
            reduction=self.reduction, normalize=self.normalize, memory_budget=self.memory_budget,
            backend=self.backend, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, variant={self.variant!r}, no_positive={self.no_positive!r}"
