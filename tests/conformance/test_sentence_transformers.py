"""sentence-transformers' ranking losses, over directions, partition modes, hardness and numbers of hard negatives."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from against import assert_same, features

pytest.importorskip("sentence_transformers", reason="sentence_transformers is not installed: make conformance")

from sentence_transformers import losses, util

from fused_contrastive.adapters import sentence_transformers as ours

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *c) for k in range(4) for c in itertools.combinations(OTHERS, k)]
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


class Model(torch.nn.Sequential):
    """What GradCache needs of a model: embeddings from features."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(12, 8))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": self[0](batch["input_ids"])}


def pair(name: str, backend: str, model: torch.nn.Module, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs, adapted = getattr(losses, name)(model, **options), getattr(ours, name)(model, **options)
    adapted.backend = backend
    return theirs, adapted


def columns(loss: torch.nn.Module):  # type: ignore[no-untyped-def]
    def run(scale: torch.Tensor | None = None, **leaves: torch.Tensor) -> torch.Tensor:
        if scale is not None:
            loss.scale = scale
        return loss.compute_loss_from_embeddings(list(leaves.values()), None)

    return run


@pytest.mark.may_not_run  # the library raises as well
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("hardness", HARDNESS, ids=str)
@pytest.mark.parametrize(
    "directions", DIRECTIONS, ids=lambda d: "+".join("".join(p[0] for p in x.split("_")) for x in d)
)
@pytest.mark.parametrize("mode", ["joint", "per_direction"])
def test_multiple_negatives(mode: str, directions: tuple, hardness: str | None, negatives: int, backend: str) -> None:
    if mode == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
        for cls in (losses.MultipleNegativesRankingLoss, ours.MultipleNegativesRankingLoss):
            with pytest.raises(ValueError, match="partition_mode"):
                cls(Model(), directions=directions, partition_mode=mode)
        return
    options = {"directions": directions, "partition_mode": mode, "hardness_mode": hardness, "hardness_strength": 4.0}
    theirs, adapted = pair("MultipleNegativesRankingLoss", backend, Model(), **options)
    for dtype in (torch.float32, torch.float64):
        leaves = {f"column{k}": features(9, 8, dtype=dtype) for k in range(2 + negatives)}
        if not set(directions) & {"query_to_query", "doc_to_doc"}:  # their masks make the library's own gradient NaN
            leaves["scale"] = torch.tensor([20.0], dtype=dtype)  # the scale may be learned
        assert_same(columns(theirs), columns(adapted), leaves, 24.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dot_score_and_symmetric(dtype: torch.dtype, backend: str) -> None:
    leaves = {f"column{k}": features(30, 8, dtype=dtype) for k in range(2)}
    options = {"scale": 3.0, "similarity_fct": util.dot_score}
    assert_same(*map(columns, pair("MultipleNegativesRankingLoss", backend, Model(), **options)), leaves, 6.0)
    assert_same(*map(columns, pair("MultipleNegativesSymmetricRankingLoss", backend, Model())), leaves, 20.0)


@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"])
@pytest.mark.parametrize("grad", [True, False])
def test_cached(name: str, grad: bool, backend: str) -> None:
    """The model's gradients, through GradCache's hook."""
    model, found = Model(), []
    inputs = [{"input_ids": torch.randn(10, 12)} for _ in range(2)]
    for loss in pair(name, backend, model, mini_batch_size=4):
        model.zero_grad()
        with torch.set_grad_enabled(grad):
            value = loss([dict(i) for i in inputs], torch.empty(0))
        if grad:
            value.backward()
        found.append((value.detach(), model[0].weight.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    if grad:
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


class Encoder(Model):
    """What MatryoshkaLoss needs of a model."""

    def get_embedding_dimension(self) -> int:
        return 8

    get_sentence_embedding_dimension = get_embedding_dimension  # its name before 5.4


MATRYOSHKA = {
    "plain": {},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "dot_score": {"similarity_fct": util.dot_score, "scale": 5.0},
    "joint": {"directions": ("query_to_doc", "doc_to_query")},  # this and the next by the library's loop
    "hardness": {"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
}


@pytest.mark.parametrize("options", MATRYOSHKA)
@pytest.mark.parametrize("per_step", [-1, 2])
def test_matryoshka(options: str, per_step: int, backend: str) -> None:
    model = Encoder()
    inputs = [{"input_ids": torch.randn(10, 12)} for _ in range(4)]
    dims, weights = [8, 2, 5, 5], [1.0, 0.5, 2.0, 0.25]
    found = []
    theirs, adapted = pair("MultipleNegativesRankingLoss", backend, model, **MATRYOSHKA[options])
    for cls, loss in ((losses.MatryoshkaLoss, theirs), (ours.MatryoshkaLoss, adapted)):
        model.zero_grad()
        random.seed(1)
        value = cls(model, loss, dims, weights, n_dims_per_step=per_step)([dict(i) for i in inputs], torch.empty(0))
        value.backward()
        found.append((value.detach(), model[0].weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_matryoshka_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Encoder()
    loss = ours.MatryoshkaLoss(model, ours.MultipleNegativesSymmetricRankingLoss(model), [8, 4])
    monkeypatch.setattr(losses.MatryoshkaLoss, "forward", None)
    assert loss([{"input_ids": torch.randn(6, 12)} for _ in range(2)], torch.empty(0)).isfinite()


def test_cached_options_reach_the_loss() -> None:
    loss = ours.CachedMultipleNegativesRankingLoss(
        Model(), scale=7.0, hardness_mode="all_negatives", hardness_strength=2
    )
    loss.scale = 8.0
    loss.calculate_loss([[features(4, 8)], [features(4, 8)]])
    assert isinstance(loss.loss, ours.MultipleNegativesRankingLoss)
    assert loss.loss.scale == 8.0
    assert loss.loss.hardness_strength == 2
    assert loss.get_config_dict()["scale"] == 8.0


def test_what_is_not_covered() -> None:
    with pytest.raises(NotImplementedError, match="similarity_fct: got"):
        ours.MultipleNegativesRankingLoss(Model(), similarity_fct=util.euclidean_sim)
    loss = ours.MultipleNegativesRankingLoss(Model())
    loss.similarity_fct = util.euclidean_sim
    with pytest.raises(NotImplementedError, match="similarity_fct: got"):
        loss.compute_loss_from_embeddings([features(3, 4), features(3, 4)], None)
    reason = "use sentence_transformers"
    with pytest.raises(
        NotImplementedError, match=f"MegaBatch.*: a class of sentence_transformers .* covered: {reason}"
    ):
        ours.MegaBatchMarginLoss  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Tensors'"):
        ours.Tensors  # noqa: B018


def test_what_does_not_fit_is_named_as_it_was_passed() -> None:
    loss, x = ours.MultipleNegativesRankingLoss(Model()), features(4, 8)
    for column, message in (
        (features(4, 6), r"embeddings\[2\]: got D = 6, expected 8, the D of embeddings\[0\]"),
        (x.double(), r"embeddings\[2\]: got dtype torch.float64, expected torch.float32"),
        (x[0], r"embeddings\[2\]: got shape \(8,\), expected 2 dimensions"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss.compute_loss_from_embeddings([x, x, column], None)


def test_patch() -> None:
    with ours.patch_sentence_transformers():
        assert losses.MultipleNegativesRankingLoss is ours.MultipleNegativesRankingLoss
    assert losses.MultipleNegativesRankingLoss is not ours.MultipleNegativesRankingLoss
