"""colpali-engine's losses of late interaction and of bi-encoders (tested with 0.3.18)."""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.adapters.common import Fused, check_pair, importing, not_covered
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.losses.info_nce import info_nce_loss
from fused_contrastive.losses.terms import pair_logit
from fused_contrastive.ops.max_sim import max_sim
from fused_contrastive.ops.own_dots import own_dots
from fused_contrastive.ops.problem import autocast
from fused_contrastive.ops.ranking import rank
from fused_contrastive.ops.stats import sigmoid_stats

with importing("colpali-engine", tested="0.3.18"):
    from colpali_engine import loss as library
    from colpali_engine.loss import bi_encoder_losses as bi
    from colpali_engine.loss import late_interaction_losses as late


class _Colbert(Fused):
    """A mix-in for the losses of late interaction: scores by ``max_sim``, smooth or not.

    The library has no masks: padding is tokens of zeros, which take part in the maxima here too.
    """

    bypassed: ClassVar[tuple[str, ...]] = ("_aggregate", "_smooth_max")

    def _max_sim(self, queries: Tensor, documents: Tensor) -> Tensor:
        this: Any = self
        tau = this.tau if this.use_smooth_max else None
        scores: Tensor = max_sim(queries, documents, smooth=tau, **self._options())
        return scores

    def _normalized(self, scores: Tensor, queries: Tensor) -> Tensor:
        """The library's normalisation by the number of real tokens, if it is asked for."""
        this: Any = self
        if not this.normalize_scores:
            return scores
        normalized: Tensor = this._apply_normalization(scores, (queries[:, :, 0] != 0).sum(dim=1))
        return normalized

    def _inbatch_scores(self, query_embeddings: Tensor, doc_embeddings: Tensor) -> Tensor:
        """(B, T, D), (C, P, D) -> (B, C)."""
        return self._normalized(self._max_sim(query_embeddings, doc_embeddings), query_embeddings)


class ColbertLoss(_Colbert, late.ColbertLoss):
    """colpali-engine's ColbertLoss without the products of tokens; the filter of high negatives included."""


class ColbertPairwiseCELoss(_Colbert, late.ColbertPairwiseCELoss):
    """colpali-engine's ColbertPairwiseCELoss, likewise."""


class ColbertSigmoidLoss(_Colbert, late.ColbertSigmoidLoss):
    """colpali-engine's ColbertSigmoidLoss, likewise."""


class _Explicit(Fused):
    """A mix-in for losses with explicit negatives: softplus(negative - positive), and a loss of the batch."""

    inner_name: ClassVar[str]  # the library's attribute with the loss of the batch

    def _loss(self, scores: Tensor, *batch: Any) -> Tensor:
        """(B, 1 + K) scores, the positive's first, and the arguments of the loss of the batch -> scalar."""
        this: Any = self
        loss = F.softplus((scores[:, 1:] - scores[:, :1]) / this.temperature).mean()
        weight = this.in_batch_term_weight
        if weight > 0:
            inner = getattr(self, self.inner_name)
            inner.backend, inner.memory_budget = self.backend, self.memory_budget
            loss = loss * (1 - weight) + inner(*batch) * weight
        return loss


class _ColbertExplicit(_Explicit, _Colbert):
    def forward(
        self, query_embeddings: Tensor, doc_embeddings: Tensor, neg_doc_embeddings: Tensor, offset: int = 0
    ) -> Tensor:
        """(B, T, D), (C, P, D), (B, K, P', D) -> scalar."""
        positives = doc_embeddings[offset : offset + len(query_embeddings), None]
        scores = [self._max_sim(query_embeddings, documents) for documents in (positives, neg_doc_embeddings)]
        normalized = self._normalized(torch.cat(scores, dim=1), query_embeddings)
        return self._loss(normalized, query_embeddings, doc_embeddings, offset)


