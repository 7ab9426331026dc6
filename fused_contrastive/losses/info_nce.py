"""InfoNCE: queries against keys, in one direction or both, with whatever else retrieval training adds."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor, nn

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.observing import observed
from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.distributed.agreement import Agreed, Group, collective
from fused_contrastive.losses import terms
from fused_contrastive.ops.agree import agree
from fused_contrastive.ops.at_once import loss_at_once
from fused_contrastive.ops.cross_entropy import cross_entropy
from fused_contrastive.ops.normalize import normalized
from fused_contrastive.ops.own_dots import own_dots
from fused_contrastive.ops.stats import Problem, autocast, log_add


@observed
@collective
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    targets: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    col_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    symmetric: bool = False,
    decoupled: bool = False,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = False,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor:
    """Cross-entropy of every query's softmax over the keys, without the matrix of their similarities.

    With ``S[i, j] = scale * query_i . column_j + col_bias[j]`` over the columns, which are the keys and then the shared
    negatives, and t(i) the positive of query i::

        loss_i = -log(exp(S[i, t(i)] - margin) / (exp(S[i, t(i)] - margin) + sum over j != t(i) of exp S[i, j]))

    (van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748; MoCo's
    queue: He et al. 2020, arXiv:1911.05722). ``decoupled`` leaves the positive out of the denominator (Yeh et al. 2022,
    arXiv:2110.06848).

    Args:
        query: (M, D) float32, float64, bfloat16 or float16.
        key: (N, D), same dtype and device.
        temperature: divides the similarities, a positive number or 0-d tensor; default 0.07.
        logit_scale: multiplies them, instead of the temperature. Whichever is a tensor gets a gradient.
        targets: (M,) integers, the key of each query's positive. Default: t(i) = i, which needs M <= N.
        negatives: (K, D) more columns for every query, such as hard negatives or a queue; or (M, K, D), K for each.
        negatives_mask: (M, K) bool (or numbers 0 and 1), False where negatives (M, K, D) hold a filler, for queries
            with fewer than K. It does not count, and may be anything.
        col_bias: (N,), or (N + K,) with shared negatives; added to each column's logits: minus log of the sampling
            probability corrects a sampled softmax (logQ), -inf marks an empty slot of a queue.
        row_ids, col_ids: (M,) and one per column, integers; pairs with equal ids are excluded (false negatives).
        symmetric: the mean with the loss of keys against queries. Needs M = N and no targets; negatives are columns of
            the queries' direction alone.
        decoupled: the DCL form.
        margin: subtracted from the positives' logits, at least 0.
        label_smoothing: in [0, 1), as in ``F.cross_entropy``: this share of the target is spread over all columns, so
            that an empty slot makes the loss inf. Not together with ids.
        weight: (M,) weights of the queries; the mean is over their sum, as in ``F.cross_entropy``.
        reduction: "mean", "sum" or "none" ((M,)).
        normalize: L2-normalise query, key and negatives first; rows shorter than 1e-12 get a gradient of zeros.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, the loss is that of the whole batch: the
            columns of process 0, its keys and then its shared negatives, those of process 1, and so on. ``targets``
            count the keys of all processes, without the negatives. Of a queue that every process holds, give each a
            part.

    Returns:
        A scalar, or (M,) with ``reduction="none"``; float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    query, key = autocast(query), autocast(key)
    checks.feature_pair("query", query, "key", key, group is not None)
    _check_options(symmetric, decoupled, margin, label_smoothing, reduction, normalize)
    scale = terms.scale_of(temperature, logit_scale, 0.07, query)
    if symmetric:
        if targets is not None:
            raise ValueError(
                "targets: got a tensor with symmetric=True, expected None: key i is the positive of query i"
            )
        checks.same_rows("query", query, "key", key)
    elif targets is None and group is None and query.shape[0] > key.shape[0]:
        raise ValueError(f"targets: got None for {query.shape[0]} queries and {key.shape[0]} keys, expected targets")
    elif targets is not None and (negatives is not None or group is not None):
        # The primitive's own check would take negatives for keys.
        targets = checks.vector("targets", targets, query.shape[0], query, of="one key per query", integer=True)
        if group is None and is_plain(targets):
            checks.target_range(targets, key.shape[0])
        elif group is None and isinstance(negatives, Tensor) and negatives.dim() == 2:
            # The operator's check, which sees the values, is to refuse a shared negative, too.
            targets = targets.masked_fill(targets >= key.shape[0], key.shape[0] + negatives.shape[0])
    if label_smoothing and row_ids is not None:
        raise ValueError("label_smoothing: got it together with row_ids, expected 0: excluded pairs cannot be targets")
    if weight is not None:
        weight = checks.vector("weight", weight, query.shape[0], query, of="one per query", integer=False)
    if negatives is not None:
        negatives = _checked_negatives(autocast(negatives), query, group is not None)
    if negatives_mask is not None:
        if negatives is None or negatives.dim() == 2:
            raise ValueError(
                "negatives_mask: got a tensor without negatives of shape (M, K, D), expected None: col_bias of -inf "
                "marks shared columns as empty"
            )
        negatives_mask = checks.mask("negatives_mask", negatives_mask, negatives.shape[:2], "negatives", negatives)
    shared = negatives is None or negatives.dim() == 2
    by_rows = shared and not (symmetric or label_smoothing) and weight is None and group is None
    at_once = by_rows and reduction != "none"
    inside = at_once and normalize and query.dtype in (torch.float32, torch.float64)
    if normalize and not inside:
        query, key, negatives = _unit_features(query, key, negatives, backend)
    if at_once:
        columns = _columns(key, negatives)
        problem = Problem(query, columns, scale, targets, col_bias, row_ids, col_ids, memory_budget, backend)
        loss = loss_at_once(problem, reduction == "mean", margin=margin, decoupled=decoupled, normalize=inside)
        if loss is not None:
            return loss
    if inside:
        query, key, negatives = _unit_features(query, key, negatives, backend)
    columns, own = _columns(key, negatives), None if shared else negatives  # own: (M, K, D)
    problem = Problem(query, columns, scale, targets, col_bias, row_ids, col_ids, memory_budget, backend, group=group)
    agreed = None
    if group is not None:
        said = {
            "symmetric": symmetric, "decoupled": decoupled, "margin": margin, "label_smoothing": label_smoothing,
            "reduction": reduction, "normalize": normalize, "ids": row_ids is not None,
            "negatives": None if negatives is None else negatives.dim(), "col_bias": col_bias is not None,
            "weight": weight is not None,
        }  # fmt: skip
        agreed = agree(
            group, "info_nce_loss", query, columns, said, scale, negatives, col_bias, weight, negatives_mask,
            targets=targets, keys=key.shape[0], memory_budget=memory_budget, backend=backend,
        )  # fmt: skip
        assert agreed is not None
        problem.spec = problem.spec._replace(targets=agreed.columns_of(targets, query.device))
    pos, row, col = problem.run(cols=symmetric)
    dtype = compute_dtype(query.dtype)
    own_logits = None if own is None else scale * own_dots(query, own, negatives_mask, normalize)
    if own_logits is not None:
        left = own_logits if negatives_mask is None else own_logits.masked_fill(~negatives_mask, -torch.inf)
        row = log_add(row, left.to(row.dtype).logsumexp(dim=1))
    pos = pos - margin if margin else pos
    normalisers = (row, col[: key.shape[0]]) if symmetric else (row,)
    plain = not label_smoothing and weight is None and agreed is None
    losses = cross_entropy(
        pos, *normalisers, dtype=dtype if plain else pos.dtype, decoupled=decoupled,
        reduction=reduction if plain else "none", backend=backend,
    )  # fmt: skip
    if plain:
        return losses
    if label_smoothing:
        col_bias = problem.spec.col_bias  # in the dtype of the logits, in every process
        mean = _mean_over_columns(scale, query, columns, col_bias, own_logits, negatives_mask, margin, agreed)
        if symmetric:
            queries = query.shape[0] if agreed is None else sum(agreed.rows)
            of_keys = terms.mean_logit(scale, key, query, agreed, queries) - margin / queries
            mean = (mean + (of_keys if col_bias is None else of_keys + col_bias[: key.shape[0]])) / 2
        losses = losses + label_smoothing * (pos - mean)
    return terms.reduce_weighted(losses, weight, reduction, agreed).to(dtype)


