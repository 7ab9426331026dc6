"""Groups of rows, each a problem of its own: how the arguments of a function say them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import group_checks
from fused_contrastive.core.spec import starts
from fused_contrastive.distributed.agreement import Alone, Call


class Groups(NamedTuple):
    """How many rows, and how many columns, each group has; both (B,) int64 on the CPU."""

    rows: Tensor
    cols: Tensor

    def of_rows(self, of_groups: Tensor, like: Tensor) -> Tensor:
        """(B,) -> (rows,), for each row the element of its group; ``like`` is a tensor (rows, ...)."""
        return of_groups.repeat_interleave(self.rows, output_size=like.shape[0]).to(like.device)

    def times(self, count: int) -> Groups:
        """Groups with ``count`` times as many rows and columns."""
        return Groups(self.rows * count, self.cols * count)

    def places(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(rows,) each row's place in its group, and the length of that."""
        row = torch.arange(like.shape[0], device=like.device)
        return row - self.of_rows(starts(self.rows), like), self.of_rows(self.rows, like)

    def distinct(self, labels: Tensor) -> Tensor:
        """(rows,) integers -> (rows,) others, equal in the same pairs of a group, and in no pair of two groups."""
        codes = torch.searchsorted(labels.sort().values, labels)
        return self.of_rows(torch.arange(self.rows.shape[0], device=self.rows.device), labels) * labels.shape[0] + codes


def grouped(
    call: Call | Alone, lengths: Tensor | None, features: dict[str, Tensor], dims: int = 2
) -> tuple[Groups | None, list[Tensor]]:
    """The groups, and the features with all groups' rows in the first dimension.

    ``lengths`` asks for groups; so do features (B, N, ...) of more than ``dims`` dimensions. Without groups the
    features come back as they are, to be checked by the caller.

    Args:
        call: of the function; one over a group of processes raises NotImplementedError.
        lengths: (B,) int64, each group's rows, of all ``features``.
        features: one or more tensors of rows by their names; the first one's groups are rows, the last one's columns.
    """
    every = list(features.values())
    first_name, first = next(iter(features.items()))
    batched = isinstance(first, Tensor) and first.dim() == dims + 1
    unfit = not all(isinstance(t, Tensor) and t.dim() for t in every)
    if unfit or (lengths is None and not batched):
        return None, every
    if call.spread:
        raise NotImplementedError("lengths: got groups of rows with group=, which is not covered; expected one of them")
    if lengths is not None:
        for name, value in features.items():
            if value.dim() > dims:
                raise ValueError(f"{name}: got shape {tuple(value.shape)} with lengths, expected (rows, D)")
            lengths = group_checks.lengths("lengths", lengths, value.shape[0], f"the rows of {name}")
        of_rows = lengths.cpu()
        return Groups(of_rows, of_rows), every
    for name, value in features.items():
        if value.dim() != dims + 1 or value.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected {dims + 1} dimensions, the first of size "
                f"{first.shape[0]}, as {first_name} has: one problem for each"
            )
    of_rows = of_cols = torch.full((first.shape[0],), first.shape[1], dtype=torch.int64, device="cpu")
    if every[-1].shape[1] != first.shape[1]:
        of_cols = torch.full_like(of_rows, every[-1].shape[1])
    return Groups(of_rows, of_cols), [t.flatten(0, 1) for t in every]