class ColbertNegativeCELoss(_ColbertExplicit, late.ColbertNegativeCELoss):
    """colpali-engine's ColbertNegativeCELoss: each query's own negatives by ``max_sim`` (M, K, P, D)."""

    inner_name = "inner_loss"

    @wraps(late.ColbertNegativeCELoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inner_loss.__class__ = ColbertLoss


class ColbertPairwiseNegativeCELoss(_ColbertExplicit, late.ColbertPairwiseNegativeCELoss):
    """colpali-engine's ColbertPairwiseNegativeCELoss, likewise."""

    inner_name = "inner_pairwise"

    @wraps(late.ColbertPairwiseNegativeCELoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inner_pairwise.__class__ = ColbertPairwiseCELoss


class _Bi(Fused):
    """A mix-in for bi-encoders. Their matrix of scores is never stored, so that its entries cannot be filtered."""

    bypassed: ClassVar[tuple[str, ...]] = ("_filter_high_negatives", "_get_idx")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if getattr(self, "pos_aware_negative_filtering", False):
            raise NotImplementedError(
                "pos_aware_negative_filtering: got True, which is not covered, as it multiplies entries of the matrix "
                "of scores: use colpali_engine's own class"
            )

    def _checked(self, query_embeddings: Tensor, doc_embeddings: Tensor) -> None:
        check_pair("query_embeddings", query_embeddings, "doc_embeddings", doc_embeddings)


class BiEncoderLoss(_Bi, bi.BiEncoderLoss):
    """colpali-engine's BiEncoderLoss by ``info_nce_loss``.

    Raises:
        NotImplementedError: ``pos_aware_negative_filtering``.
    """

    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        """(B, D), (C, D) -> scalar; query i's document is i + offset."""
        self._checked(query_embeddings, doc_embeddings)
        targets = torch.arange(offset, offset + len(query_embeddings), device=query_embeddings.device)
        loss: Tensor = info_nce_loss(
            query_embeddings, doc_embeddings, temperature=self.temperature, targets=targets, **self._options()
        )
        return loss


class BiPairedEncoderLoss(_Bi, bi.BiPairedEncoderLoss):
    """colpali-engine's BiPairedEncoderLoss by ``info_nce_loss``, in both directions.

    Raises:
        NotImplementedError: ``pos_aware_negative_filtering``.
    """

    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        """(B, D), (B, D) -> scalar."""
        self._checked(query_embeddings, doc_embeddings)
        if offset:
            raise ValueError(f"offset: got {offset}, expected 0: each document has one query, and none is left over")
        loss: Tensor = info_nce_loss(
            query_embeddings, doc_embeddings, temperature=self.temperature, symmetric=True, **self._options()
        )
        return loss


class BiPairwiseCELoss(_Bi, bi.BiPairwiseCELoss):
    """colpali-engine's BiPairwiseCELoss: each query's hardest negative by ``rank``.

    Raises:
        NotImplementedError: ``pos_aware_negative_filtering``.
    """

    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        """(B, D), (C, D) -> scalar. The library takes no notice of ``offset``: query i's document is i."""
        self._checked(query_embeddings, doc_embeddings)
        query, documents = autocast(query_embeddings), autocast(doc_embeddings)
        best = rank(query.detach(), documents.detach(), 2, backend=self.backend).indices
        own = torch.arange(len(query), device=query.device)
        hardest = torch.where(best[:, 0] == own, best[:, 1], best[:, 0])
        pos, neg = (pair_logit(1 / self.temperature, query, d) for d in (documents[: len(query)], documents[hardest]))
        return F.softplus(neg - pos).mean()


class BiSigmoidLoss(_Bi, bi.BiSigmoidLoss):
    """colpali-engine's BiSigmoidLoss by ``sigmoid_stats``.

    Raises:
        NotImplementedError: ``pos_aware_negative_filtering``.
    """

    def forward(self, query_embeddings: Tensor, doc_embeddings: Tensor, offset: int = 0) -> Tensor:
        """(B, D), (C, D) -> scalar; query i's document is i + offset."""
        self._checked(query_embeddings, doc_embeddings)
        (m, _), n = query_embeddings.shape, len(doc_embeddings)
        if n % m or offset % m:  # the library goes through the documents in blocks of m
            raise ValueError(
                f"doc_embeddings: got {n} rows with offset={offset}, expected multiples of {m}, the number of queries"
            )
        targets = torch.arange(offset, offset + m, device=query_embeddings.device)
        pos, row = sigmoid_stats(
            query_embeddings, doc_embeddings, 1 / self.temperature, targets=targets, **self._options()
        )
        return (row - F.logsigmoid(pos)).sum() / (m * n)


class _BiExplicit(_Explicit, _Bi):
    def forward(
        self, query_embeddings: Tensor, doc_embeddings: Tensor, neg_doc_embeddings: Tensor, offset: int = 0
    ) -> Tensor:
        """(B, D), (C, D), (B, K, D) -> scalar."""
        self._checked(query_embeddings, doc_embeddings)
        positives = doc_embeddings[offset : offset + len(query_embeddings)]
        query, own, negatives = (autocast(t) for t in (query_embeddings, positives, neg_doc_embeddings))
        scores = torch.cat((own_dots(query, own[:, None]), own_dots(query, negatives)), dim=1)
        return self._loss(scores, query_embeddings, doc_embeddings, offset)


class BiNegativeCELoss(_BiExplicit, bi.BiNegativeCELoss):
    """colpali-engine's BiNegativeCELoss.

    Raises:
        NotImplementedError: ``pos_aware_negative_filtering``.
    """

    inner_name = "inner_loss"

    @wraps(bi.BiNegativeCELoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inner_loss.__class__ = BiEncoderLoss


class BiPairwiseNegativeCELoss(_BiExplicit, bi.BiPairwiseNegativeCELoss):
    """colpali-engine's BiPairwiseNegativeCELoss."""

    inner_name = "inner_pairwise"

    @wraps(bi.BiPairwiseNegativeCELoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inner_pairwise.__class__ = BiPairwiseCELoss


ORIGINALS = {
    **{getattr(late, cls.__name__): cls for cls in (
        ColbertLoss, ColbertNegativeCELoss, ColbertPairwiseCELoss, ColbertPairwiseNegativeCELoss, ColbertSigmoidLoss,
    )},
    **{getattr(bi, cls.__name__): cls for cls in (
        BiEncoderLoss, BiNegativeCELoss, BiPairedEncoderLoss, BiPairwiseCELoss, BiPairwiseNegativeCELoss, BiSigmoidLoss,
    )},
}  # fmt: skip
__getattr__ = not_covered(__name__, library)


def patch_colpali_engine() -> Patch:
    """Makes ``colpali_engine.loss`` hold the classes of this module.

    Call it before the losses are created. ``undo()`` of the ``Patch``, or leaving its ``with`` block, takes it back.
    """
    patch = Patch()
    patch.replace_everywhere("colpali_engine", ORIGINALS)
    return patch