def _unit_features(
    query: Tensor, key: Tensor, negatives: Tensor | None, backend: BackendName
) -> tuple[Tensor, Tensor, Tensor | None]:
    """L2-normalised, but for negatives (M, K, D), which ``own_dots`` normalises."""
    unit = functools.partial(normalized, backend=backend)
    return unit(query), unit(key), negatives if negatives is None or negatives.dim() == 3 else unit(negatives)


def _columns(key: Tensor, negatives: Tensor | None) -> Tensor:
    """The columns that all queries share."""
    return torch.cat((key, negatives)) if negatives is not None and negatives.dim() == 2 else key


def _mean_over_columns(
    scale: float | Tensor, query: Tensor, columns: Tensor, col_bias: Tensor | None, own_logits: Tensor | None,
    own_mask: Tensor | None, margin: float, agreed: Agreed | None,
) -> Tensor:  # fmt: skip
    """(M,) mean of each query's logits."""
    count = columns.shape[0] if agreed is None else sum(agreed.cols)
    shared = terms.mean_logit(scale, query, columns, agreed, count)
    if col_bias is not None:
        shared = shared + (col_bias.mean() if agreed is None else agreed.sum(col_bias.sum()) / count)
    total = count * shared - margin
    if own_logits is not None:
        total = total + own_logits.sum(dim=1)
        return total / (count + (own_logits.shape[1] if own_mask is None else own_mask.sum(dim=1)))
    return total / count


