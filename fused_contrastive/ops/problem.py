"""A problem with its arguments checked, and how it becomes statistics, in one process or over a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core import checks, memory, rule_checks
from fused_contrastive.core.spec import Ranks, StatsSpec, autocast_enabled, compute_dtype
from fused_contrastive.distributed.agreement import Alone, Call
from fused_contrastive.distributed.shape import LocalShape, Shape
from fused_contrastive.ops import autograd, dispatch, global_stats
from fused_contrastive.ops.groups import Groups
from fused_contrastive.ops.normalize import normalized


class Problem:
    """Features and the other arguments of the operators.

    The caller has checked the tensors under its own names for them. ``scale``, ``memory_budget`` and ``backend``, which
    have one name in all functions, are checked here. With ``normalize``, the statistics are of the rows' unit vectors.
    ``views`` are the parts whose concatenation is x; normalising them needs no further copy of x.
    """

    def __init__(
        self, x: Tensor, y: Tensor, scale: float | Tensor, *, targets: Tensor | None = None,
        col_bias: Tensor | None = None, row_ids: Tensor | None = None, col_ids: Tensor | None = None,
        memory_budget: int | str, backend: str, normalize: bool = False, views: Sequence[Tensor] = (),
        groups: Groups | None = None,
    ) -> None:  # fmt: skip
        checks.memory_budget(memory_budget)
        self.x, self.y, self.normalize = x, y, normalize
        self.views = views or (x,)
        self.ranks: Ranks | None = None  # of the last run, if it had references
        self.copied_bytes = 0  # of copies of features that live as long as the products that the budget keeps
        scale = scalar_tensor(checks.scalar_beside("scale", scale, x), x)
        self.spec = StatsSpec(scale, targets, col_bias, row_ids, col_ids)
        if groups is not None:
            self.spec = self.spec._replace(row_lengths=groups.rows, col_lengths=groups.cols)
        self.memory_budget, self.backend = memory_budget, dispatch.resolve(backend, x.device, x.dtype)

    def agree(
        self, call: Call | Alone, name: str, options: dict[str, Any], *inputs: object, keys: int | None = None
    ) -> Shape:
        """Agrees on the shape of the whole batch; nothing may be refused after it. See ``Call.agree``."""
        spec = self.spec
        given = {
            "col_bias": spec.col_bias is not None,
            "ids": None if spec.row_ids is None else tuple(spec.row_ids.shape[1:]),
            "row_limit": spec.row_limit is not None,
            "col_limit": spec.col_limit is not None,
            "guide": None if spec.row_guide is None else spec.row_guide.shape[1],
        }
        return call.agree(
            name, self.x, self.y, {**options, **given}, spec.scale, spec.col_bias, *inputs, targets=spec.targets,
            keys=keys, paired=spec.paired,
        )  # fmt: skip

    def unit(self) -> None:
        """Normalises the features if ``normalize`` is set, and clears it."""
        if self.normalize:
            same, name = self.y is self.x, self.backend
            self.x = normalized(*self.views, backend=name)
            self.y = self.x if same else normalized(self.y, backend=name)
            self.normalize, self.views = False, ()
            self.count_copies(*((self.x,) if same else (self.x, self.y)))

    def count_copies(self, *copies: Tensor) -> None:
        """Counts (rows, D) copies of features, of which "auto" takes the bytes off the budget on a CPU."""
        self.copied_bytes += sum(t.shape[0] * t.shape[1] * t.itemsize for t in copies)

    def run(self, shape: Shape, **asked: Any) -> tuple[Tensor, Tensor, Tensor]:
        """pos, row and col; ``asked`` are fields of the StatsSpec."""
        self.unit()
        if not isinstance(shape, LocalShape):
            return self.without_ranks(
                *global_stats.global_stats(self.x, self.y, shape, self.spec, asked, self.memory_budget, self.backend)
            )
        differentiable = self.is_differentiable()
        spec = self.spec._replace(**asked)
        if differentiable and spec.row_lengths is None and dispatch.BACKENDS[self.backend].keeps(spec, self.x.dtype):
            spec = spec._replace(kept_rows=self.rows_to_keep())
        pos, row, col, _ = autograd.stats_forward(self.x, self.y, *spec, self.backend, differentiable=differentiable)
        return self.without_ranks(pos, row, col)

    def without_ranks(self, pos: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the ranks, if there are any, out of the statistics."""
        if not self.spec.is_ranked():
            return pos, row, col
        self.ranks = Ranks(pos.detach(), row[:, 1:].detach(), col[:, 1:].detach() if len(col) else None)
        return pos, row[:, 0], col[:, 0]

    def is_differentiable(self) -> bool:
        scale, bias = self.spec.scale, self.spec.col_bias
        return torch.is_grad_enabled() and (
            self.x.requires_grad
            or self.y.requires_grad
            or scale.requires_grad
            or (bias is not None and bias.requires_grad)
        )

    def rows_to_keep(self) -> int:
        """How many rows' products the budget lets the forward keep."""
        kept = dispatch.BACKENDS[self.backend].kept
        return memory.products_to_keep(self.x, self.y.shape[0], kept, self.memory_budget, self.copied_bytes)


