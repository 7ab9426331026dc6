"""InfoNCE: queries against keys, in one direction or both, with the options that retrieval training adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fused_contrastive.core import checks, group_checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.losses import corrections, hard_negatives, margins, matryoshka, related, terms
from fused_contrastive.ops.groups import grouped
from fused_contrastive.ops.own_dots import own_dots
from fused_contrastive.ops.problem import Problem, autocast, checked_bias, checked_pair_of_ids
from fused_contrastive.ops.ranks import Metrics, count_ranks, metrics_of
from fused_contrastive.ops.row_loss import row_loss

DEFAULT_TEMPERATURE = 0.07


@overload
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    lengths: Tensor | None = None,
    targets: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal_ids: related.EqualIds = "exclude",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    guide: tuple[Tensor, ...] | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    symmetric: bool = False,
    decoupled: bool = False,
    margin: float | Tensor = 0.0,
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
def info_nce_loss(*args: Any, metrics: Literal[True], **options: Any) -> tuple[Tensor, Metrics]: ...


@overload
def info_nce_loss(*args: Any, metrics: bool, **options: Any) -> Tensor | tuple[Tensor, Metrics]: ...


@observed  # type: ignore[misc]  # the other overloads leave their options to this signature
@collective
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    lengths: Tensor | None = None,
    targets: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal_ids: related.EqualIds = "exclude",
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    guide: tuple[Tensor, ...] | None = None,
    debias: float | Tensor | None = None,
    hardness: float = 0.0,
    symmetric: bool = False,
    decoupled: bool = False,
    margin: float | Tensor = 0.0,
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
    """Cross-entropy of every query's softmax over the keys, without the matrix of their similarities.

    With ``S[i, j] = scale * query_i . column_j + col_bias[j]`` over the columns, which are the keys and then the shared
    negatives, and t(i) the positive of query i::

        loss_i = -log(exp(S[i, t(i)] - margin) / (exp(S[i, t(i)] - margin) + sum over j != t(i) of exp S[i, j]))

    (van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748; MoCo's
    queue: He et al. 2020, arXiv:1911.05722). ``decoupled`` leaves the positive out of the denominator (Yeh et al. 2022,
    arXiv:2110.06848).

    Args:
        query: (M, D) float32, float64, bfloat16 or float16; or (B, M, D), B groups: see ``lengths``.
        key: (N, D), same dtype and device; or (B, N, D).
        temperature: divides the similarities, a positive number or 0-d tensor; default 0.07.
        logit_scale: multiplies them, instead of the temperature. Either of them, as a tensor, gets a gradient.
        lengths: (B,) int64, the queries of each of B groups, and the keys; see ``clip_loss``. M and N here stand for
            the numbers of all groups, and ``targets`` count the keys of the query's group. Not together with shared
            negatives, equal_ids "mean" and "sum", label_smoothing, debias, hardness, dims and group.
        targets: (M,) integers, the key of each query's positive. Default: t(i) = i, which needs M <= N.
        negatives: (K, D) more columns for every query, such as hard negatives or a queue; or (M, K, D), each query's
            own K.
        negatives_mask: (M, K) bool (or numbers 0 and 1), False where negatives (M, K, D) hold padding, for queries with
            fewer than K. Padding is ignored, whatever it holds.
        col_bias: (N,), or (N + K,) with shared negatives; added to each column's logits: minus log of the sampling
            probability corrects a sampled softmax (logQ), -inf marks an empty slot of a queue.
        row_ids, col_ids: (M,) and one per column, integers; or (M, K) and K per column, K <= 4: a pair is related if
            its ids are equal in any of the K places.
        equal_ids: related pairs are left out as false negatives ("exclude"), or are positives ("mean", "sum": see
            ``clip_loss``). If targets are given or M = N, a query's target is a positive too; otherwise queries have no
            target. Queries (and, with ``symmetric``, keys) without a positive do not count in the mean.
        absolute_margin, relative_margin: leave out negatives by their similarity to the query; see ``clip_loss``.
        guide: (M, G), (N, G) and, with negatives, (K, G) or (M, K, G) features of another model; see ``clip_loss``.
        debias, hardness: correct the sum over negatives; see ``clip_loss``. Not together with col_bias,
            label_smoothing, equal_ids "mean" and "sum", margins or guides that leave out negatives.
        symmetric: the mean with the loss of keys against queries. It takes no targets, and needs M = N; with equal_ids
            "mean" or "sum" it needs M = N only if the weight, the margin or the result has one element per query.
            Negatives are columns of the queries' direction alone.
        decoupled: the DCL form.
        margin: subtracted from the positives' logits: a number, at least 0, or a tensor () or (M,), which gets a
            gradient. SimKGC (Wang et al. 2022, arXiv:2203.02167) subtracts from the cosine: margin = scale * 0.02.
        label_smoothing: in [0, 1), as in ``F.cross_entropy``: this share of the target is spread over all columns, so
            that an empty slot makes the loss inf. Not together with ids, absolute_margin,
            relative_margin, guide, debias or hardness.
        weight: (M,) weights of the queries; the mean is over their sum, as in ``F.cross_entropy``.
        reduction: "mean", "sum" or "none" ((M,)).
        metrics: also return the ranks of the positives among the negatives; not with equal_ids "mean" or "sum".
        normalize: L2-normalise query, key and negatives first; rows shorter than 1e-12 get a gradient of zeros.
        dims, dim_weights: the weighted sum of the losses of prefixes of the features; see ``clip_loss``. Not together
            with lengths, negatives (M, K, D), col_bias, equal_ids "mean" and "sum", margins and guides that leave out
            negatives, debias, hardness, label_smoothing, metrics and group.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, it is the loss of the whole batch, whose
            columns are process 0's keys and then its shared negatives, then process 1's, and so on. ``targets`` count
            the keys of all processes, without the negatives. If every process holds the same queue, pass a different
            part of it in each.

    Returns:
        With ``metrics``, the loss and its ``Metrics``; without, the loss: a scalar, or (M,) with ``reduction="none"``;
        float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        NotImplementedError: an option that is not covered together with groups or dims.
    """
    call = call_of(group)
    groups, (query, key) = grouped(call, lengths, {"query": autocast(query), "key": autocast(key)})
    checks.feature_pair("query", query, "key", key, call.spread)
    _check_options(symmetric, decoupled, margin, label_smoothing, reduction, normalize)
    scale = terms.scale_of(temperature, logit_scale, DEFAULT_TEMPERATURE, query)
    checks.boolean("metrics", metrics)
    related.check(
        equal_ids, row_ids, absolute_margin=absolute_margin, relative_margin=relative_margin, guide=guide,
        metrics=metrics or None,
    )  # fmt: skip
    several = equal_ids != "exclude"
    if symmetric:
        if targets is not None:
            raise ValueError(
                "targets: got a tensor with symmetric=True, expected None: key i is the positive of query i"
            )
        by_query = weight is not None or reduction == "none" or (isinstance(margin, Tensor) and margin.dim() == 1)
        if not several or by_query:
            checks.same_rows("query", query, "key", key)
    elif targets is None and not several and not call.spread and query.shape[0] > key.shape[0]:
        raise ValueError(f"targets: got None for {query.shape[0]} queries and {key.shape[0]} keys, expected targets")
    if isinstance(margin, Tensor) and margin.dim() == 1:
        margin = checks.vector("margin", margin, query.shape[0], query, of="one per query", integer=False)
    elif isinstance(margin, Tensor):
        margin = checks.scalar_beside("margin", margin, query)
    if weight is not None:
        weight = checks.vector("weight", weight, query.shape[0], query, of="one per query", integer=False)
    if negatives is not None:
        negatives = hard_negatives.checked(autocast(negatives), query, call.spread)
    shared = negatives is not None and negatives.dim() == 2
    features = (query, key) if negatives is None else (query, key, negatives)
    if groups is not None:
        group_checks.refuse(
            negatives=negatives if shared else None, equal_ids=equal_ids if several else None,
            label_smoothing=label_smoothing, debias=debias, hardness=hardness,
        )  # fmt: skip
    nested = matryoshka.checked(dims, dim_weights, query, "query")
    if nested is not None:
        matryoshka.refuse(
            group=call.spread, lengths=lengths, query=groups, negatives=None if shared else negatives,
            col_bias=col_bias, equal_ids=equal_ids if several else None, absolute_margin=absolute_margin,
            relative_margin=relative_margin, guide=guide, debias=debias, hardness=hardness or None,
            label_smoothing=label_smoothing or None, metrics=metrics,
        )  # fmt: skip
    limits = margins.checked(absolute_margin, relative_margin, guide, scale, features, normalize)
    terms.check_smoothing(label_smoothing, row_ids, limits is not None)
    corrected = corrections.check(
        debias, hardness, equal_ids=equal_ids if several else None, absolute_margin=absolute_margin,
        relative_margin=relative_margin, guide=guide, label_smoothing=label_smoothing or None, col_bias=col_bias,
    )  # fmt: skip
    of_debias = "a tensor" if isinstance(debias, Tensor) else debias
    debias = corrections.checked_debias(debias, query)
    if negatives_mask is not None:
        if negatives is None or shared:
            raise ValueError(
                "negatives_mask: got a tensor without negatives of shape (M, K, D), expected None: col_bias of -inf "
                "marks shared columns as empty"
            )
        negatives_mask = checks.mask("negatives_mask", negatives_mask, negatives.shape[:2], "negatives", negatives)
    columns = torch.cat((key, negatives)) if negatives is not None and shared else key
    if targets is not None:
        targets = checks.vector("targets", targets, query.shape[0], query, of="one key per query", integer=True)
        if shared and not call.spread:
            targets = hard_negatives.keys_alone(targets, key.shape[0], columns.shape[0])
    row_ids, col_ids = checked_pair_of_ids(row_ids, col_ids, query, columns)
    problem = Problem(
        query, columns, scale, targets=targets, col_bias=checked_bias(col_bias, columns), row_ids=row_ids,
        col_ids=col_ids, memory_budget=memory_budget, backend=backend, normalize=normalize, groups=groups,
    )  # fmt: skip
    if several:
        related.prepare(problem)
    of_margin = "a tensor" if isinstance(margin, Tensor) else margin
    options = {
        "symmetric": symmetric, "decoupled": decoupled, "margin": of_margin, "label_smoothing": label_smoothing,
        "reduction": reduction, "normalize": normalize, "weight": weight is not None,
        "negatives": None if negatives is None else negatives.dim(), "equal_ids": equal_ids,
        "absolute_margin": absolute_margin, "relative_margin": relative_margin, "guide": margins.width(limits),
        "debias": of_debias, "hardness": hardness, "metrics": metrics,
    }  # fmt: skip
    shape = problem.agree(call, "info_nce_loss", options, negatives, weight, negatives_mask, margin, keys=key.shape[0])
    if nested is not None:
        return matryoshka.loss(
            problem, shape, reduction, nested, both=symmetric, decoupled=decoupled, margin=margin, weight=weight
        )
    own_logits = smoothing = None
    if negatives is not None and not shared:
        problem.unit()
        own_logits = problem.spec.scale * own_dots(problem.x, negatives, negatives_mask, normalize)
    if label_smoothing:
        problem.unit()
        mean = terms.mean_over_columns(problem, shape, own_logits, negatives_mask, margin)
        if symmetric:
            mean = (mean + terms.mean_over_queries(problem, shape, key.shape[0], margin)) / 2
        smoothing = label_smoothing, mean
    margins.limit(problem, shape, limits, both=symmetric)
    if own_logits is not None and limits is not None:
        own_logits = own_logits.masked_fill(margins.above(problem, limits, own_logits), -torch.inf)
    if own_logits is not None and negatives_mask is not None:
        own_logits = own_logits.masked_fill(~negatives_mask, -torch.inf)
    if equal_ids != "exclude":
        return related.several_positives(
            problem, shape, reduction, equal_ids, keys=key.shape[0], both=symmetric, decoupled=decoupled, margin=margin,
            weight=weight, own_logits=own_logits,
        )  # fmt: skip
    correction = None
    if corrected:
        own: int | Tensor = 0 if own_logits is None else own_logits.shape[1]
        own = own if negatives_mask is None else negatives_mask.sum(dim=1)
        correction = corrections.correction(
            problem, shape, debias, hardness, keys=key.shape[0], both=symmetric, own=own
        )  # fmt: skip
    if metrics:
        count_ranks(problem, shape, both=symmetric)
    loss = row_loss(
        problem, shape, reduction, decoupled=decoupled, margin=margin, weight=weight, own_logits=own_logits,
        smoothing=smoothing, correction=correction, want_col=symmetric,
    )  # fmt: skip
    return (loss, metrics_of(problem, own_logits)) if metrics else loss


def _check_options(
    symmetric: bool, decoupled: bool, margin: float | Tensor, label_smoothing: float, reduction: str, normalize: bool
) -> None:
    for name, value in (("symmetric", symmetric), ("decoupled", decoupled), ("normalize", normalize)):
        checks.boolean(name, value)
    if not isinstance(margin, Tensor):
        checks.non_negative("margin", margin)
    checks.unit_interval("label_smoothing", label_smoothing)
    checks.one_of("reduction", reduction, REDUCTIONS)


class InfoNCELoss(nn.Module):
    """``info_nce_loss`` as a module. It holds no parameters; its options are the function's.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        *,
        temperature: float | None = None,
        equal_ids: related.EqualIds = "exclude",
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        debias: float | Tensor | None = None,
        hardness: float = 0.0,
        symmetric: bool = False,
        decoupled: bool = False,
        margin: float | Tensor = 0.0,
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
        terms.scale_of(temperature, None, DEFAULT_TEMPERATURE)
        _check_options(symmetric, decoupled, margin, label_smoothing, reduction, normalize)
        corrections.check_module(equal_ids, absolute_margin, relative_margin, debias, hardness, label_smoothing)
        matryoshka.check_module(
            dims, dim_weights, equal_ids=None if equal_ids == "exclude" else equal_ids, absolute_margin=absolute_margin,
            relative_margin=relative_margin, debias=debias, hardness=hardness or None,
            label_smoothing=label_smoothing or None,
        )  # fmt: skip
        self.debias = debias
        self.hardness = hardness
        terms.check_module(reduction, memory_budget, backend)
        self.temperature = temperature
        self.equal_ids: related.EqualIds = equal_ids
        self.absolute_margin = absolute_margin
        self.relative_margin = relative_margin
        self.symmetric = symmetric
        self.decoupled = decoupled
        self.margin = margin
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self.normalize = normalize
        self.dims, self.dim_weights = dims, dim_weights
        self.memory_budget: int | Literal["auto"] = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        logit_scale: float | Tensor | None = None,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
        negatives: Tensor | None = None,
        negatives_mask: Tensor | None = None,
        col_bias: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        guide: tuple[Tensor, ...] | None = None,
        weight: Tensor | None = None,
        metrics: bool = False,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """(M, D), (N, D) -> loss; a ``logit_scale`` given here replaces the temperature. See ``info_nce_loss``."""
        return info_nce_loss(
            query, key, temperature=self.temperature if logit_scale is None else None, logit_scale=logit_scale,
            lengths=lengths, targets=targets, negatives=negatives, negatives_mask=negatives_mask, col_bias=col_bias,
            row_ids=row_ids, col_ids=col_ids, equal_ids=self.equal_ids, absolute_margin=self.absolute_margin,
            relative_margin=self.relative_margin, guide=guide, debias=self.debias, hardness=self.hardness,
            symmetric=self.symmetric, decoupled=self.decoupled, margin=self.margin,
            label_smoothing=self.label_smoothing, weight=weight, reduction=self.reduction, normalize=self.normalize,
            dims=self.dims, dim_weights=self.dim_weights, memory_budget=self.memory_budget, backend=self.backend,
            group=self.group, metrics=metrics,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, equal_ids={self.equal_ids!r}, absolute_margin={self.absolute_margin}, "
            f"relative_margin={self.relative_margin}, debias={self.debias}, hardness={self.hardness}, "
            f"symmetric={self.symmetric}, decoupled={self.decoupled}, "
            f"margin={self.margin}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
            f"{matryoshka.shown(self.dims, self.dim_weights)}"
        )
