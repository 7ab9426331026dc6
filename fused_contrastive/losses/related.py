"""Losses with several positives: a row's positives are the columns with an id equal to one of its own, and its
target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.shape import LocalShape, Shape
from fused_contrastive.losses import margins
from fused_contrastive.ops.problem import Problem, log_add
from fused_contrastive.ops.row_loss import cross_entropy, reduced

EqualIds = Literal["exclude", "mean", "sum"]
EQUAL_IDS = ("exclude", "mean", "sum")


def check(equal_ids: str, row_ids: Tensor | None, **undefined: object) -> None:
    """Raises if ``equal_ids`` asks for several positives without ids, or with an option that is not defined for them.

    ``undefined`` are such options; one that is None is not in use.
    """
    checks.one_of("equal_ids", equal_ids, EQUAL_IDS)
    if equal_ids == "exclude":
        return
    if row_ids is None:
        raise ValueError(f"equal_ids: got {equal_ids!r} without row_ids and col_ids, expected both")
    for name, value in undefined.items():
        if value is not None:
            raise ValueError(f"{name}: got it with equal_ids={equal_ids!r}, expected None: it is not defined there")


def check_module(equal_ids: str, absolute_margin: float | None, relative_margin: float | None) -> None:
    """The checks of ``check`` and ``margins.checked`` that a module can make without ids and scale."""
    checks.one_of("equal_ids", equal_ids, EQUAL_IDS)
    margins.checked(absolute_margin, relative_margin, None, 1.0)
    for name, margin in (("absolute_margin", absolute_margin), ("relative_margin", relative_margin)):
        if margin is not None and equal_ids != "exclude":
            raise ValueError(f"{name}: got it with equal_ids={equal_ids!r}, expected None: it is not defined there")


def prepare(problem: Problem) -> None:
    """Takes the positives t(i) out of a problem whose positives come from ids. Call it before ``problem.agree``."""
    problem.spec = problem.spec._replace(paired=False)


def ids_with_targets(problem: Problem, shape: Shape, keys: int) -> tuple[Tensor, Tensor]:
    """The ids of rows and columns, with one more place that relates each row to its target, if rows have targets.

    Targets are the problem's; without these t(i) = i, if the rows are paired or if there are as many rows as keys,
    counted over all processes. A process's keys are its first ``keys`` columns.
    """
    spec = problem.spec
    row_ids, col_ids = (_in_columns(ids) for ids in (spec.row_ids, spec.col_ids))
    all_keys = keys if isinstance(shape, LocalShape) else sum(shape.keys)
    if spec.targets is None and not spec.paired and shape.all_rows != all_keys:
        return row_ids, col_ids
    if spec.targets is not None and isinstance(shape, LocalShape):  # over a group, ``agree`` has checked them
        checks.target_range(spec.targets, keys)
    of_rows = shape.columns_of(spec.targets, problem.x.device)
    first, n = shape.first_col, problem.y.shape[0]
    of_cols = torch.arange(first, first + n, device=problem.y.device)
    return torch.cat((row_ids, of_rows[:, None]), dim=1), torch.cat((col_ids, of_cols[:, None]), dim=1)


def relate_targets(problem: Problem, shape: Shape, keys: int) -> None:
    """Turns targets into ids, so that a row's target is among its positives; see ``ids_with_targets``."""
    row_ids, col_ids = ids_with_targets(problem, shape, keys)
    problem.spec = problem.spec._replace(row_ids=row_ids, col_ids=col_ids, targets=None)