def scalar_tensor(value: float | Tensor, x: Tensor) -> Tensor:
    """() in the compute dtype of the features x, on their device if it was a number."""
    dtype = compute_dtype(x.dtype)
    if not isinstance(value, Tensor):
        return x.new_full((), value, dtype=dtype)
    return value if value.dtype == dtype else value.to(dtype)


def checked_targets(targets: Tensor | None, x: Tensor, y: Tensor, spread: bool) -> Tensor | None:
    """(M,) int64; None only where t(i) = i has a column for each row. Values are checked by the operator."""
    m, n = x.shape[0], y.shape[0]
    if targets is not None:
        return checks.vector("targets", targets, m, x, of="one column index per row", integer=True)
    if m > n and not spread:
        raise ValueError(f"targets: got None for M = {m} rows and N = {n} columns, expected targets because M > N")
    return None


def checked_bias(col_bias: Tensor | None, y: Tensor) -> Tensor | None:
    """(N,) in the compute dtype."""
    if col_bias is None:
        return None
    return checks.vector("col_bias", col_bias, y.shape[0], y, of="one per column", integer=False).to(
        compute_dtype(y.dtype)
    )


def checked_limit(name: str, limit: Tensor | None, features: Tensor, of: str) -> Tensor | None:
    """One number for each row of the features, in the compute dtype and without gradient."""
    if limit is None:
        return None
    limit = checks.vector(name, limit, features.shape[0], features, of=of, integer=False).detach()
    checks.no_nan(name, limit)
    return limit.to(compute_dtype(features.dtype))


def checked_ids(name: str, ids: Tensor | None, features: Tensor, of: str) -> Tensor | None:
    """The int64 id, or the K of them, of each row of the features."""
    return None if ids is None else rule_checks.ids(name, ids, features.shape[0], features, of)


def checked_pair_of_ids(
    row_ids: Tensor | None, col_ids: Tensor | None, x: Tensor, y: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(M,) and (N,) int64, or (M, K) and (N, K), or neither."""
    if row_ids is None or col_ids is None:
        if row_ids is not col_ids:
            raise ValueError("row_ids, col_ids: got only one of them, expected both or neither")
        return None, None
    rows, cols = checked_ids("row_ids", row_ids, x, "one per row"), checked_ids("col_ids", col_ids, y, "one per column")
    assert rows is not None
    assert cols is not None
    rule_checks.same_ids("row_ids", rows, "col_ids", cols)
    return rows, cols


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), elementwise; -inf with zero gradients (not NaN) where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)).masked_fill(empty, -torch.inf)


def autocast(features: Tensor) -> Tensor:
    """Casts features as autocast casts the operands of a matmul."""
    if not isinstance(features, Tensor) or not autocast_enabled(features.device):
        return features
    casts = features.is_floating_point() and features.dtype != torch.float64
    return features.to(torch.get_autocast_dtype(features.device.type)) if casts else features
