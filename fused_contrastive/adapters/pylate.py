"""PyLate's losses of late interaction (tested with 1.6.0)."""

from __future__ import annotations

from functools import wraps
from typing import Any, Literal

from torch import Tensor

from fused_contrastive.adapters.common import Fused, importing, not_covered
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core.spec import BackendName
from fused_contrastive.ops.max_sim import max_sim

with importing("pylate", tested="1.6.0"):
    from pylate import losses
    from pylate.scores import ColBERTScores, colbert_kd_scores


def fused_colbert_scores(
    queries_embeddings: Tensor,
    documents_embeddings: Tensor,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
) -> Tensor:
    """PyLate's ``ColBERTScores`` by ``max_sim``: (Q, T, D) and (Q', N, P, D) -> (Q, Q' * N) scores, query-major."""
    documents = _zero_where_masked(documents_embeddings, documents_mask).flatten(0, 1)
    mask = None if queries_mask is None else queries_mask.bool()
    return max_sim(queries_embeddings, documents, mask, memory_budget=memory_budget, backend=backend)


def fused_colbert_kd_scores(
    queries_embeddings: Tensor,
    documents_embeddings: Tensor,
    queries_mask: Tensor | None = None,
    documents_mask: Tensor | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
) -> Tensor:
    """PyLate's ``colbert_kd_scores`` by ``max_sim``: (Q, T, D) and (Q, N, P, D) -> (Q, N) scores."""
    documents = _zero_where_masked(documents_embeddings, documents_mask)
    mask = None if queries_mask is None else queries_mask.bool()
    return max_sim(queries_embeddings, documents, mask, memory_budget=memory_budget, backend=backend)


def _zero_where_masked(documents: Tensor, mask: Tensor | None) -> Tensor:
    """PyLate multiplies the similarities of masked tokens by 0: they still take part in the maximum, as zeros."""
    return documents if mask is None else documents.masked_fill(~mask.bool()[..., None], 0)


class _InBatch(Fused):
    """A mix-in with what both contrastive losses share; it stands before the library's class."""

    def __init__(self, model: Any, score_metric: Any = None, *args: Any, **options: Any) -> None:
        if score_metric is not None and type(score_metric) is not ColBERTScores:
            raise NotImplementedError(
                f"score_metric: got {score_metric!r}, which is not covered, expected None or a ColBERTScores: use "
                "pylate's own class"
            )
        super().__init__(model, self._scores, *args, **options)  # type: ignore[call-arg]

    def _scores(self, queries: Tensor, documents: Tensor, **masks: Any) -> Tensor:
        return fused_colbert_scores(queries, documents, **masks, **self._options())


class Contrastive(_InBatch, losses.Contrastive):
    """pylate's Contrastive, its scores by ``max_sim``.

    Raises:
        NotImplementedError: a ``score_metric`` other than a ``ColBERTScores``.
    """

    @wraps(losses.Contrastive.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)


class CachedContrastive(_InBatch, losses.CachedContrastive):
    """pylate's CachedContrastive (GradCache), its scores by ``max_sim``.

    Raises:
        NotImplementedError: a ``score_metric`` other than a ``ColBERTScores``.
    """

    @wraps(losses.CachedContrastive.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)


class Distillation(Fused, losses.Distillation):
    """pylate's Distillation, the scores of each query's own documents by ``max_sim``.

    Raises:
        NotImplementedError: a ``score_metric`` other than ``colbert_kd_scores``.
    """

    @wraps(losses.Distillation.__init__)  # type: ignore[misc]
    def __init__(self, model: Any, score_metric: Any = colbert_kd_scores, *args: Any, **options: Any) -> None:
        if score_metric is not colbert_kd_scores:
            raise NotImplementedError(
                f"score_metric: got {score_metric!r}, which is not covered, expected colbert_kd_scores: use pylate's "
                "own class"
            )
        super().__init__(model, self._scores, *args, **options)

    def _scores(self, queries: Tensor, documents: Tensor, **masks: Any) -> Tensor:
        return fused_colbert_kd_scores(queries, documents, **masks, **self._options())


ORIGINALS = {getattr(losses, cls.__name__): cls for cls in (Contrastive, CachedContrastive, Distillation)}
__getattr__ = not_covered(__name__, losses)


def patch_pylate() -> Patch:
    """Makes ``pylate.losses`` hold the classes of this module.

    Call it before the losses are created. ``undo()`` of the ``Patch``, or leaving its ``with`` block, takes it back.
    """
    patch = Patch()
    patch.replace_everywhere("pylate", ORIGINALS)
    return patch
