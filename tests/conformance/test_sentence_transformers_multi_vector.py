"""sentence-transformers' multi-vector losses, which only its newer versions have."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from against import assert_same, features

pytest.importorskip(
    "sentence_transformers.multi_vector_encoder", reason="no sentence_transformers that has it: make conformance"
)

from sentence_transformers.multi_vector_encoder import losses, scoring

from fused_contrastive.adapters import sentence_transformers as ours


class Tokens(torch.nn.Module):
    """What the loss uses of a MultiVectorEncoder: token embeddings and their mask."""

    def forward(self, batch: dict[str, torch.Tensor], task: str | None = None) -> dict[str, torch.Tensor]:
        return {"token_embeddings": batch["token_embeddings"], "attention_mask": batch["attention_mask"]}


SCORES = {
    "default": None,
    "colbert": scoring.colbert_scores,
    "mean": scoring.mean_colbert_scores,
    "partial": partial(scoring.colbert_scores, chunk_elements=1000, length_normalize=True),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("documents", [1, 2])
def test_multi_vector(documents: int, score: str, backend: str) -> None:
    masks = [torch.rand(6, 5 + k) < 0.8 for k in range(1 + documents)]
    for mask in masks:
        mask[:, 0] = True
    found = []
    leaves = {f"tokens{k}": features(6, 5 + k, 16) for k in range(1 + documents)}

    def call(loss: torch.nn.Module):  # type: ignore[no-untyped-def]
        return lambda **leaves: loss([
            {"token_embeddings": t, "attention_mask": m, "input_ids": m.long()}
            for t, m in zip(leaves.values(), masks, strict=True)
        ])  # fmt: skip

    for module in (losses, ours):
        loss = module.MultiVectorMultipleNegativesRankingLoss(Tokens(), scale=2.0, similarity_fct=SCORES[score])
        loss.backend = backend
        found.append(call(loss))
    assert_same(*found, leaves, 20.0)


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_document_without_tokens_scores_as_in_the_library(masked: bool, length_normalize: bool) -> None:
    queries, documents = features(3, 4, 8), features(2, 2, 5, 8)
    mask = torch.ones(2, 2, 5, dtype=torch.bool)
    mask[1, 0] = False
    lengths = torch.tensor([[2], [4], [0]])
    options = {
        "queries_mask": torch.arange(4) < lengths if masked else None,
        "documents_mask": mask,
        "length_normalize": length_normalize,
    }
    theirs = scoring.colbert_scores(queries, documents, **options)
    assert theirs.min() <= -1e8
    torch.testing.assert_close(ours.fused_colbert_scores(queries, documents, **options), theirs)


class Projected(torch.nn.Linear):
    """Tokens whose embeddings depend on parameters, as GradCache needs, which embeds them twice."""

    def forward(self, batch: dict[str, torch.Tensor], task: str | None = None) -> dict[str, torch.Tensor]:
        return {
            "token_embeddings": super().forward(batch["token_embeddings"]),
            "attention_mask": batch["attention_mask"],
        }


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("documents", [1, 2])
def test_cached_multi_vector(documents: int, score: str, backend: str) -> None:
    """The sizes of the mini-batches of embeddings and of scores do not divide the batch."""
    model, found = Projected(12, 8), []
    masks = [torch.rand(7, 5 + k) < 0.8 for k in range(1 + documents)]
    for mask in masks:
        mask[:, 0] = True
    inputs = [
        {"token_embeddings": features(7, 5 + k, 12), "attention_mask": mask, "input_ids": mask.long()}
        for k, mask in enumerate(masks)
    ]
    for module in (losses, ours):
        loss = module.CachedMultiVectorMultipleNegativesRankingLoss(
            model, scale=2.0, similarity_fct=SCORES[score], mini_batch_size=3, score_mini_batch_size=2
        )
        loss.backend = backend
        model.zero_grad()
        value = loss([dict(i) for i in inputs])
        value.backward()
        with torch.no_grad():
            torch.testing.assert_close(loss([dict(i) for i in inputs]), value)
        found.append((value.detach(), model.weight.grad.clone()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


def test_what_is_not_covered() -> None:
    with pytest.raises(NotImplementedError, match="similarity_fct: got"):
        ours.MultiVectorMultipleNegativesRankingLoss(Tokens(), similarity_fct=scoring.XTRScores())


def test_patch() -> None:
    with ours.patch_sentence_transformers():
        assert losses.MultiVectorMultipleNegativesRankingLoss is ours.MultiVectorMultipleNegativesRankingLoss
    assert losses.MultiVectorMultipleNegativesRankingLoss is not ours.MultiVectorMultipleNegativesRankingLoss
