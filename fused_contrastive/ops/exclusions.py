"""Which candidates a ranking leaves out: right answers, equal ids, and scores above a limit, block by block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import checks, rule_checks
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.ops import limits

ELEMENTS = 1 << 18  # of a block, masked at a time: they fit a core's cache
GPU_ELEMENTS = 1 << 24


class Exclusions(NamedTuple):
    """Excluded candidates of M queries and N candidates; the operator's schema has the same fields."""

    targets: Tensor | None = None  # (M, P) int64 right answers; -1 for none
    query_ids: Tensor | None = None  # (M,) or (M, K) int64: candidates with an equal id are left out
    candidate_ids: Tensor | None = None  # (N,) or (N, K)
    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None

    def any(self) -> bool:
        return any(rule is not None for rule in self)

    def limit(self, queries: Tensor, candidates: Tensor, scale: Tensor | None, rows: slice) -> Tensor | None:
        """(m,) the highest score that is not left out, for m of the queries (M, D); None for no limit."""
        pairs = ((self.absolute_margin, 0.0), (0.0, self.relative_margin))
        margins = [(a, r) for a, r in pairs if a is not None and r is not None]
        if self.max_score is None and not margins:
            return None
        some, most = queries[rows], torch.inf if self.max_score is None else self.max_score
        limit = some.new_full((len(some),), most, dtype=compute_dtype(queries.dtype))
        for target in self.targets[rows].unbind(dim=1) if margins and self.targets is not None else ():
            positive, rounding = limits.similarities(some, candidates[target.clamp_min(0)])
            if scale is not None:
                positive, rounding = scale * positive, scale.abs() * rounding
            for absolute, relative in margins:
                highest = limits.highest(positive, rounding, absolute, relative)
                limit = torch.minimum(limit, highest.masked_fill(target < 0, torch.inf))
        return limit.masked_fill(limit.isnan(), -torch.inf)

    def mask(self, scores: Tensor, limit: Tensor | None, rows: slice, columns: slice) -> None:
        """Sets the excluded ones of a block of scores (m, n) to -inf."""
        if self.targets is not None:
            place = self.targets[rows] - columns.start
            inside = (place >= 0) & (place < scores.shape[1])
            value = torch.where(inside, -torch.inf, torch.inf).to(scores.dtype)  # inf changes nothing
            scores.scatter_reduce_(1, place.clamp(0, scores.shape[1] - 1), value, "amin")
        if limit is None and self.query_ids is None:
            return
        height = max(1, (ELEMENTS if scores.device.type == "cpu" else GPU_ELEMENTS) // scores.shape[1])
        for first in range(0, len(scores), height):
            part = slice(first, first + height)
            some = scores[part]
            if limit is not None:
                some.masked_fill_(some > limit[part, None], -torch.inf)
            if self.query_ids is not None and self.candidate_ids is not None:
                of_rows, of_columns = self.query_ids[rows][part], self.candidate_ids[columns]
                for a, b in zip(_places(of_rows), _places(of_columns), strict=True):
                    some.masked_fill_(a[:, None] == b, -torch.inf)


def checked(
    queries: Tensor,
    candidates: Tensor,
    targets: object,
    exclude_ids: object,
    max_score: float | None,
    absolute_margin: float | None,
    relative_margin: float | None,
) -> Exclusions:
    """The checked arguments of ``rank``; the values of the targets are checked when they are used."""
    m, n = len(queries), len(candidates)
    numbers = {"max_score": max_score, "absolute_margin": absolute_margin, "relative_margin": relative_margin}
    for name, value in numbers.items():
        if value is not None:
            checks.held(name, checks.number(name, value), queries)
    if targets is None and not (absolute_margin is None and relative_margin is None):
        if m != n:
            raise ValueError(
                f"targets: got None with a margin for {m} queries and {n} candidates, expected each query's right "
                f"answers: {shape_of_targets(m)}"
            )
        targets = torch.arange(m, device=queries.device)
    ids: tuple[Tensor | None, Tensor | None] = (None, None)
    if exclude_ids is not None:
        if not isinstance(exclude_ids, (tuple, list)) or len(exclude_ids) != 2:
            got = f"{len(exclude_ids)} values" if isinstance(exclude_ids, (tuple, list)) else type(exclude_ids).__name__
            raise TypeError(f"exclude_ids: got {got}, expected a tuple of two, the ids of the queries and candidates")
        of_queries = rule_checks.ids("exclude_ids[0]", exclude_ids[0], m, queries, "one per query")
        of_candidates = rule_checks.ids("exclude_ids[1]", exclude_ids[1], n, candidates, "one per candidate")
        rule_checks.same_ids("exclude_ids[0]", of_queries, "exclude_ids[1]", of_candidates)
        ids = of_queries, of_candidates
    return Exclusions(None if targets is None else checked_targets(targets, queries), *ids, *numbers.values())


def checked_targets(targets: object, queries: Tensor) -> Tensor:
    """(M,) or (M, P) integers -> (M, P) int64, whose values are not checked here."""
    m = queries.shape[0]
    targets = checks.integers("targets", targets, lambda: shape_of_targets(m))
    checks.same_device("targets", targets, "queries", queries)
    if targets.dim() not in (1, 2) or targets.shape[0] != m or 0 in targets.shape:
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected {shape_of_targets(m)}")
    return targets if targets.dim() == 2 else targets[:, None]


def shape_of_targets(m: int) -> str:
    return f"an integer tensor of shape ({m},) or ({m}, P)"


def _places(ids: Tensor) -> tuple[Tensor, ...]:
    return (ids,) if ids.dim() == 1 else ids.unbind(dim=1)
