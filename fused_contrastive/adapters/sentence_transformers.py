"""sentence-transformers' ranking losses with in-batch negatives (tested with 5.3.0 and 6.2.0)."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_contrastive.adapters.common import Fused, check_pair, importing, not_covered, scalar
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.adapters.sentence_transformers_gist import CachedGISTEmbedLoss, GISTEmbedLoss
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.distributed.batch import GlobalBatch
from fused_contrastive.losses.info_nce import info_nce_loss
from fused_contrastive.losses.terms import pair_logit
from fused_contrastive.ops.normalize import normalized
from fused_contrastive.ops.problem import autocast, log_add
from fused_contrastive.ops.row_loss import cross_entropy
from fused_contrastive.ops.stats import contrastive_stats, self_stats

with importing("sentence-transformers", tested="5.3.0 and 6.2.0", least="5.3"):
    from sentence_transformers import util

    if importlib.util.find_spec("sentence_transformers.sentence_transformer"):
        from sentence_transformers.sentence_transformer import losses
    else:  # older than 5.4, where this name became deprecated
        from sentence_transformers import losses


_OPTIONS = (
    "scale", "similarity_fct", "gather_across_devices", "directions", "partition_mode", "hardness_mode",
    "hardness_strength",
)  # fmt: skip


class MultipleNegativesRankingLoss(Fused, losses.MultipleNegativesRankingLoss):
    """sentence-transformers' MultipleNegativesRankingLoss without the matrices of scores.

    Constructor and call are the library's: directions, partition modes, hardness and ``gather_across_devices``
    included. The loss is float32 (float64 for float64 embeddings).

    Raises:
        NotImplementedError: a ``similarity_fct`` other than ``util.cos_sim`` and ``util.dot_score``.
    """

    @wraps(losses.MultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _check_similarity(self)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """[(B, D) queries, (B, D) positives, (B, D) hard negatives, ...] -> scalar."""
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        batch = _Batch(embeddings, self)
        pos, denominators = batch.query_to_doc()
        if "query_to_query" in self.directions:
            denominators["query_to_query"] = batch.query_to_query()
        if "doc_to_query" in self.directions:
            denominators["doc_to_query"] = batch.doc_to_query(denominators.get("doc_to_query"))
        else:
            denominators.pop("doc_to_query", None)
        if "doc_to_doc" in self.directions:
            denominators["doc_to_doc"] = batch.doc_to_doc()
        dtype = compute_dtype(embeddings[0].dtype)
        if self.partition_mode == "per_direction":
            return cross_entropy(pos, *denominators.values(), dtype=dtype, backend=self.backend)
        # The positive is in the denominator once for query_to_doc, and once more for doc_to_query.
        times = 2.0 if "doc_to_query" in self.directions else 1.0
        shift = pos.new_full((), times).log()
        rest = next(iter(denominators.values()))
        for denominator in list(denominators.values())[1:]:
            rest = log_add(rest, denominator)
        return cross_entropy(pos + shift, rest, dtype=dtype, backend=self.backend) + shift.to(dtype)


def _check_similarity(loss: Any) -> None:
    if loss.similarity_fct not in (util.cos_sim, util.dot_score):
        raise NotImplementedError(
            f"similarity_fct: got {loss.similarity_fct!r}, which is not covered, expected util.cos_sim or "
            "util.dot_score: use sentence_transformers' own class"
        )


class _Batch:
    """The four blocks of scores: this process's embeddings against its own, or against all that are gathered.

    Every block's denominator leaves out the positive, which the caller adds.
    """

    def __init__(self, embeddings: list[Tensor], loss: MultipleNegativesRankingLoss) -> None:
        _check_similarity(loss)  # again, because users may have assigned another one
        prepare = partial(normalized, backend=loss.backend) if loss.similarity_fct is util.cos_sim else _same
        for k, column in enumerate(embeddings):
            check_pair("embeddings[0]", embeddings[0], f"embeddings[{k}]", column)
        self.queries, *self.docs = (prepare(autocast(e)) for e in embeddings)  # (B, D) each
        self.documents = torch.cat(self.docs) if len(self.docs) > 1 else self.docs[0]  # all positives, then negatives
        count, gathers = len(self.queries), loss.gather_across_devices
        several = gathers and dist.is_available() and dist.is_initialized()
        rank = dist.get_rank() if several else 0
        first = rank * count  # the library assumes as many queries in every process
        self.query = torch.arange(first, first + count, device=self.queries.device)
        before = rank * len(self.documents)
        self.positives = torch.arange(before, before + count, device=self.queries.device)  # columns, rank by rank
        self.scale = scalar(loss.scale)
        self.strength = loss.hardness_strength if loss.hardness_mode else 0.0
        self.mode = loss.hardness_mode if self.strength else None
        self.both = "doc_to_query" in loss.directions
        several = several and dist.get_world_size() > 1
        group = GlobalBatch(exchange="gather", gradients="sum") if several else None
        self.options: dict[str, Any] = {
            "memory_budget": loss.memory_budget, "backend": loss.backend, "group": group,
        }  # fmt: skip

    def query_to_doc(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The positives' logits, and the denominators of this block and, if the same pass gives it, of doc_to_query."""
        x, y = self.queries, self.documents
        if self.mode is None or (self.mode == "hard_negatives" and len(self.docs) == 1):
            pos, row, col = contrastive_stats(
                x, y, self.scale, targets=self.positives, directions=("row", "col") if self.both else ("row",),
                **self.options,
            )  # fmt: skip
            assert row is not None
            found = {"query_to_doc": row}
            if col is not None:
                found["doc_to_query"] = col[: len(x)]
            return pos, found
        # Hardness adds strength * stop_gradient(cosine) to some negatives' logits, so these have a larger scale than
        # their gradients. The query's own documents have another scale than the others, and are computed separately.
        in_batch = self._of_other_queries(x, y, self.mode != "hard_negatives")
        pos = pair_logit(self.scale, x, self.docs[0]).to(in_batch.dtype)
        if len(self.docs) > 1:
            hard = torch.stack([pair_logit(self.scale, x, doc) for doc in self.docs[1:]])
            if self.mode != "in_batch_negatives":
                cosines = torch.stack([pair_logit(1.0, x, doc) for doc in self.docs[1:]])
                hard = hard + self.strength * cosines.detach()
            in_batch = log_add(in_batch, hard.to(in_batch.dtype).logsumexp(dim=0))
        return pos, {"query_to_doc": in_batch}

    def _of_other_queries(self, x: Tensor, y: Tensor, harder: bool) -> Tensor:
        """Denominator over the documents of other queries."""
        scale = self.scale
        if harder:  # logits are (scale + strength) * cosine; no gradient goes through the part with strength
            scale = scale + self.strength
            share = self.scale / scale
            share = share.detach() if isinstance(share, Tensor) else share
            x, y = (_scale_gradient(t, share) for t in (x, y))
        row: Tensor = contrastive_stats(
            x, y, scale, targets=self.positives, row_ids=self.query, col_ids=self.query.repeat(len(self.docs)),
            directions=("row",), **self.options,
        ).row  # fmt: skip
        return row

    def query_to_query(self) -> Tensor:
        return self_stats(self.queries, self.scale, **self.options)

    def doc_to_query(self, known: Tensor | None) -> Tensor:
        if known is not None:
            return known
        row: Tensor = contrastive_stats(self.docs[0], self.queries, self.scale, directions=("row",), **self.options).row
        return row

    def doc_to_doc(self) -> Tensor:
        if len(self.docs) == 1:
            return self_stats(self.documents, self.scale, **self.options)
        return self._of_other_queries(self.docs[0], self.documents, False)


