"""What a backend provides: five functions that it must implement, and others that it may do better than plain torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_contrastive.backends import defaults
from fused_contrastive.core.prefixes import Prefixes, PrefixGradients, PrefixNeeds
from fused_contrastive.core.reduction import Reduction
from fused_contrastive.core.spec import Forward, Gradients, Needs, Ranks, RowLoss, StatsSpec, Upstream
from fused_contrastive.core.tokens import MaxSimForward, MaxSimUpstream, TokenSpec


class Backend(ABC):
    """One backend; ``ops/dispatch.py`` lists them, and docs/extend.md adds one step by step.

    A backend must implement the abstract functions. The others have a default in plain torch
    (``backends/defaults.py``), which works on any device, or are a capability that a backend lacks by default.
    """

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run here, with the way to get it, or None."""

    @abstractmethod
    def supports(self, device_type: str, dtype: torch.dtype) -> bool:
        """Whether it takes features of this dtype on this type of device."""

    @abstractmethod
    def kept(self, rows: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of ``Forward.kept`` for ``rows`` of an (M, n) problem with features of ``dtype``."""

    def keeps(self, spec: StatsSpec, dtype: torch.dtype) -> bool:
        """Whether the backward of such a problem, with features of ``dtype``, reads products that were kept."""
        return True

    def takes_groups(self, spec: StatsSpec) -> bool:
        """Whether ``stats_forward`` and ``stats_backward`` take the groups of such a problem together.

        By default they get each group by itself.
        """
        return False

    @abstractmethod
    def stats_forward(self, spec: StatsSpec, x: Tensor, y: Tensor) -> Forward:
        """The statistics of S, the logits that ``spec`` describes; x (M, D) and y (N, D) have one dtype and device."""

    @abstractmethod
    def stats_backward(
        self, spec: StatsSpec, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream, needs: Needs
    ) -> Gradients:
        """The gradients that ``needs`` names, given ``upstream``, the gradients of the statistics.

        ``saved`` is what ``stats_forward`` returned, but ``saved.pos`` may hold anything. Must not write to ``saved``.
        """

    def kept_of_prefixes(self, rows: int, n: int, count: int, dtype: torch.dtype) -> tuple[int, ...]:
        """The shape of what ``prefixes_forward`` keeps of ``rows`` rows of ``count`` prefixes, in the compute dtype."""
        return (0, 0)

    def prefixes_forward(self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor) -> Forward:
        """The statistics of each prefix, a problem with its own logits: pos and row (P, M) and col (P, N).

        By default one prefix after another, each by ``stats_forward``.
        """
        return defaults.prefixes_forward(self.stats_forward, spec, of, x, y)

    def prefixes_backward(
        self, spec: StatsSpec, of: Prefixes, x: Tensor, y: Tensor, saved: Forward, upstream: Upstream,
        needs: PrefixNeeds,
    ) -> PrefixGradients:  # fmt: skip
        """The gradients that ``needs`` names, summed over the prefixes."""
        shape, dtype = self.kept(0, y.shape[0], x.dtype)
        nothing = x.new_empty(shape, dtype=dtype)
        return defaults.prefixes_backward(self.stats_backward, nothing, spec, of, x, y, saved, upstream, needs)

    def fuses_loss(self, spec: StatsSpec, m: int) -> bool:
        """Whether ``row_loss`` is the backend's fastest way for a problem of m rows. By default it has no ``row_loss``.

        ``spec.kept_rows`` says how many rows of products the memory budget allows.
        """
        return False

    def row_loss(self, spec: StatsSpec, x: Tensor, y: Tensor, loss: RowLoss) -> tuple[Tensor, Ranks | None]:
        """The loss () in the compute dtype, and the ranks of a problem with references. The gradients of the loss are
        formed in the forward, so it can be differentiated once.

        Only called for problems that ``fuses_loss`` accepts. Autocast may be on, and must not change the products.
        """
        raise NotImplementedError

    def cross_entropy(
        self, pos: Tensor, normalisers: Sequence[Tensor], decoupled: bool, reduction: Reduction, dtype: torch.dtype
    ) -> Tensor:
        """Mean over the normalisers, each (M,), of ``softplus(normaliser - pos)`` or, if decoupled, of
        ``normaliser - pos``. It is differentiable, is reduced over M, and is cast to ``dtype`` at the end."""
        return defaults.cross_entropy(pos, normalisers, decoupled, reduction, dtype)

    def normalize(self, *views: Tensor) -> Tensor:
        """Differentiable ``unit_rows(torch.cat(views))`` (core/unit.py) of float32 or float64 features.

        Nobody may write to the result. Its gradient must not be shared, since the backward may write to it.
        """
        return defaults.normalize(*views)

    def max_sim_forward(self, spec: TokenSpec, x: Tensor, y: Tensor) -> MaxSimForward:
        """Sums of maxima over the products of tokens; x (M, T, D), y (N, P, D) of one dtype and device."""
        return defaults.max_sim_forward(spec, x, y)

    def max_sim_backward(
        self, spec: TokenSpec, x: Tensor, y: Tensor, saved: MaxSimForward, upstream: MaxSimUpstream,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of x and y, each in its dtype or None where not needed, given ``upstream``, the sums' gradients.

        Of ``saved`` only the argmaxima are valid; those that were not kept are computed again. Must not write to
        ``saved``. A token beyond its item's length gets 0.
        """
        return defaults.max_sim_backward(spec, x, y, saved, upstream, needs)

    def merge_top_k(self, scores: Tensor, first_column: int, values: Tensor, indices: Tensor) -> None:
        """Merges a block of scores (M, n), whose first column is ``first_column``, into each row's best k, in place.

        ``values`` (M, k) in the scores' dtype, float32 or float64, and ``indices`` (M, k) int64 are sorted by the order
        of ``core/order.py``. Blocks come in the order of their columns: before the call the first
        min(first_column, k) places are filled, after it the first min(first_column + n, k). May write to ``scores``.
        """
        defaults.merge_top_k(scores, first_column, values, indices)

    def count_ahead(
        self, scores: Tensor, first_column: int, target_scores: Tensor, targets: Tensor, counts: Tensor
    ) -> None:
        """Adds to ``counts`` (M,) int64 how many of a block's columns rank ahead of each row's target.

        The target is the column ``targets`` (M,) int64 of the whole matrix, with the score ``target_scores`` (M,). It
        is never ahead of itself. Blocks may come in any order. Must not write to ``scores``.
        """
        defaults.count_ahead(scores, first_column, target_scores, targets, counts)
