"""What a backend provides: the primitive forward and backward, the loss on its statistics, ranking, whether it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import Forward, Gradients, Needs, StatsSpec, Upstream
from fused_contrastive.core.tokens import MaxSimForward, MaxSimUpstream, TokenSpec


class Backend(Protocol):
    """A module with these functions is a backend; ops/dispatch.py lists them."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, with the way to get it, or None."""

    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        """Whether it takes features of this dtype on this type of device."""

    def kept(self, rows: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of ``Forward.kept`` for ``rows`` of an (M, n) problem with features of ``dtype``."""

    def stats_forward(self, spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
        """Statistics of S; x (M, D), y (N, D) of one dtype and device."""

    def stats_backward(
        self, spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
    ) -> Gradients:
        """Gradients given those of the statistics. ``saved.pos`` may hold anything. Must not write to ``saved``."""

    def cross_entropy(
        self, pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: Reduction, dtype: torch.dtype
    ) -> Tensor:
        """Differentiable mean over the normalisers, each (M,), of ``softplus(normaliser - pos)``; or, where
        decoupled, of ``normaliser - pos``. Reduced over M and cast to ``dtype`` at the end."""

    def normalize(self, *views: Tensor) -> Tensor:
        """Differentiable ``unit_rows(torch.cat(views))`` (core/unit.py) of float32 or float64 features.

        Nobody may write to the result; its gradient must be for it alone, since the backward may write to that.
        """

    def max_sim_forward(self, spec: TokenSpec, x: Tensor, y: Tensor) -> MaxSimForward:
        """Sums of maxima over the products of tokens; x (M, T, D), y (N, P, D) of one dtype and device."""

    def max_sim_backward(
        self, spec: TokenSpec, x: Tensor, y: Tensor, saved: MaxSimForward, upstream: MaxSimUpstream,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of x and y, each in its dtype, None where not needed, given those of the sums.

        Only the argmaxima of ``saved`` hold anything; those that were not kept are found again. Must not write to
        ``saved``. A token that is not real gets 0.
        """

    def merge_top_k(self, scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None:
        """Merges a block of scores (M, n), columns ``first_column`` and on, into each row's best k, in place.

        ``values`` (M, k) in the scores' dtype, float32 or float64, and ``indices`` (M, k) int64 are sorted by the order
        of ``core/order.py``. Blocks come in the order of their columns; of what earlier ones left, the first
        min(first_column, k) places are filled, afterwards min(first_column + n, k). May write to ``scores``.
        """

    def count_ahead(
        self, scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor
    ) -> None:
        """Adds to ``counts`` (M,) int64 how many of a block's columns stand ahead of each row's target.

        The target is the column ``targets`` (M,) int64 of the whole matrix, with the score ``target_scores`` (M,). It
        is never ahead of itself. Blocks may come in any order. Must not write to ``scores``.
        """