def _same(x: Tensor) -> Tensor:
    return x


def _scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """Returns x, but multiplies its gradient by ``factor``."""
    return x.detach() + factor * (x - x.detach())


class MultipleNegativesSymmetricRankingLoss(losses.MultipleNegativesSymmetricRankingLoss, MultipleNegativesRankingLoss):
    """sentence-transformers' MultipleNegativesSymmetricRankingLoss: both directions, in one pass."""


class MatryoshkaLoss(losses.MatryoshkaLoss):
    """sentence-transformers' MatryoshkaLoss; around ``MultipleNegativesRankingLoss`` of this module, in one pass.

    One call then takes the products of all dimensions, if the loss has the directions "query_to_doc" and perhaps
    "doc_to_query" (with ``partition_mode="per_direction"``), no hardness, and does not gather across devices. Around
    any other loss, and for other options, it goes through the dimensions one after another, as in the library.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        loss = self.loss
        if not _takes_prefixes(loss):
            value: Tensor = super().forward(sentence_features, labels)
            return value
        embeddings = [autocast(loss.model(features)["sentence_embedding"]) for features in sentence_features]
        if len(embeddings) < 2:
            raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
        queries, positives, *negatives = embeddings
        weights = self._weights_of_step()
        return info_nce_loss(
            queries, positives, negatives=torch.cat(negatives) if negatives else None, logit_scale=scalar(loss.scale),
            symmetric="doc_to_query" in loss.directions, normalize=True, dims=tuple(weights),
            dim_weights=tuple(weights.values()), memory_budget=loss.memory_budget, backend=loss.backend,
        )  # fmt: skip

    def _weights_of_step(self) -> dict[int, float]:
        """The dimensions of a step, from the shortest on, drawn as in the library, and their weights."""
        places = range(len(self.matryoshka_dims))
        chosen = random.sample(places, self.n_dims_per_step) if 0 < self.n_dims_per_step < len(places) else places
        weights: dict[int, float] = {}
        for place in sorted(chosen, reverse=True):  # the library has the longest first
            dim = self.matryoshka_dims[place]
            weights[dim] = weights.get(dim, 0) + self.matryoshka_weights[place]
        return weights


def _takes_prefixes(loss: Any) -> bool:
    """Whether the loss is one that ``info_nce_loss`` computes for several prefixes at once."""
    if type(loss) not in (MultipleNegativesRankingLoss, MultipleNegativesSymmetricRankingLoss):
        return False
    _check_similarity(loss)
    directions = set(loss.directions)
    symmetric = directions == {"query_to_doc", "doc_to_query"} and loss.partition_mode == "per_direction"
    hard = loss.hardness_mode and loss.hardness_strength
    return (directions == {"query_to_doc"} or symmetric) and not hard and not loss.gather_across_devices


class CachedMultipleNegativesRankingLoss(Fused, losses.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' CachedMultipleNegativesRankingLoss (GradCache) without the matrices of scores.

    As in the library, embeddings are made mini-batch by mini-batch. The loss of the whole batch is one call, while the
    library's goes through ``mini_batch_size`` rows at a time.
    """

    @wraps(losses.CachedMultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss = MultipleNegativesRankingLoss(self.model, **{name: getattr(self, name) for name in _OPTIONS})

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The library's hook: the loss of each column's embeddings, which come mini-batch by mini-batch."""
        for name in ("backend", "memory_budget", *_OPTIONS):  # self.loss has copies, and users may assign new values
            setattr(self.loss, name, getattr(self, name))
        loss: Tensor = self.loss.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class CachedMultipleNegativesSymmetricRankingLoss(
    losses.CachedMultipleNegativesSymmetricRankingLoss, CachedMultipleNegativesRankingLoss
):
    """sentence-transformers' CachedMultipleNegativesSymmetricRankingLoss."""


_MULTI_VECTOR = (
    "MultiVectorMultipleNegativesRankingLoss", "CachedMultiVectorMultipleNegativesRankingLoss", "fused_colbert_scores",
)  # fmt: skip
_not_covered = not_covered(__name__, losses)


def __getattr__(name: str) -> Any:
    """Imports the names that only newer versions of the library have, when they are asked for."""
    if name in _MULTI_VECTOR:
        return getattr(importlib.import_module(f"{__name__}_multi_vector"), name)
    return _not_covered(name)


ORIGINALS = {
    getattr(losses, cls.__name__): cls
    for cls in (
        MultipleNegativesRankingLoss, MultipleNegativesSymmetricRankingLoss, CachedMultipleNegativesRankingLoss,
        CachedMultipleNegativesSymmetricRankingLoss, GISTEmbedLoss, CachedGISTEmbedLoss, MatryoshkaLoss,
    )
}  # fmt: skip


def patch_sentence_transformers() -> Patch:
    """Makes sentence_transformers hold the losses of this module.

    Call it before the losses are created. ``undo()`` of the ``Patch``, or leaving its ``with`` block, takes it back.
    """
    originals = ORIGINALS
    if importlib.util.find_spec("sentence_transformers.multi_vector_encoder"):
        originals = originals | importlib.import_module(f"{__name__}_multi_vector").ORIGINALS
    patch = Patch()
    patch.replace_everywhere("sentence_transformers", originals)
    return patch
