"""How the negatives share a row's gradient at a temperature, summed over a stream of rows.

With scale ``1 / temperature`` and row i's negatives j != i, the InfoNCE loss pulls at the positive as hard as it pushes
at all negatives together, and negative j takes the share

    w[i, j] = exp(scale * p[i, j]) / sum over l != i of exp(scale * p[i, l])        p = x @ y.T

of the push: the relative penalty of Wang & Liu 2021 ("Understanding the Behaviour of Contrastive Loss", eq. 7). It is a
Boltzmann distribution over the negatives, whose entropy never falls as the temperature grows: near 0 all weight is on
the nearest negative, as in a triplet loss; at infinity every negative weighs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core.order import ahead
from fused_contrastive.core.spec import statistics_dtype

CHUNK_ELEMENTS = 1 << 22  # elements of a chunk's (rows, N) matrix; a handful of such matrices are alive at once


class Weights(NamedTuple):
    """Means over the rows of one direction, at one scale."""

    loss: float  # InfoNCE
    effective: float  # the perplexity of w: exp of its entropy, from 1 to N - 1
    shares: Tensor  # (k,) the weight of the hardest 1, 2, ..., k negatives


def chunks(n: int) -> list[slice]:
    """Slices of n rows, each of one row or with at most CHUNK_ELEMENTS elements in n columns."""
    height = max(1, CHUNK_ELEMENTS // n)
    return [slice(start, min(start + height, n)) for start in range(0, n, height)]


class Negatives:
    """Running sums over the rows of one direction, in float64; N >= 2, row i's positive is column i."""

    def __init__(self, n: int, scales: Sequence[float], k: int, device: torch.device) -> None:
        self.n, self.scales, self.k = n, scales, min(k, n - 1)
        zeros = torch.zeros(len(scales), dtype=statistics_dtype(device), device=device)
        self.loss, self.effective = zeros, zeros.clone()  # (scales,)
        self.shares = zeros[:, None].repeat(1, self.k)  # (scales, k)
        self.first = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, products: Tensor, first_row: int) -> None:
        """Adds rows with the products (R, N), which are overwritten; the first is row ``first_row``."""
        positive = products.diagonal(first_row).clone()  # (R,)
        columns = torch.arange(self.n, device=products.device)
        own = columns[first_row : first_row + len(products)]
        self.first += (~ahead(products, columns, positive[:, None], own[:, None]).any(dim=1)).sum()
        products.diagonal(first_row).fill_(-torch.inf)
        hardest = products.topk(self.k, dim=1).values  # (R, k)
        gaps = products.sub_(hardest[:, :1])  # to the hardest negative, <= 0
        gaps.diagonal(first_row).zero_()
        dtype = self.loss.dtype
        steps, margins = (hardest - hardest[:, :1]).to(dtype), (hardest[:, 0] - positive).to(dtype)
        for i, scale in enumerate(self.scales):
            weights = (scale * gaps).exp_()
            weights.diagonal(first_row).zero_()
            total = weights.sum(dim=1, dtype=dtype)  # >= 1
            entropy = total.log() - scale * (weights.mul_(gaps)).sum(dim=1, dtype=dtype) / total
            self.loss[i] += torch.logaddexp(scale * margins + total.log(), torch.zeros_like(total)).sum()
            self.effective[i] += entropy.exp().sum()
            self.shares[i] += ((scale * steps).exp() / total[:, None]).cumsum(dim=1).sum(dim=0)

    def accuracy(self) -> float:
        """The share of rows whose positive comes first, by the order of ``rank``."""
        return self.first.item() / self.n

    def means(self) -> list[Weights]:
        """One for each scale."""
        rows = zip(self.loss.tolist(), self.effective.tolist(), self.shares.cpu() / self.n, strict=True)
        return [Weights(loss / self.n, effective / self.n, shares) for loss, effective, shares in rows]
