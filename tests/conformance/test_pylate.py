"""PyLate's losses: values and gradients against the library's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against import DTYPES, assert_same, features

pytest.importorskip("pylate", reason='pylate is not installed: make conformance OTHER="pylate==1.6.0"')

from pylate import losses, scores

from fused_contrastive.adapters import pylate as ours

BATCH, WAYS, D = 5, 3, 12


class Tokens(torch.nn.Module):
    """What the losses use of a ColBERT: token embeddings, the skiplist, and whether queries are expanded."""

    skiplist = (7,)

    def __init__(self, do_query_expansion: bool) -> None:
        super().__init__()
        self.do_query_expansion = do_query_expansion

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"token_embeddings": batch["token_embeddings"]}


class Projected(Tokens):
    """Embeddings that depend on parameters, as GradCache needs, which embeds twice."""

    def __init__(self, do_query_expansion: bool) -> None:
        super().__init__(do_query_expansion)
        self.linear = torch.nn.Linear(D, D)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"token_embeddings": self.linear(batch["token_embeddings"])}


def batches(*items: int) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Tokenized texts with padding and words of the skiplist, and their token embeddings."""
    found, leaves = [], {}
    for k, count in enumerate(items):
        length = 5 + k
        lengths = torch.randint(2, length + 1, (count, 1))
        ids = torch.randint(6, 9, (count, length))
        ids[:, 0] = 1  # a document without any token left is not tested here
        found.append({"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()})
        leaves[f"tokens{k}"] = features(count, length, D)
    return found, leaves


def call(loss: torch.nn.Module, inputs: list[dict[str, torch.Tensor]], labels: Any = None):  # type: ignore[no-untyped-def]
    def run(**leaves: torch.Tensor) -> torch.Tensor:
        sentences = [
            {**batch, "token_embeddings": tokens} for batch, tokens in zip(inputs, leaves.values(), strict=True)
        ]
        dtype = sentences[0]["token_embeddings"].dtype
        return loss(sentences, labels if labels is None else labels.to(dtype))

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expands", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"size_average": False}, {"score_mini_batch_size": 2}], ids=str
)
def test_contrastive(options: dict[str, Any], expands: bool, dtype: torch.dtype, backend: str) -> None:
    inputs, leaves = batches(BATCH, BATCH, BATCH)
    inputs[2], leaves["tokens2"] = inputs[1], features(*leaves["tokens1"].shape)  # stacked: as long as the positives
    found = []
    for module in (losses, ours):
        loss = module.Contrastive(Tokens(expands), **options)
        loss.backend = backend
        found.append(call(loss, inputs))
    assert_same(*found, {name: t.to(dtype) for name, t in leaves.items()}, 40.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expands", [False, True])
@pytest.mark.parametrize("options", [{}, {"size_average": False}, {"normalize_scores": False}], ids=str)
def test_distillation(options: dict[str, Any], expands: bool, dtype: torch.dtype, backend: str) -> None:
    inputs, leaves = batches(BATCH, BATCH * WAYS)
    labels, found = torch.rand(BATCH, WAYS), []
    for module in (losses, ours):
        loss = module.Distillation(Tokens(expands), **options)
        loss.backend = backend
        found.append(call(loss, inputs, labels))
    assert_same(*found, {name: t.to(dtype) for name, t in leaves.items()}, 40.0)


@pytest.mark.parametrize("expands", [False, True])
def test_cached_contrastive(expands: bool, backend: str) -> None:
    """The sizes of the mini-batches of embeddings and of scores do not divide the batch."""
    model, found = Projected(expands), []
    inputs, leaves = batches(BATCH, BATCH)
    sentences = [{**batch, "token_embeddings": t} for batch, t in zip(inputs, leaves.values(), strict=True)]
    for module in (losses, ours):
        loss = module.CachedContrastive(model, mini_batch_size=2, score_mini_batch_size=3, temperature=0.7)
        loss.backend = backend
        model.zero_grad()
        value = loss(sentences)
        value.backward()
        with torch.no_grad():
            torch.testing.assert_close(loss(sentences), value)
        found.append((value.detach(), model.linear.weight.grad.clone()))
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ColBERTScores", "colbert_kd_scores"])
def test_scores_with_masked_tokens(name: str, backend: str) -> None:
    """Masked tokens of a document score 0 in the library, and may be the maximum."""
    queries, documents = -features(4, 5, D).abs(), features(4, WAYS, 6, D).abs()
    masks = {"queries_mask": torch.rand(4, 5) < 0.7, "documents_mask": torch.rand(4, WAYS, 6) < 0.5}
    theirs = getattr(scores, name)
    theirs = theirs() if isinstance(theirs, type) else theirs
    mine = ours.fused_colbert_kd_scores if name == "colbert_kd_scores" else ours.fused_colbert_scores
    torch.testing.assert_close(mine(queries, documents, **masks, backend=backend), theirs(queries, documents, **masks))


@pytest.mark.parametrize("name", ["Contrastive", "CachedContrastive", "Distillation"])
def test_what_is_not_covered(name: str) -> None:
    with pytest.raises(NotImplementedError, match="score_metric: got"):
        getattr(ours, name)(Tokens(False), score_metric=lambda *_: None)


def test_patch() -> None:
    with ours.patch_pylate():
        assert losses.Distillation is ours.Distillation
    assert losses.Distillation is not ours.Distillation
