"""SigLIP: every pair is a logistic regression of its own."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor, nn

from fused_contrastive.core import checks, group_checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.losses import related, terms
from fused_contrastive.ops.groups import grouped
from fused_contrastive.ops.problem import Problem, autocast, checked_pair_of_ids, scalar_tensor
from fused_contrastive.ops.ranks import Metrics, count_ranks, metrics_of
from fused_contrastive.ops.row_loss import row_loss


@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    lengths: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positive_weight: Literal["one", "mean"] = "one",
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    metrics: Literal[False] = False,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor: ...


@overload
def siglip_loss(*args: Any, metrics: Literal[True], **options: Any) -> tuple[Tensor, Metrics]: ...


@overload
def siglip_loss(*args: Any, metrics: bool, **options: Any) -> Tensor | tuple[Tensor, Metrics]: ...


@observed  # type: ignore[misc]  # the other overloads leave their options to this signature
@collective
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    lengths: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positive_weight: Literal["one", "mean"] = "one",
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    metrics: bool = False,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor | tuple[Tensor, Metrics]:
    """The sigmoid loss for language-image pre-training, without the N x N matrix.

    With ``S[i, j] = logit_scale * image_i . text_j + logit_bias`` and z = 1 for positives, -1 for all other pairs::

        loss_i = sum over j of log(1 + exp(-z[i, j] S[i, j]))

    (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343). Positives are the pairs i = j
    and, where ids are given, those with ``row_ids[i] == col_ids[j]``; if M != N, only the latter.

    Args:
        image_features: (N, D) float32, float64, bfloat16 or float16; normalise them first. Or (B, N, D): B groups.
        text_features: (N, D) or (B, N, D), same dtype and device.
        logit_scale: multiplies the similarities (already exponentiated); a number or a 0-d tensor, with a gradient.
        logit_bias: added to all logits, a number or a 0-d tensor, with a gradient; the paper starts at -10.
        temperature: divides the similarities, instead: 1 / logit_scale.
        lengths: (B,) int64, the rows of each of B groups; see ``clip_loss``. Gradients of logit_bias are summed over
            the groups as well. Not together with positive_weight="mean" and group.
        row_ids, col_ids: (N,) integers of the images and of the texts, or (N, K) with K <= 4; pairs with equal ids, in
            any of the K places, are positives too. With ids there may be M images and N texts, M != N.
        positive_weight: each positive counts once ("one"), or an image's k positives count 1 / k each ("mean").
        weight: (N,) weights of the images; the mean is over their sum.
        reduction: "mean" over the images, as in the paper, "sum" or "none" ((N,)).
        metrics: also return the ranks of the positives among the negatives, which the same pass counts.
        memory_budget, backend, group: see ``contrastive_stats``. The loss has one direction only, so a step costs 3
            products (4 on a GPU that keeps nothing). Over a group, it is the loss of the whole batch.

    Returns:
        With ``metrics``, the loss and its ``Metrics``; without, the loss: a scalar, or (N,) with ``reduction="none"``;
        float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    call = call_of(group)
    features = {"image_features": autocast(image_features), "text_features": autocast(text_features)}
    groups, (image_features, text_features) = grouped(call, lengths, features)
    checks.feature_pair("image_features", image_features, "text_features", text_features, call.spread)
    checks.one_of("positive_weight", positive_weight, ("one", "mean"))
    if row_ids is None:
        checks.same_rows("image_features", image_features, "text_features", text_features)
    if weight is not None:
        weight = checks.vector(
            "weight", weight, image_features.shape[0], image_features, of="one per image", integer=False
        )
    logit_scale = terms.scale_of(temperature, logit_scale, None, image_features)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.boolean("metrics", metrics)
    bias = None
    if logit_bias is not None:
        logit_bias = checks.scalar_beside("logit_bias", logit_bias, image_features)
        bias = scalar_tensor(logit_bias, image_features)
    row_ids, col_ids = checked_pair_of_ids(row_ids, col_ids, image_features, text_features)
    problem = Problem(
        image_features, text_features, logit_scale, col_bias=bias, row_ids=row_ids, col_ids=col_ids,
        memory_budget=memory_budget, backend=backend, groups=groups,
    )  # fmt: skip
    if groups is not None:
        group_checks.refuse(positive_weight=None if positive_weight == "one" else positive_weight)
    weigh = positive_weight == "mean" and row_ids is not None
    if weigh or image_features.shape[0] != text_features.shape[0] or (call.spread and row_ids is not None):
        if metrics:
            raise ValueError(
                "metrics: got True with images that have several positives, with M != N, positive_weight='mean' or ids "
                "over a group, expected False"
            )
        related.prepare(problem)
    options = {"reduction": reduction, "positive_weight": positive_weight, "weight": weight is not None}
    options["metrics"] = metrics
    shape = problem.agree(call, "siglip_loss", options, weight)
    if not problem.spec.paired:
        related.relate_targets(problem, shape, text_features.shape[0])
    if weigh:
        return related.weighted_positives(problem, shape, reduction, weight)
    if metrics:
        count_ranks(problem, shape, both=False)
    loss = row_loss(problem, shape, reduction, weight=weight, equal_ids="negate", statistic="softplus")
    return (loss, metrics_of(problem)) if metrics else loss


class SigLipLoss(nn.Module):
    """``siglip_loss`` as a module. It holds no parameters: the model owns scale and bias.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        *,
        positive_weight: Literal["one", "mean"] = "one",
        reduction: Reduction = "mean",
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.one_of("positive_weight", positive_weight, ("one", "mean"))
        self.positive_weight: Literal["one", "mean"] = positive_weight
        terms.check_module(reduction, memory_budget, backend)
        self.reduction: Reduction = reduction
        self.memory_budget: int | Literal["auto"] = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        lengths: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        weight: Tensor | None = None,
        metrics: bool = False,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """(N, D), (N, D), scalar, scalar -> loss; see ``siglip_loss``."""
        return siglip_loss(
            image_features, text_features, logit_scale, logit_bias, temperature=temperature, lengths=lengths,
            row_ids=row_ids, col_ids=col_ids, positive_weight=self.positive_weight, weight=weight,
            reduction=self.reduction, memory_budget=self.memory_budget, backend=self.backend,
            group=self.group, metrics=metrics,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"positive_weight={self.positive_weight!r}, reduction={self.reduction!r}, "
            f"memory_budget={self.memory_budget!r}, backend={self.backend!r}"
        )