def _checked_negatives(negatives: object, query: Tensor, empty: bool) -> Tensor:
    m, d = query.shape

    def expected() -> str:  # only where it is raised: what formats a size makes a constant of it when traced
        return f"a tensor of shape (K, {d}) or ({m}, K, {d})"

    if not isinstance(negatives, Tensor):
        raise TypeError(f"negatives: got {type(negatives).__name__}, expected {expected()}")
    if negatives.dtype != query.dtype:
        raise TypeError(f"negatives: got dtype {negatives.dtype}, expected {query.dtype}, the dtype of query")
    shape = negatives.shape
    right = negatives.dim() in (2, 3) and shape[-1] == d and (negatives.dim() == 2 or shape[0] == m)
    if not right or 0 in shape[1 if empty else 0 :]:
        raise ValueError(f"negatives: got shape {tuple(shape)}, expected {expected()}")
    checks.same_device("negatives", negatives, "query", query)
    return negatives


def _check_options(
    symmetric: bool, decoupled: bool, margin: float, label_smoothing: float, reduction: str, normalize: bool
) -> None:
    for name, value in (("symmetric", symmetric), ("decoupled", decoupled), ("normalize", normalize)):
        checks.boolean(name, value)
    checks.non_negative("margin", margin)
    checks.unit_interval("label_smoothing", label_smoothing)
    checks.one_of("reduction", reduction, REDUCTIONS)


class InfoNCELoss(nn.Module):
    """``info_nce_loss`` as a module. It holds no parameters; options as there.

    Raises:
        TypeError, ValueError: at construction, naming the option, what came and what was expected.
    """

    def __init__(
        self,
        *,
        temperature: float | None = None,
        symmetric: bool = False,
        decoupled: bool = False,
        margin: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = False,
        memory_budget: int | Literal["auto"] = "auto",
        backend: BackendName = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        terms.scale_of(temperature, None, 0.07)
        _check_options(symmetric, decoupled, margin, label_smoothing, reduction, normalize)
        terms.check_module(reduction, memory_budget, backend)
        self.temperature = temperature
        self.symmetric = symmetric
        self.decoupled = decoupled
        self.margin = margin
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self.normalize = normalize
        self.memory_budget: int | Literal["auto"] = memory_budget
        self.backend = backend
        self.group = group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        logit_scale: float | Tensor | None = None,
        targets: Tensor | None = None,
        negatives: Tensor | None = None,
        negatives_mask: Tensor | None = None,
        col_bias: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """(M, D), (N, D) -> loss; a ``logit_scale`` given here replaces the temperature. See ``info_nce_loss``."""
        return info_nce_loss(
            query, key, temperature=self.temperature if logit_scale is None else None, logit_scale=logit_scale,
            targets=targets, negatives=negatives, negatives_mask=negatives_mask, col_bias=col_bias, row_ids=row_ids,
            col_ids=col_ids, symmetric=self.symmetric, decoupled=self.decoupled, margin=self.margin,
            label_smoothing=self.label_smoothing, weight=weight, reduction=self.reduction, normalize=self.normalize,
            memory_budget=self.memory_budget, backend=self.backend, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, symmetric={self.symmetric}, decoupled={self.decoupled}, "
            f"margin={self.margin}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        )
