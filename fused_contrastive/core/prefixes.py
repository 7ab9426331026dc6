"""Nested prefixes of features (Matryoshka): their lengths, what normalises each, and what a backend returns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.core.unit import LEAST_NORM


class Prefixes(NamedTuple):
    """P prefixes of the features of a problem: prefix k is the first ``dims[k]`` elements of each row.

    With ``c[k, i, j] = row[k, i] * col[k, j] * x[i, :dims[k]] . y[j, :dims[k]]``, its logits are ``scale * c[k]``.
    """

    dims: tuple[int, ...]  # they grow; the last is at most D
    row: Tensor | None = None  # (P, M) in the compute dtype, one over the norms of the prefixes of x; None: 1
    col: Tensor | None = None  # (P, N) of y; None with ``row``
    kept: int = 0  # of how many of the longest prefixes the first ``spec.kept_rows`` rows are kept

    @property
    def parts(self) -> list[slice]:
        """The columns that each prefix adds to the one before."""
        return [slice(first, end) for first, end in pairwise((0, *self.dims))]


class PrefixNeeds(NamedTuple):
    """Which gradients are requested."""

    x: bool
    y: bool
    scale: bool


class PrefixGradients(NamedTuple):
    """A backend's backward result; None for a gradient that is not requested.

    The gradients of x and y include what goes through the norms of their prefixes.
    """

    x: Tensor | None  # (M, D) in the dtype of x
    y: Tensor | None  # (N, D) in the dtype of y
    scale: Tensor | None  # ()


def widths(dims: Sequence[int], d: int) -> list[int]:
    """How many columns each prefix adds, and how many of D are left."""
    return [end - first for first, end in pairwise((0, *dims, d))]


def inverse_norms(x: Tensor, dims: Sequence[int]) -> Tensor:
    """(M, D) -> (P, M) in the compute dtype: one over the norm of each prefix, or 0 for a norm below 1e-12.

    Such a prefix counts as a row of zeros, which has no direction, and gets a gradient of zeros.
    """
    parts = x.split(widths(dims, x.shape[1]), dim=1)[: len(dims)]
    squares = torch.stack([part.to(compute_dtype(x.dtype)).square().sum(dim=1) for part in parts]).cumsum(dim=0)
    norms = squares.sqrt()
    return torch.where(norms < LEAST_NORM, 0, norms.reciprocal())
