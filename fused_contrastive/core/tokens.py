"""Late interaction: the problem that every backend receives with the tokens, and what its forward keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSpec(NamedTuple):
    """Which tokens are real and what is requested. Tokens that are not real may hold anything.

    Argmaxima count the real tokens of an item alone.

    With ``own`` = K, y has M * K items and item m of x is scored against its own, m * K to m * K + K - 1. A score's row
    is an item of x, its column one of C items of y: all N, or the K own ones. With ``own`` or ``smooth``, ``both`` is
    False; with ``smooth``, nothing is kept.
    """

    x_lengths: Tensor | None  # (M,) int64, how many tokens of each x item are real; None: all T
    y_lengths: Tensor | None  # (N,) int64, how many tokens of each y item are real; None: all P
    both: bool  # whether direction y is requested too; direction x always is
    kept_rows: int  # how many items of x, from the first on, have their argmaxima kept for the backward
    own: int = 0  # how many items of y each item of x is scored against; 0: all
    smooth: float = 0.0  # tau: tau * logsumexp(s / tau) in place of the maximum of s; 0: the maximum
    x_order: Tensor | None = None  # (M, T) int64, an order of each item's tokens in which the real ones come first, as
    y_order: Tensor | None = None  # (N, P) they stand among themselves; None: they come first already


class MaxSimForward(NamedTuple):
    """A backend's forward result. Sums are in the compute dtype; a direction that is not requested has 0 elements.

    Argmaxima are kept for the first ``kept_rows`` items of x; of equal products, the first one is the maximum. They are
    undefined for a token that is not real, and where the other item has no real token.
    """

    x: Tensor  # (M, C) sum over x's tokens of the maximum over y's; 0 where either item has no token
    y: Tensor  # (M, C) sum over y's tokens of the maximum over x's; 0 where either item has no token
    argmax_x: Tensor  # (kept_rows, C, T) for each of x's tokens, the index of y's token with the maximum
    argmax_y: Tensor  # (kept_rows, C, P) for each of y's tokens, the index of x's token with the maximum


class MaxSimUpstream(NamedTuple):
    """Gradients that arrive at the sums; None means zero."""

    x: Tensor | None  # (M, C)
    y: Tensor | None  # (M, C)


def index_dtype(size: int) -> torch.dtype:
    """The smallest integer dtype that holds 0 to size - 1."""
    if size <= 2**8:
        return torch.uint8
    return torch.int16 if size <= 2**15 else torch.int32


def argmaxima(rows: int, columns: int, x: Tensor, y: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised argmaxima of both directions, for ``rows`` items of x (..., T, D), ``columns`` of y (..., P, D)."""
    t, p = x.shape[-2], y.shape[-2]
    of_y = (rows, columns, p) if both else (0, 0, 0)
    return x.new_empty(rows, columns, t, dtype=index_dtype(p)), x.new_empty(of_y, dtype=index_dtype(t))


def bytes_of_row(columns: int, x: Tensor, y: Tensor, both: bool) -> int:
    """How many bytes ``argmaxima`` takes for one item of x."""
    t, p = x.shape[-2], y.shape[-2]
    return columns * (t * index_dtype(p).itemsize + (p * index_dtype(t).itemsize if both else 0))


def moved(spec: TokenSpec, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of both sides, the real ones first."""
    return valid_first(x, spec.x_order), valid_first(y, spec.y_order)


def valid_first(tokens: Tensor, order: Tensor | None) -> Tensor:
    """Every item's real tokens moved to its front, in order. (B, L, D) -> (B, L, D)."""
    if order is None:
        return tokens
    rows = order + torch.arange(len(order), device=order.device)[:, None] * order.shape[1]
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view_as(tokens)


def ordered(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(B, L) mask -> the order (B, L) that puts real tokens first, and how many there are, (B,).

    The order is None if they are first already, as in a padded batch. On a GPU, asking would make the host wait.
    """
    if mask is None:
        return None, None
    lengths = mask.sum(dim=1)
    if mask.device.type == "cpu" and not (mask[:, 1:] > mask[:, :-1]).any():
        return None, lengths
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True), lengths


def put_back(gradient: Tensor, order: Tensor | None) -> Tensor:
    """Undoes ``valid_first``."""
    return valid_first(gradient, None if order is None else order.argsort(dim=1))


def real(lengths: Tensor, tokens: int) -> Tensor:
    """(B,) -> (B, tokens) bool."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]
