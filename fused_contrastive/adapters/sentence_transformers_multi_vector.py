"""sentence-transformers' ranking losses of multi-vector models (tested with 6.2.0; 5.3.0 has none).

They are in a module of their own because the other adapters work with older versions too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fused_contrastive.adapters.common import Fused, importing
from fused_contrastive.core.spec import BackendName
from fused_contrastive.ops.max_sim import max_sim

with importing("sentence-transformers", tested="6.2.0"):
    from sentence_transformers import util
    from sentence_transformers.multi_vector_encoder import losses
    from sentence_transformers.multi_vector_encoder.scoring import colbert_scores, mean_colbert_scores

NO_TOKEN_SCORE = -1e9  # what sentence-transformers gives a document without a real token


def fused_colbert_scores(
    queries_embeddings: Tensor,
    documents_embeddings: Tensor,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    chunk_elements: int | None = None,
    length_normalize: bool = False,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
) -> Tensor:
    """sentence-transformers' ``colbert_scores`` by ``max_sim``: no tensor of token similarities, whatever the batch.

    (Q, T, D) queries and (Q', N, P, D) documents -> (Q, Q' * N) float32 scores, query-major. ``chunk_elements`` is not
    needed here.
    """
    items, per_item = documents_embeddings.shape[:2]
    mask = None if documents_mask is None else documents_mask.bool().flatten(0, 1)
    scores = max_sim(
        queries_embeddings, documents_embeddings.flatten(0, 1),
        None if queries_mask is None else queries_mask.bool(), mask,
        reduction="mean" if length_normalize else "sum", memory_budget=memory_budget, backend=backend,
    )  # fmt: skip
    if mask is not None:
        least = scores.new_full((len(scores), 1), NO_TOKEN_SCORE)
        if length_normalize:  # the library divides this score too
            every = queries_embeddings.shape[1]
            least = least / (every if queries_mask is None else queries_mask.sum(dim=1, keepdim=True).clamp_min(1))
        scores = torch.where(mask.any(dim=1), scores, least)
    return scores.reshape(-1, items * per_item)


class _MaxSimLoss(Fused):
    """A mix-in with what both multi-vector losses share; it stands before the library's class."""

    def __init__(self, model: Any, *, similarity_fct: Any = None, **options: Any) -> None:
        library: Any = similarity_fct or colbert_scores
        given: dict[str, Any] = {}
        if isinstance(library, partial) and not library.args:
            library, given = library.func, dict(library.keywords)
        if library not in (colbert_scores, mean_colbert_scores):
            raise NotImplementedError(
                f"similarity_fct: got {similarity_fct!r}, which is not covered, expected colbert_scores or "
                "mean_colbert_scores: use sentence_transformers' own class"
            )
        given.setdefault("length_normalize", library is mean_colbert_scores)
        super().__init__(model, similarity_fct=partial(self._scores, **given), **options)  # type: ignore[call-arg]
        self._scorer_name = util.similarity_fct_name(similarity_fct or colbert_scores)

    def _scores(self, queries: Tensor, documents: Tensor, **options: Any) -> Tensor:
        return fused_colbert_scores(queries, documents, **options, **self._options())

    def get_config_dict(self) -> dict[str, Any]:
        """The configuration for model cards, with the name of the library's scorer."""
        return {**super().get_config_dict(), "similarity_fct": self._scorer_name}  # type: ignore[misc]


class MultiVectorMultipleNegativesRankingLoss(_MaxSimLoss, losses.MultiVectorMultipleNegativesRankingLoss):
    """sentence-transformers' MultiVectorMultipleNegativesRankingLoss, its scores by ``max_sim``."""


class CachedMultiVectorMultipleNegativesRankingLoss(_MaxSimLoss, losses.CachedMultiVectorMultipleNegativesRankingLoss):
    """sentence-transformers' CachedMultiVectorMultipleNegativesRankingLoss, its scores by ``max_sim``."""


ORIGINALS = {
    losses.MultiVectorMultipleNegativesRankingLoss: MultiVectorMultipleNegativesRankingLoss,
    losses.CachedMultiVectorMultipleNegativesRankingLoss: CachedMultiVectorMultipleNegativesRankingLoss,
}