def several_positives(
    problem: Problem,
    shape: Shape,
    reduction: Reduction,
    form: Literal["mean", "sum"],
    *,
    keys: int,
    both: bool,
    decoupled: bool = False,
    margin: float | Tensor = 0.0,
    weight: Tensor | None = None,
    own_logits: Tensor | None = None,
) -> Tensor:
    """The loss of the rows, or the mean of the rows' and the columns' losses. With P the positives of a row or column::

        mean: -mean over p in P of log(exp S[p] / sum over all of exp S)        (UniCL; SupCon's "out")
        sum:  -log(sum over p in P of exp S[p] / sum over all of exp S)         (MIL-NCE; SupCon's "in")

    ``decoupled`` leaves the positives out of the denominator; ``margin`` is subtracted from their logits. Rows and
    columns without a positive have loss 0 and do not count in the mean.

    Args:
        problem: one that ``prepare`` has made.
        shape: what ``problem.agree`` returned.
        reduction: "none" needs as many keys as rows with ``both``.
        keys: how many of this process's columns are keys, from the first on; the others are shared negatives.
        both: take the mean with the keys' loss.
        weight: (M,) weights of the rows and, with ``both``, of the columns.
        own_logits: (M, K) logits of further negatives of each row; -inf marks an empty place.
    """
    relate_targets(problem, shape, keys)
    dtype = compute_dtype(problem.x.dtype)
    row_ids, col_ids = problem.spec.row_ids, problem.spec.col_ids
    assert row_ids is not None
    assert col_ids is not None
    added = None
    if form == "mean":
        _, *added = problem.run(shape, want_col=both, equal_ids="add")
    apart = None
    if form == "sum" or decoupled or isinstance(margin, Tensor) or margin:
        _, *apart = problem.run(shape, want_col=both, equal_ids="apart")
    losses = []
    for k, of_rows in enumerate((True, False) if both else (True,)):
        own = own_logits if of_rows else None
        last = len(row_ids) if of_rows else keys  # negatives are columns of the rows' direction alone
        ids = (row_ids, shape.gather(col_ids)) if of_rows else (col_ids[:keys], shape.gather_rows(row_ids))
        count = related_counts(*ids)
        has = count > 0
        if added is not None:
            normaliser, positives = added[k][:last, 0], added[k][:last, 1] / count.clamp_min(1) - margin
        if apart is not None:
            negatives, related = apart[k][:last].unbind(dim=1)
            related = related - margin
            if form == "sum":
                positives = related
            normaliser = negatives if decoupled or form == "sum" else log_add(negatives, related)
        if own is not None:
            normaliser = log_add(normaliser, own.to(normaliser.dtype).logsumexp(dim=1))
        normaliser, positives = (t.masked_fill(~has, 0) for t in (normaliser, positives))
        # The normaliser of "mean" holds the positives, that of "sum" does not.
        each = cross_entropy(
            positives, normaliser, dtype=positives.dtype, decoupled=decoupled or form == "mean", reduction="none",
            backend=problem.backend,
        ).masked_fill(~has, 0)  # fmt: skip
        losses.append((each, has))
    if reduction == "none":
        together = torch.stack([each for each, _ in losses]).mean(dim=0)
        return (together if weight is None else together * weight).to(dtype)
    of_directions = []
    for each, has in losses:
        count = shape.sum(has.sum().to(each.dtype))
        if weight is not None:
            of_this = weight.to(each.dtype)
            each, total = each * of_this, shape.sum(of_this.masked_fill(~has, 0).sum())
        divisor = torch.where(count == 0, 1, count if weight is None else total)
        of_directions.append(shape.reduce(each, reduction, divisor))
    return torch.stack(of_directions).mean(dim=0).to(dtype)


def weighted_positives(problem: Problem, shape: Shape, reduction: Reduction, weight: Tensor | None) -> Tensor:
    """SigLIP's loss of the rows, with weight 1 / k for each of a row's k positives, after ``relate_targets``."""
    row_ids, col_ids = problem.spec.row_ids, problem.spec.col_ids
    assert row_ids is not None
    assert col_ids is not None
    _, row, _ = problem.run(shape, want_col=False, equal_ids="apart", statistic="softplus")
    negatives, positives = row.unbind(dim=1)
    losses = negatives + positives / related_counts(row_ids, shape.gather(col_ids)).clamp_min(1)
    return reduced(losses, shape, reduction, weight).to(compute_dtype(problem.x.dtype))


def related_counts(ids: Tensor, others: Tensor) -> Tensor:
    """(M,) how many rows of ``others`` (N, K) agree with each row of ``ids`` (M, K) in any of the K places.

    Counted by inclusion and exclusion over sets of places: two rows have equal codes for a set if and only if they
    agree in all of its places.
    """
    ids, others = _in_columns(ids), _in_columns(others)
    m, n = ids.shape[0], others.shape[0]
    total = ids.new_zeros(m)
    if n == 0:
        return total
    codes = [_codes(*place) for place in zip(ids.T.contiguous(), others.T.contiguous(), strict=True)]

    def add(first: int, one: Tensor, other: Tensor, sign: int) -> None:
        """Extends a set of places, whose codes are ``one`` and ``other``, by each place from ``first`` on, and adds
        the counts of the larger sets to the total."""
        nonlocal total
        for k in range(first, len(codes)):
            of_ids, of_others = codes[k]
            together = torch.where((one < 0) | (of_ids < 0), -1, one * n + of_ids)
            mine, theirs = _codes(together, other * n + of_others)
            total = total + sign * _occurrences(mine, theirs)
            add(k + 1, mine, theirs, -sign)

    add(0, ids.new_zeros(m), ids.new_zeros(n), 1)
    return total


def _in_columns(ids: Tensor | None) -> Tensor:
    assert ids is not None
    return ids[:, None] if ids.dim() == 1 else ids


def _codes(values: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of values and others: the position among the sorted others of the first equal one, -1 if there is none."""
    ordered = others.sort().values
    place = torch.searchsorted(ordered, values)
    found = ordered[place.clamp_max(len(others) - 1)] == values
    return torch.where(found, place, -1), torch.searchsorted(ordered, others)


def _occurrences(values: Tensor, others: Tensor) -> Tensor:
    ordered = others.sort().values
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)
