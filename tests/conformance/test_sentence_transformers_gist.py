"""sentence-transformers' losses with a guide model, over margins, blocks and numbers of negatives."""

from __future__ import annotations

import pytest
import torch
from against import assert_same, features

pytest.importorskip("sentence_transformers", reason="sentence_transformers is not installed: make conformance")

from sentence_transformers import losses
from transformers import PreTrainedTokenizerBase

from fused_contrastive.adapters import sentence_transformers as ours


class Tokenizer(PreTrainedTokenizerBase):
    """Its tokens are numbers; ``shift`` makes vocabularies differ."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def get_vocab(self) -> dict[str, int]:
        return {str(k + self.shift): k for k in range(12)}

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool = False) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in ids]


class Model(torch.nn.Sequential):
    """What the losses need of a model: embeddings from tokens, and a tokenizer."""

    max_seq_length = 8
    device = torch.device("cpu")

    def __init__(self, d: int, shift: int = 0) -> None:
        super().__init__(torch.nn.EmbeddingBag(12, d))
        self.tokenizer = Tokenizer(shift)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch["sentence_embedding"] = self[0](batch["input_ids"])
        return batch

    def preprocess(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()] for text in texts])}

    tokenize = preprocess

    def get_embedding_dimension(self) -> int:
        return self[0].embedding_dim

    get_sentence_embedding_dimension = get_embedding_dimension  # its name in 5.3


MARGINS = [("absolute", 0.0), ("absolute", -0.2), ("absolute", -3.0), ("relative", 0.1), ("relative", -0.3)]


@pytest.mark.parametrize(("strategy", "margin"), MARGINS)
@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize("positives", [True, False])
@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("retokenize", [False, True])
def test_gist(
    strategy: str, margin: float, anchors: bool, positives: bool, negatives: int, retokenize: bool, backend: str
) -> None:
    """The loss and the model's gradient, in float64, where no similarity is near its limit by rounding alone."""
    model, guide = Model(8).double(), Model(5, int(retokenize)).double()
    batch = [{"input_ids": torch.randint(12, (13, 6))} for _ in range(2 + negatives)]
    options = {
        "temperature": 0.1, "margin_strategy": strategy, "margin": margin, "contrast_anchors": anchors,
        "contrast_positives": positives,
    }  # fmt: skip
    for name, more in (("GISTEmbedLoss", {}), ("CachedGISTEmbedLoss", {"mini_batch_size": 4})):
        found = []
        for module in (losses, ours):
            loss = getattr(module, name)(model, guide, **options, **more)
            loss.backend = backend
            model.zero_grad()
            value = loss([dict(column) for column in batch], torch.empty(0))
            value.backward()
            found.append((value.detach(), model[0].weight.grad))
        torch.testing.assert_close(found[1][0], found[0][0], check_dtype=False)
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings(dtype: torch.dtype, backend: str) -> None:
    """Three negatives, as only the cached loss takes; the guide's similarities are far from their limits."""
    guides = [torch.eye(9)[torch.arange(9) // size].to(dtype) for size in (1, 1, 2, 3, 1)]
    theirs, adapted = (
        module.CachedGISTEmbedLoss(Model(8), Model(5), margin=-0.1, mini_batch_size=16, temperature=0.1)
        for module in (losses, ours)
    )
    adapted.backend = backend

    def columns(loss):  # type: ignore[no-untyped-def]
        return lambda **leaves: loss.calculate_loss([[t] for t in leaves.values()], [[g] for g in guides])

    leaves = {f"column{k}": features(9, 8, dtype=dtype) for k in range(5)}
    assert_same(columns(theirs), columns(adapted), leaves, 10.0)


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_matryoshka_around_it(name: str) -> None:
    model, guide, found = Model(8), Model(5), []
    batch = [{"input_ids": torch.randint(12, (9, 6))} for _ in range(2)]
    for module in (losses, ours):
        loss = losses.MatryoshkaLoss(model, getattr(module, name)(model, guide, temperature=0.1, margin=0.01), [8, 4])
        model.zero_grad()
        value = loss([dict(column) for column in batch], torch.empty(0))
        value.backward()
        found.append((value.detach(), model[0].weight.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)
