"""Margins: limits, made from each positive's similarity, above which negatives are left out as too similar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import checks, rule_checks
from fused_contrastive.core.modes import is_plain
from fused_contrastive.core.unit import unit_rows
from fused_contrastive.distributed.shape import Shape
from fused_contrastive.ops.limits import highest, similarities
from fused_contrastive.ops.own_dots import own_dots
from fused_contrastive.ops.positives import of_positives
from fused_contrastive.ops.problem import Problem


class Margins(NamedTuple):
    """How similar a negative may be: sim(positive) - absolute - relative * |sim(positive)|, where sim is the dot
    product of two features, or of the guide's features, without scale and bias."""

    absolute: float = 0.0
    relative: float = 0.0
    guide: tuple[Tensor, ...] | None = None  # of rows, keys and any negatives: (K, G) shared, or (M, K, G) own


def checked(
    absolute_margin: object,
    relative_margin: object,
    guide: object,
    scale: float | Tensor,
    features: Sequence[Tensor] = (),
    normalize: bool = False,
) -> Margins | None:
    """The checked margins; None if neither a margin nor a guide is given.

    Args:
        scale: must be positive without a guide; a tensor is checked on a CPU only, and not in a trace.
        features: of the rows, the keys and, if there are any, the negatives; the guide needs one tensor for each.
        normalize: L2-normalise the guide's features.
    """
    absolute, relative = (
        0.0 if margin is None else checks.number(name, margin)
        for name, margin in (("absolute_margin", absolute_margin), ("relative_margin", relative_margin))
    )
    if absolute_margin is not None and relative_margin is not None:
        raise ValueError("absolute_margin, relative_margin: got both, expected one of them")
    if absolute_margin is None and relative_margin is None and guide is None:
        return None
    of_guide = None if guide is None else rule_checks.guide(guide, features)
    known = not isinstance(scale, Tensor) or (scale.device.type == "cpu" and is_plain(scale))
    if of_guide is None and known and scale <= 0:
        shown = scale.item() if isinstance(scale, Tensor) else scale
        raise ValueError(f"logit_scale: got {shown!r} with a margin that leaves out similar pairs, expected above 0")
    for k, t in enumerate(of_guide or ()):
        checks.no_nan(f"guide[{k}]", t)
    if of_guide is not None and normalize:
        of_guide = tuple(map(unit_rows, of_guide))
    return Margins(absolute, relative, of_guide)


def width(margins: Margins | None) -> int | None:
    """The width of the guide's features, on which processes have to agree."""
    return None if margins is None or margins.guide is None else margins.guide[0].shape[-1]


def limit(problem: Problem, shape: Shape, margins: Margins | None, both: bool) -> None:
    """Sets the limits of rows and, if ``both``, of columns; this needs t(i) = i. Limits have no gradient.

    Shared negatives are the last columns, also of the guide, and have no column limit.
    """
    if margins is None:
        return
    copied = problem.normalize  # the guide's features as well
    problem.unit()
    with torch.no_grad():
        x, y, scale = problem.x.detach(), problem.y.detach(), problem.spec.scale.detach()
        if margins.guide is not None:
            x, *of_columns = margins.guide
            y, *shared = (t for t in of_columns if t.dim() == 2)
            y, scale = torch.cat((y, *shared)) if shared else y, torch.ones_like(scale)
            if copied:
                problem.count_copies(x, y)
            problem.spec = problem.spec._replace(row_guide=x, col_guide=y)
        positives = of_positives(y, problem.spec, shape, x.shape[0])
        limits = scale * highest(*similarities(x, positives), margins.absolute, margins.relative)
        others = limits.new_full((y.shape[0] - limits.shape[0] if both else 0,), torch.inf)
    problem.spec = problem.spec._replace(row_limit=limits, col_limit=torch.cat((limits, others)) if both else None)


def above(problem: Problem, margins: Margins, own_logits: Tensor) -> Tensor:
    """(M, K) bool: which of each row's own negatives are above the row's limit, which ``limit`` has set."""
    assert problem.spec.row_limit is not None
    similarity = own_logits.detach()
    if margins.guide is not None:
        similarity = own_dots(margins.guide[0], margins.guide[2])
    return similarity > problem.spec.row_limit[:, None]
