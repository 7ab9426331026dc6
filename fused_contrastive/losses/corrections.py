"""``debias`` and ``hardness``: their checks, and how many negatives a row has."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.spec import statistics_dtype
from fused_contrastive.distributed.shape import Shape
from fused_contrastive.losses import related, terms
from fused_contrastive.ops.correction import Correction
from fused_contrastive.ops.problem import Problem

MOST_HARDNESS = 1000.0  # the difference of two passes, at hardness times the logits, loses as many of float32's digits


def check(debias: object, hardness: object, **undefined: object) -> bool:
    """Returns whether a correction is asked for. ``undefined`` are options that cannot be combined with it, mostly
    because they leave an unknown number of negatives; an option that is None is not in use."""
    if not 0 <= checks.number("hardness", hardness) <= MOST_HARDNESS:
        raise ValueError(f"hardness: got {hardness!r}, expected a number from 0 to {MOST_HARDNESS:g}")
    if isinstance(debias, Tensor):
        if not debias.is_floating_point():
            raise TypeError(f"debias: got dtype {debias.dtype}, expected a floating dtype")
        checks.all_true("debias", debias, (debias >= 0) & (debias < 1), "numbers in [0, 1)")
    elif debias is not None:
        checks.unit_interval("debias", checks.number("debias", debias))
    if debias is None and not hardness:
        return False
    for name, value in undefined.items():
        if value is not None:
            raise ValueError(f"{name}: got it together with debias or hardness, expected its default")
    return True


def check_module(
    equal_ids: str,
    absolute_margin: float | None,
    relative_margin: float | None,
    debias: object,
    hardness: object,
    label_smoothing: float,
) -> None:
    """The checks of the options that decide on negatives, which a module can make without ids and scale."""
    related.check_module(equal_ids, absolute_margin, relative_margin)
    terms.check_smoothing(label_smoothing, None, absolute_margin is not None or relative_margin is not None)
    check(
        debias, hardness, equal_ids=None if equal_ids == "exclude" else equal_ids, absolute_margin=absolute_margin,
        relative_margin=relative_margin, label_smoothing=label_smoothing or None,
    )  # fmt: skip


def checked_debias(debias: float | Tensor | None, x: Tensor) -> Tensor | None:
    """The share as a tensor () or, with one value per row of x, (M,), without gradient. ``check`` checks the values."""
    if debias is None:
        return None
    if not isinstance(debias, Tensor):
        return x.new_full((), float(debias), dtype=statistics_dtype(x.device))
    if debias.dim() == 0:
        value = checks.scalar_beside("debias", debias, x)
        assert isinstance(value, Tensor)
    else:
        value = checks.vector("debias", debias, x.shape[0], x, of="one per row", integer=False)
    return value.detach()


def correction(
    problem: Problem, shape: Shape, debias: Tensor | None, hardness: float, *, keys: int, both: bool,
    own: int | Tensor = 0, excluded: int = 1,
) -> Correction:  # fmt: skip
    """A correction with the numbers of negatives.

    Without ids, a row's negatives are all columns but ``excluded`` of them; with ids, all columns but its related ones.

    Args:
        own: how many further negatives each row has, a number or (M,).
        keys, both: see ``related.several_positives``.
    """
    x = problem.x
    if problem.spec.row_ids is None:
        rows = torch.full((), shape.all_cols - excluded, device=x.device)
        cols = torch.full((), shape.all_rows - excluded, device=x.device)
        return Correction(hardness, debias, rows + own, cols)
    row_ids, col_ids = related.ids_with_targets(problem, shape, keys)
    rows = shape.all_cols - related.related_counts(row_ids, shape.gather(col_ids))
    cols = rows
    if both:
        of_keys = col_ids[: x.shape[0]]
        cols = shape.all_rows - related.related_counts(of_keys, shape.gather_rows(row_ids))
    return Correction(hardness, debias, rows + own, cols)
