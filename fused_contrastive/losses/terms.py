"""Terms that several losses use; ``ops/row_loss.py`` has the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.reduction import REDUCTIONS
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.shape import Shape
from fused_contrastive.ops import dispatch
from fused_contrastive.ops.problem import Problem
from fused_contrastive.ops.row_dots import RowMap, row_dots


def check_module(reduction: object, memory_budget: object, backend: object, **flags: object) -> None:
    """Checks the options that all modules have, when a module is made and not only when it is first called."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.memory_budget(memory_budget)
    checks.one_of("backend", backend, ("auto", *dispatch.BACKENDS))
    for name, value in flags.items():
        checks.boolean(name, value)


def mean_logit(scale: float | Tensor, x: Tensor, y: Tensor, shape: Shape, count: int | None = None) -> Tensor:
    """(M,) mean of each row of ``scale * x @ y.T``, in closed form: ``scale * x_i . mean_j y_j``.

    The mean is over the ``count`` rows of y of all processes; by default as many as there are rows of x.
    """
    dtype = compute_dtype(x.dtype)
    mean = shape.sum(y.to(dtype).sum(dim=0)) / (shape.all_rows if count is None else count)
    return scale * (x.to(dtype) * mean).sum(dim=1)


def mean_over_columns(
    problem: Problem, shape: Shape, own_logits: Tensor | None, own_mask: Tensor | None, margin: float | Tensor
) -> Tensor:
    """(M,) mean of each query's logits. Own logits that are masked must be 0, and do not count."""
    spec, count = problem.spec, shape.all_cols
    mean = mean_logit(spec.scale, problem.x, problem.y, shape, count)
    if spec.col_bias is not None:
        mean = mean + shape.sum(spec.col_bias.sum()) / count
    total = count * mean - margin
    if own_logits is None:
        return total / count
    total = total + own_logits.sum(dim=1)
    return total / (count + (own_logits.shape[1] if own_mask is None else own_mask.sum(dim=1)))


def mean_over_queries(problem: Problem, shape: Shape, keys: int, margin: float | Tensor) -> Tensor:
    """(M,) mean of each key's logits."""
    mean = mean_logit(problem.spec.scale, problem.y[:keys], problem.x, shape) - margin / shape.all_rows
    return mean if problem.spec.col_bias is None else mean + problem.spec.col_bias[:keys]


def pair_logit(scale: float | Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(M,) ``scale * x_i . y_i``, a positive's logit."""
    dtype = compute_dtype(x.dtype)
    return nan_where_inf(scale * (x.to(dtype) * y.to(dtype)).sum(dim=1))


def own_logits(
    scale: float | Tensor, z: Tensor, partners: RowMap, transposed: RowMap | None = None
) -> tuple[Tensor, Tensor]:
    """z, and (N,) ``scale * z_i . partners(z)_i`` for a linear map of the rows of z, (N, D); see ``row_dots``."""
    z, dots = row_dots(z, partners, transposed)
    return z, nan_where_inf(scale * dots)


def nan_where_inf(logits: Tensor) -> Tensor:
    """NaN where a positive's logit is +inf, as in ``contrastive_stats``: softplus(row - pos) would be 0 there."""
    return logits - logits.detach().masked_fill(logits != torch.inf, 0)  # inf - inf; the gradient is NaN as well


def class_sums(z: Tensor, codes: Tensor, classes: int) -> Tensor:
    """(classes, D) sums of the rows of z (N, D) that have each code, with the same bits at every call."""
    sums = z.new_zeros(classes, z.shape[1])
    if z.device.type == "cpu":  # on several threads, index_put would add in no fixed order
        return sums.index_add(0, codes, z.contiguous())
    return sums.index_put((codes,), z, accumulate=True)  # on a GPU it is index_add that has no fixed order


def rows_at(t: Tensor, index: Tensor) -> Tensor:
    """``t[index]``, which may repeat rows. Its gradient, a sum like ``class_sums``, has the same bits at every call."""
    return t.index_select(0, index) if t.device.type == "cpu" else t[index]


def check_smoothing(label_smoothing: float, row_ids: Tensor | None, margins: bool) -> None:
    """Raises if pairs are left out, since these cannot be targets."""
    for name, used in (("ids", row_ids is not None), ("a margin that leaves out similar pairs", margins)):
        if label_smoothing and used:
            raise ValueError(
                f"label_smoothing: got it together with {name}, expected 0: excluded pairs cannot be targets"
            )


def scale_of(
    temperature: float | Tensor | None,
    logit_scale: float | Tensor | None,
    default: float | None,
    x: Tensor | None = None,
) -> float | Tensor:
    """What multiplies the similarities: ``logit_scale``, or 1 / temperature, or 1 / default (None: one must be given).

    A tensor comes back on the device of x, the features; without them, as it is.
    """
    if temperature is not None and logit_scale is not None:
        raise ValueError("temperature, logit_scale: got both, expected one of them")
    if logit_scale is not None:
        return (
            checks.scalar("logit_scale", logit_scale)
            if x is None
            else checks.scalar_beside("logit_scale", logit_scale, x)
        )
    temperature = default if temperature is None else temperature
    if temperature is None:
        raise TypeError("logit_scale, temperature: got neither, expected one of them")
    temperature = checks.scalar("temperature", temperature)
    known = not isinstance(temperature, Tensor) or (is_plain(temperature) and temperature.device.type == "cpu")
    if known and not temperature > 0:
        raise ValueError(f"temperature: got {float(temperature)}, expected a positive number")
    if not isinstance(temperature, Tensor) and x is not None and checks.overflows(1 / temperature, x):
        raise ValueError(f"temperature: got {temperature}, expected at least {1 / checks.largest(x):.2g}")
    if isinstance(temperature, Tensor) and x is not None:  # a float16's quotient would be rounded to float16
        temperature = checks.beside("temperature", temperature, x).to(compute_dtype(x.dtype))
    return 1 / temperature
