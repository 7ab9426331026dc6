"""``dims`` and ``dim_weights``: the weighted sum of the losses of nested prefixes of the features."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.shape import Shape
from fused_contrastive.ops import prefixes
from fused_contrastive.ops.problem import Problem
from fused_contrastive.ops.row_loss import cross_entropy, reduced


class Nested(NamedTuple):
    """How many columns each prefix has, increasing, and the weight of its loss."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]


def checked(dims: object, dim_weights: object, features: Tensor | None = None, name: str = "") -> Nested | None:
    """None without ``dims``. The features (rows, D), which errors call ``name``, bound the dims; a module has none."""
    if dims is None:
        if dim_weights is not None:
            raise ValueError(f"dim_weights: got {dim_weights!r} without dims, expected None")
        return None
    if isinstance(dims, (str, Tensor)) or not isinstance(dims, Sequence):
        raise TypeError(f"dims: got {dims!r}, expected a sequence of increasing integers")
    lengths = tuple(_integer(dim, dims) for dim in dims)
    if not lengths or not all(a < b for a, b in pairwise((0, *lengths))):
        raise ValueError(f"dims: got {dims!r}, expected increasing integers from 1 on, at least one")
    if features is not None and lengths[-1] > features.shape[1]:
        raise ValueError(f"dims: got {dims!r}, expected at most {features.shape[1]}, the D of {name}")
    if dim_weights is None:
        return Nested(lengths, (1.0,) * len(lengths))
    if isinstance(dim_weights, (str, Tensor)) or not isinstance(dim_weights, Sequence):
        raise TypeError(f"dim_weights: got {dim_weights!r}, expected a sequence of {len(lengths)} numbers")
    if len(dim_weights) != len(lengths):
        raise ValueError(f"dim_weights: got {dim_weights!r}, expected {len(lengths)} numbers, one for each of dims")
    return Nested(lengths, tuple(checks.number("dim_weights", weight) for weight in dim_weights))


def _integer(dim: object, dims: object) -> int:
    try:
        if isinstance(dim, (bool, Tensor)):
            raise TypeError
        return operator.index(dim)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"dims: got {dims!r}, expected a sequence of increasing integers") from None


def shown(dims: Sequence[int] | None, dim_weights: Sequence[float] | None) -> str:
    """The options as a module's ``extra_repr`` ends; nothing without dims."""
    return "" if dims is None else f", dims={dims!r}, dim_weights={dim_weights!r}"


def check_module(dims: object, dim_weights: object, **options: object) -> None:
    """The checks of the options that a module is constructed with."""
    if checked(dims, dim_weights) is not None:
        refuse(**options)


def refuse(**options: object) -> None:
    """Raises NotImplementedError for an option that is neither None nor False: with ``dims`` it is not covered. Where 0
    is an option's default, callers pass None for it; a margin of 0 is one."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{name}: got it together with dims, which is not covered: add up a call for each prefix"
            )


def loss(
    problem: Problem,
    shape: Shape,
    reduction: Reduction,
    nested: Nested,
    *,
    both: bool,
    decoupled: bool,
    margin: float | Tensor = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """The weighted sum over the prefixes; the other arguments are those of ``row_loss``."""
    pos, row, col = prefixes.statistics(problem, nested.dims, both)
    count, m = pos.shape
    if isinstance(margin, Tensor) or margin:
        pos = pos - margin
    normalisers = (row, col[:, :m]) if both else (row,)
    losses = cross_entropy(
        pos.flatten(), *(each.flatten() for each in normalisers), dtype=pos.dtype, decoupled=decoupled,
        reduction="none", backend=problem.backend,
    ).view(count, m)  # fmt: skip
    total = sum(factor * each for factor, each in zip(nested.weights, losses.unbind(), strict=True))
    assert isinstance(total, Tensor)
    return reduced(total, shape, reduction, weight).to(compute_dtype(problem.x.dtype))
