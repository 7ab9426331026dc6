"""Late interaction: the problem that every backend receives with the tokens, and what its forward keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSpec(NamedTuple):
    """Which tokens are real and what is requested. An item's real tokens come first; what follows them is 0."""

    x_lengths: Tensor | None  # (M,) int64, how many tokens of each x item are real; None: all T
    y_lengths: Tensor | None  # (N,) int64, how many tokens of each y item are real; None: all P
    both: bool  # whether direction y is requested too; direction x always is
    kept_rows: int  # how many items of x, from the first on, have their argmaxima kept for the backward


class MaxSimForward(NamedTuple):
    """A backend's forward result. Sums are in the compute dtype; a direction that is not requested has 0 elements.

    Argmaxima are kept for the first ``kept_rows`` items of x; of equal products, the first one is the maximum. They are
    undefined for a token that is not real, and where the other item has no real token.
    """

    x: Tensor  # (M, N) sum over x's tokens of the maximum over y's; 0 where either item has no token
    y: Tensor  # (M, N) sum over y's tokens of the maximum over x's; 0 where either item has no token
    argmax_x: Tensor  # (kept_rows, N, T) for each of x's tokens, the index of y's token with the maximum
    argmax_y: Tensor  # (kept_rows, N, P) for each of y's tokens, the index of x's token with the maximum


class MaxSimUpstream(NamedTuple):
    """Gradients that arrive at the sums; None means zero."""

    x: Tensor | None  # (M, N)
    y: Tensor | None  # (M, N)


def index_dtype(size: int) -> torch.dtype:
    """The smallest integer dtype that holds 0 to size - 1."""
    if size <= 2**8:
        return torch.uint8
    return torch.int16 if size <= 2**15 else torch.int32


def argmaxima(rows: int, x: Tensor, y: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised argmaxima of both directions, for ``rows`` items of x (M, T, D) against all of y (N, P, D)."""
    (_, t, _), (n, p, _) = x.shape, y.shape
    of_y = (rows, n, p) if both else (0, 0, 0)
    return x.new_empty(rows, n, t, dtype=index_dtype(p)), x.new_empty(of_y, dtype=index_dtype(t))


def bytes_of_row(x: Tensor, y: Tensor, both: bool) -> int:
    """How many bytes ``argmaxima`` takes for one item of x."""
    (_, t, _), (n, p, _) = x.shape, y.shape
    return n * (t * index_dtype(p).itemsize + (p * index_dtype(t).itemsize if both else 0))


def valid_first(tokens: Tensor, order: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Every item's real tokens moved to its front, in order, and 0 after them. (B, L, D) -> (B, L, D)."""
    if order is None or lengths is None:
        return tokens
    moved = tokens.gather(1, order[:, :, None].expand_as(tokens))
    return moved.masked_fill_(~real(lengths, tokens.shape[1])[:, :, None], 0)


def ordered(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(B, L) mask -> the order (B, L) that puts real tokens first, and how many there are, (B,)."""
    if mask is None:
        return None, None
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True), mask.sum(dim=1)


def put_back(gradient: Tensor, order: Tensor | None) -> Tensor:
    """Undoes ``valid_first``."""
    if order is None:
        return gradient
    return gradient.gather(1, order.argsort(dim=1)[:, :, None].expand_as(gradient))


def real(lengths: Tensor, tokens: int) -> Tensor:
    """(B,) -> (B, tokens) bool."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]
