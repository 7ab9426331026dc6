"""The symmetric image-text contrastive loss of CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor, nn

from fused_contrastive.core import checks, group_checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.losses import corrections, margins, matryoshka, related, terms
from fused_contrastive.ops.groups import grouped
from fused_contrastive.ops.problem import Problem, autocast, checked_pair_of_ids
from fused_contrastive.ops.ranks import Metrics, count_ranks, metrics_of
from fused_contrastive.ops.row_loss import row_loss


@overload
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    lengths: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal_ids: related.EqualIds = "exclude",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    metrics: Literal[False] = False,
    normalize: bool = False,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor: ...


@overload
def clip_loss(*args: Any, metrics: Literal[True], **options: Any) -> tuple[Tensor, Metrics]: ...


@overload
def clip_loss(*args: Any, metrics: bool, **options: Any) -> Tensor | tuple[Tensor, Metrics]: ...


@observed  # type: ignore[misc]  # the other overloads leave their options to this signature
@collective
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    lengths: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal_ids: related.EqualIds = "exclude",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    metrics: bool = False,
    normalize: bool = False,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor | tuple[Tensor, Metrics]:
    """The CLIP loss, without the N x N matrix.

    Same value and gradients as ::

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020).
    With ``decoupled=True`` the positive is left out of both denominators (Yeh et al. 2022, "Decoupled Contrastive
    Learning", arXiv:2110.06848); with a single pair that denominator is empty and the loss -inf.

    Pairs with equal ids are related. ``equal_ids`` says what becomes of them, in both directions: they are left out as
    false negatives ("exclude"); or they are positives. The loss of an image or a text with the positives P is then the
    mean over p in P of -log softmax(p) ("mean": UniCL, Yang et al. 2022, arXiv:2204.03610), or -log of the sum over p
    in P of softmax(p) ("sum": MIL-NCE, Miech et al. 2020, arXiv:1912.06430).

    Args:
        image_features: (N, D) float32, float64, bfloat16 or float16; normalise them first as CLIP does. Or (B, N, D):
            B groups, each with a loss of its own rows against its own columns alone; see ``lengths``.
        text_features: (N, D) or (B, N, D), same dtype and device; row i is the caption of image i.
        logit_scale: multiplies the similarities (CLIP's learned temperature, already exponentiated); a number or a
            0-d tensor, which gets a gradient.
        temperature: divides them, instead: 1 / logit_scale.
        lengths: (B,) int64, at least 0, the rows of each of B groups, whose features (N, D) follow each other. With
            groups, here or by features (B, N, D), the reduction is over the rows of all groups, N here stands for their
            number, and equal ids of two groups are not related. Gradients of logit_scale are summed over the groups.
            Not together with equal_ids "mean" and "sum", label_smoothing, debias, hardness, dims and group.
            Lengths on a GPU are copied to the host, which waits for them.
        row_ids, col_ids: (N,) integers of the images and of the texts, or (N, K) with K <= 4: a pair is related if its
            ids are equal in any of the K places.
        equal_ids: "exclude", "mean" or "sum". The last two also take (M, D) images with (N, D) texts, if there is no
            weight and the reduction is not "none"; the positives are then the related pairs alone. With M = N, text i
            is one of image i's positives. Images and texts without a positive do not count in the mean.
        absolute_margin: leaves out negatives with a similarity (without scale) above the positive's minus this; -0.1
            leaves out those more than 0.1 above it (Qwen3-Embedding, Zhang et al. 2025, arXiv:2506.05176). At a margin
            of 0, similarities within rounding above the limit count as below it.
        relative_margin: the same with this share of the positive's absolute value in place of absolute_margin: 0.05
            leaves out negatives above 95 % of a similarity > 0 (NV-Retriever, Moreira et al. 2024, arXiv:2407.15831).
        guide: (M, G) and (N, G) features of another model, without gradient, whose similarities decide in place of
            ours what a margin leaves out (GISTEmbed, Solatorio 2024, arXiv:2402.16829). Default margin: 0.
        debias: the share of the negatives that are in truth positives, in [0, 1), a number, () or (N,). Their estimated
            part is subtracted from the sum over negatives, which stays at least N exp(-logit_scale) for N negatives,
            its lowest value for unit vectors (Chuang et al. 2020, "Debiased Contrastive Learning", arXiv:2007.00224).
        hardness: from 0 to 1000; weights each negative by exp(hardness * logit), divided by the mean weight. Above 0 it
            takes a second pass (Robinson et al. 2021, arXiv:2010.04592).
        decoupled: the DCL form.
        label_smoothing: in [0, 1), as in ``F.cross_entropy``: this share of the target is spread over all N. Not
            together with ids, margins, a guide, debias or hardness.
        weight: (N,) weights of the pairs; the mean is over their sum, as in ``F.cross_entropy``.
        reduction: "mean", "sum" (over the N pairs) or "none" ((N,), the mean of a pair's two directions).
        metrics: also return the ranks of the positives among the negatives; not with equal_ids "mean" or "sum".
        normalize: L2-normalise first, the guide's features too; rows shorter than 1e-12 get a gradient of zeros.
        dims: increasing numbers from 1 to D, such as (64, 128, 256, 512). The loss is the weighted sum of the losses of
            the first 64, 128, ... columns, each prefix normalised by itself with ``normalize``; one of norm below
            1e-12 counts as zeros (Kusupati et al. 2022, "Matryoshka Representation Learning", arXiv:2205.13147). Not
            together with lengths, equal_ids "mean" and "sum", margins, a guide, debias, hardness, label_smoothing,
            metrics and group.
        dim_weights: one finite number for each of dims; default: 1.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, it is the loss of the whole batch.

    Returns:
        With ``metrics``, the loss and its ``Metrics``; without, the loss: a scalar, or (N,) with ``reduction="none"``;
        float32 (float64 for float64 features), under autocast too.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        NotImplementedError: an option that is not covered together with groups or dims.
    """
    call = call_of(group)
    features = {"image_features": autocast(image_features), "text_features": autocast(text_features)}
    groups, (image_features, text_features) = grouped(call, lengths, features)
    checks.feature_pair("image_features", image_features, "text_features", text_features, call.spread)
    checks.boolean("metrics", metrics)
    related.check(
        equal_ids, row_ids, absolute_margin=absolute_margin, relative_margin=relative_margin, guide=guide,
        metrics=metrics or None,
    )  # fmt: skip
    if equal_ids == "exclude" or weight is not None or reduction == "none":
        checks.same_rows("image_features", image_features, "text_features", text_features)
    logit_scale = terms.scale_of(temperature, logit_scale, None, image_features)
    checks.boolean("decoupled", decoupled)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.unit_interval("label_smoothing", label_smoothing)
    checks.boolean("normalize", normalize)
    nested = matryoshka.checked(dims, dim_weights, image_features, "image_features")
    if nested is not None:
        matryoshka.refuse(
            group=call.spread, lengths=lengths, image_features=groups,
            equal_ids=None if equal_ids == "exclude" else equal_ids, absolute_margin=absolute_margin,
            relative_margin=relative_margin, guide=guide, debias=debias, hardness=hardness or None,
            label_smoothing=label_smoothing or None, metrics=metrics,
        )  # fmt: skip
    limits = margins.checked(
        absolute_margin, relative_margin, guide, logit_scale, (image_features, text_features), normalize
    )  # fmt: skip
    terms.check_smoothing(label_smoothing, row_ids, limits is not None)
    corrected = corrections.check(
        debias, hardness, equal_ids=None if equal_ids == "exclude" else equal_ids, absolute_margin=absolute_margin,
        relative_margin=relative_margin, guide=guide, label_smoothing=label_smoothing or None,
    )  # fmt: skip
    if groups is not None:
        several = None if equal_ids == "exclude" else equal_ids
        group_checks.refuse(equal_ids=several, label_smoothing=label_smoothing, debias=debias, hardness=hardness)
    of_debias = "a tensor" if isinstance(debias, Tensor) else debias
    debias = corrections.checked_debias(debias, image_features)
    if weight is not None:
        weight = checks.vector(
            "weight", weight, image_features.shape[0], image_features, of="one per pair", integer=False
        )
    row_ids, col_ids = checked_pair_of_ids(row_ids, col_ids, image_features, text_features)
    problem = Problem(
        image_features, text_features, logit_scale, row_ids=row_ids, col_ids=col_ids, memory_budget=memory_budget,
        backend=backend, normalize=normalize, groups=groups,
    )  # fmt: skip
    if equal_ids != "exclude":
        related.prepare(problem)
    options = {
        "decoupled": decoupled, "label_smoothing": label_smoothing, "reduction": reduction, "normalize": normalize,
        "equal_ids": equal_ids, "absolute_margin": absolute_margin,
        "relative_margin": relative_margin, "weight": weight is not None, "metrics": metrics,
        "guide": margins.width(limits), "debias": of_debias, "hardness": hardness,
    }  # fmt: skip
    shape = problem.agree(call, "clip_loss", options, weight)
    if nested is not None:
        return matryoshka.loss(problem, shape, reduction, nested, both=True, decoupled=decoupled, weight=weight)
    if equal_ids != "exclude":
        return related.several_positives(
            problem,
            shape,
            reduction,
            equal_ids,
            keys=text_features.shape[0],
            both=True,
            decoupled=decoupled,
            weight=weight,
        )
    smoothing = None
    if label_smoothing:
        problem.unit()
        of_images = terms.mean_logit(problem.spec.scale, problem.x, problem.y, shape)
        of_texts = terms.mean_logit(problem.spec.scale, problem.y, problem.x, shape)
        smoothing = label_smoothing, (of_images + of_texts) / 2
    margins.limit(problem, shape, limits, both=True)
    correction = None
    if corrected:
        keys = text_features.shape[0]
        correction = corrections.correction(problem, shape, debias, hardness, keys=keys, both=True)
    if metrics:
        count_ranks(problem, shape, both=True)
    loss = row_loss(
        problem, shape, reduction, decoupled=decoupled, weight=weight, smoothing=smoothing, correction=correction,
        want_col=True,
    )  # fmt: skip
    return (loss, metrics_of(problem)) if metrics else loss


class ClipLoss(nn.Module):
    """``clip_loss`` as a module. It holds no parameters: the model owns the logit scale.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        *,
        equal_ids: related.EqualIds = "exclude",
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        debias: float | Tensor | None = None,
        hardness: float = 0.0,
        decoupled: bool = False,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = False,
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        terms.check_module(reduction, memory_budget, backend, decoupled=decoupled, normalize=normalize)
        checks.unit_interval("label_smoothing", label_smoothing)
        corrections.check_module(equal_ids, absolute_margin, relative_margin, debias, hardness, label_smoothing)
        matryoshka.check_module(
            dims, dim_weights, equal_ids=None if equal_ids == "exclude" else equal_ids, absolute_margin=absolute_margin,
            relative_margin=relative_margin, debias=debias, hardness=hardness or None,
            label_smoothing=label_smoothing or None,
        )  # fmt: skip
        self.debias = debias
        self.hardness = hardness
        self.equal_ids: related.EqualIds = equal_ids
        self.absolute_margin = absolute_margin
        self.relative_margin = relative_margin
        self.normalize = normalize
        self.dims, self.dim_weights = dims, dim_weights
        self.decoupled = decoupled
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.memory_budget = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        lengths: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        guide: tuple[Tensor, Tensor] | None = None,
        weight: Tensor | None = None,
        metrics: bool = False,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """(N, D), (N, D), scalar -> loss; see ``clip_loss``."""
        return clip_loss(
            image_features, text_features, logit_scale, temperature=temperature, lengths=lengths, row_ids=row_ids,
            col_ids=col_ids, equal_ids=self.equal_ids, absolute_margin=self.absolute_margin,
            relative_margin=self.relative_margin, guide=guide, debias=self.debias, hardness=self.hardness,
            decoupled=self.decoupled, label_smoothing=self.label_smoothing, weight=weight, reduction=self.reduction,
            normalize=self.normalize, dims=self.dims, dim_weights=self.dim_weights, memory_budget=self.memory_budget,
            backend=self.backend, group=self.group, metrics=metrics,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"equal_ids={self.equal_ids!r}, absolute_margin={self.absolute_margin}, "
            f"relative_margin={self.relative_margin}, debias={self.debias}, hardness={self.hardness}, "
            f"decoupled={self.decoupled}, "
            f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}, normalize={self.normalize}, "
            f"memory_budget={self.memory_budget!r}, backend={self.backend!r}"
            f"{matryoshka.shown(self.dims, self.dim_weights)}"
        )
