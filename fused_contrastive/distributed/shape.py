"""The shape of one call's batch: of this process alone, or of all processes of a group. A loss is written for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_contrastive.core.reduction import Reduction, reduce
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.distributed.collectives import (
    all_gather_rows,
    all_gather_with_gradient,
    all_reduce,
    merge_log_sums_with_gradient,
    report_loss,
)


class LocalShape(NamedTuple):
    """A call without a group: its rows and columns are the whole batch."""

    all_rows: int
    all_cols: int

    @property
    def first_row(self) -> int:
        """The place of this process's first row in the whole batch."""
        return 0

    @property
    def first_col(self) -> int:
        return 0

    def reduce(self, losses: Tensor, reduction: Reduction, count: Tensor | None = None) -> Tensor:
        """(m,) losses -> the loss of the batch, or (m,) for "none". ``count``: what "mean" divides by, if not m."""
        return reduce(losses, reduction) if count is None or reduction != "mean" else losses.sum() / count

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a value over the processes, with gradient."""
        return value

    def counted(self, share: Tensor) -> Tensor:
        """A scalar term of the loss that every process has computed in full; it counts once, not once a process."""
        return share

    def gather(self, rows: Tensor) -> Tensor:
        """(n, ...) of this process's columns -> (N, ...) of all, without gradient."""
        return rows

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(m, ...) of this process's rows -> (M, ...) of all, without gradient."""
        return rows

    def columns_of(self, targets: Tensor | None, device: torch.device) -> Tensor:
        """(m,) targets, or the default t(i) = i -> columns of the whole matrix."""
        return torch.arange(self.all_rows, device=device) if targets is None else targets

    def own_cols(self, everything: Tensor) -> Tensor:
        """(N, ...) of all columns -> (n, ...) of this process's."""
        return everything

    def merge(self, partial: Tensor, exact: bool) -> Tensor:
        """(N,) logs of this process's sums -> logs of the sums over all processes, with gradient."""
        return partial


@dataclass(frozen=True)
class GlobalShape:
    """What all processes of a group know of one call, and the collectives on their rows."""

    batch: GlobalBatch
    rank: int
    rows: tuple[int, ...]  # each process's number of rows
    cols: tuple[int, ...]  # each process's number of columns
    keys: tuple[int, ...]  # how many of each process's columns, from the first on, targets count
    tokens: int  # the longest item of any process's columns, in tokens; 0 for features
    differentiable: bool
    ring: bool

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.batch.group

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def all_rows(self) -> int:
        return sum(self.rows)

    @property
    def all_cols(self) -> int:
        return sum(self.cols)

    @property
    def first_row(self) -> int:
        return sum(self.rows[: self.rank])

    @property
    def first_col(self) -> int:
        return sum(self.cols[: self.rank])

    @property
    def own_range(self) -> slice:
        """This process's columns among all."""
        return slice(self.first_col, self.first_col + self.cols[self.rank])

    def columns_of(self, targets: Tensor | None, device: torch.device) -> Tensor:
        """(m,) targets, which count the keys of all processes -> columns of the whole matrix. Default: t(i) = i."""
        if targets is None:
            targets = torch.arange(self.first_row, self.first_row + self.rows[self.rank], device=device)
        if self.keys == self.cols:
            return targets
        keys, cols = (torch.tensor(sizes, device=device) for sizes in (self.keys, self.cols))
        last = keys.cumsum(0)
        owner = torch.searchsorted(last, targets, right=True)
        return targets - (last - keys)[owner] + (cols.cumsum(0) - cols)[owner]

    def reduce(self, losses: Tensor, reduction: Reduction, count: Tensor | None = None) -> Tensor:
        """As ``LocalShape.reduce``, over all processes' rows, with the same result in each; "none" gives (m,)."""
        if reduction == "none":
            return losses
        part = losses.sum()
        if reduction == "mean":
            part = part / (self.all_rows if count is None else count)
        return report_loss(part, self.world if self.batch.gradients == "mean" else 1, self.group)

    def sum(self, value: Tensor) -> Tensor:
        return all_reduce(value, self.group)

    def counted(self, share: Tensor) -> Tensor:
        return self.reduce(share[None] / self.world, "sum")

    def gather(self, rows: Tensor) -> Tensor:
        return all_gather_rows(rows, self.cols, self.group)

    def gather_rows(self, rows: Tensor) -> Tensor:
        return all_gather_rows(rows, self.rows, self.group)

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """As ``gather``; each row's gradient is the sum of what all processes have for it."""
        return all_gather_with_gradient(rows, self.cols, self.rank, self.group)

    def own_cols(self, everything: Tensor) -> Tensor:
        return everything[self.own_range]

    def merge(self, partial: Tensor, exact: bool) -> Tensor:
        return merge_log_sums_with_gradient(partial, exact, self.group)


Shape = LocalShape | GlobalShape
