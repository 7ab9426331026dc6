"""pytorch-metric-learning's NTXentLoss, SupConLoss, the wrappers around them, and CrossBatchMemory."""

from __future__ import annotations

import pytest
import torch
from against import assert_same, features

library = pytest.importorskip("pytorch_metric_learning", reason="it is not installed: make conformance")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

from fused_contrastive.adapters import pytorch_metric_learning as ours  # noqa: E402

NAMES = ["NTXentLoss", "SupConLoss"]
DTYPES = [torch.float32, torch.float64]
LABELS = {
    "classes": torch.arange(24) % 5,
    "pairs": torch.arange(24) // 2,
    "some alone": torch.tensor([0, 0, 1, 2, 3, 3, 3, 4] + list(range(10, 26))),
    "negative and large": torch.tensor([-7, 1 << 40] * 12),
}


def pair(name: str, backend: str, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    theirs, adapted = getattr(losses, name)(**options), getattr(ours, name)(**options)
    adapted.backend = backend
    return theirs, adapted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", NAMES)
def test_labels(name: str, labels: str, dtype: torch.dtype, backend: str) -> None:
    theirs, adapted = pair(name, backend, temperature=0.1)
    leaves = {"embeddings": features(24, 8, dtype=dtype)}
    assert_same(
        lambda embeddings: theirs(embeddings, LABELS[labels]), lambda embeddings: adapted(embeddings, LABELS[labels]),
        leaves, 10.0,
    )  # fmt: skip


@pytest.mark.parametrize("pairs", [1, 7, 60])
@pytest.mark.parametrize("labels", LABELS)
def test_pairs_some_at_a_time(labels: str, pairs: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, also the temperature's, agree however many of a label's pairs are computed at once."""
    monkeypatch.setattr(ours, "PAIRS", pairs)
    theirs, adapted = pair("NTXentLoss", backend)

    def call(loss: torch.nn.Module, **reference: torch.Tensor):  # type: ignore[no-untyped-def]
        def run(x: torch.Tensor, temperature: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            loss.temperature = temperature
            return loss(x, LABELS[labels], ref_emb=y, **reference)

        return run

    leaves = {"x": features(24, 8, dtype=torch.float64), "temperature": torch.tensor([0.2], dtype=torch.float64)}
    assert_same(call(theirs), call(adapted), leaves, 5.0)
    leaves["y"] = features(30, 8, dtype=torch.float64)
    reference = {"ref_labels": LABELS[labels].repeat(2)[:30]}
    assert_same(call(theirs, **reference), call(adapted, **reference), leaves, 5.0)


def test_what_is_kept_does_not_grow_with_the_pairs(backend: str) -> None:
    """300 rows of 2 labels: 44,700 positive pairs, of which nothing is kept for the backward."""
    kept = []
    loss = ours.NTXentLoss()
    loss.backend, loss.memory_budget = backend, 0
    x = features(300, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss(x, torch.arange(300) % 2).backward()
    assert 0 < max(kept) <= 300 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_references(name: str, dtype: torch.dtype, backend: str) -> None:
    theirs, adapted = pair(name, backend, temperature=0.2, distance=distances.DotProductSimilarity())
    labels, ref_labels = torch.arange(12) % 5, torch.arange(30) % 4  # label 4 has no positive

    def call(loss: torch.nn.Module):  # type: ignore[no-untyped-def]
        return lambda x, y: loss(x, labels, ref_emb=y, ref_labels=ref_labels)

    leaves = {"x": features(12, 8, dtype=dtype), "y": features(30, 8, dtype=dtype)}
    assert_same(call(theirs), call(adapted), leaves, 10.0)


@pytest.mark.may_not_run
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0, 0], [0, 1], [0]], ids=str)
def test_nothing_to_compare(name: str, labels: list[int], backend: str) -> None:
    theirs, adapted = pair(name, backend)
    x = features(len(labels), 4).requires_grad_()
    a, b = (loss(x, torch.tensor(labels)) for loss in (theirs, adapted))
    torch.testing.assert_close(b, a)
    torch.testing.assert_close(torch.autograd.grad(b, x), torch.autograd.grad(a, x))


@pytest.mark.parametrize(
    "reducer",
    [
        reducers.DoNothingReducer(),
        reducers.ThresholdReducer(low=1.0),
        reducers.PerAnchorReducer(),
        reducers.ClassWeightedReducer(torch.rand(5)),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
@pytest.mark.parametrize("name", NAMES)
def test_reducers(name: str, reducer: torch.nn.Module, backend: str) -> None:
    theirs, adapted = pair(name, backend, reducer=reducer)
    x, labels = features(20, 8), torch.arange(20) % 5
    a, b = theirs(x, labels), adapted(x, labels)
    if isinstance(reducer, reducers.DoNothingReducer):
        (a,), (b,) = a.values(), b.values()
        for index_a, index_b in zip(a["indices"], b["indices"], strict=True):
            assert torch.equal(index_a, index_b)
        a, b = a["losses"], b["losses"]
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_regulariser_and_self_supervised(name: str, backend: str) -> None:
    theirs, adapted = pair(name, backend, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.3)
    x, labels = features(20, 8), torch.arange(20) % 5
    torch.testing.assert_close(adapted(x, labels), theirs(x, labels), rtol=1e-5, atol=1e-6)
    for symmetric in (True, False):
        a, b = (losses.SelfSupervisedLoss(loss, symmetric=symmetric) for loss in pair(name, backend))
        assert_same(a, b, {"embeddings": features(10, 8), "ref_emb": features(10, 8)}, 1 / 0.07)


@pytest.mark.parametrize("enqueue", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory(name: str, enqueue: bool, backend: str) -> None:
    """19 slots, 6 a step: the queue wraps, in the middle of a step's own slots too."""
    theirs, adapted = pair(name, backend)
    theirs = losses.CrossBatchMemory(theirs, 8, memory_size=19)
    adapted = ours.CrossBatchMemory(adapted, 8, memory_size=19)
    for _ in range(7):
        x, labels = features(6, 8).requires_grad_(), torch.randint(3, (6,))
        mask = torch.tensor([True, False] * 3) if enqueue else None
        a, b = theirs(x, labels, enqueue_mask=mask), adapted(x, labels, enqueue_mask=mask)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(b, x), torch.autograd.grad(a, x), rtol=1e-3, atol=1e-5)
        assert torch.equal(adapted.embedding_memory, theirs.embedding_memory)


@pytest.mark.parametrize("name", NAMES)
def test_references_of_the_same_labels_and_a_learned_temperature(name: str, backend: str) -> None:
    """Without ref_labels the labels hold for the references too, and the diagonal is left out."""
    theirs, adapted = pair(name, backend, distance=distances.DotProductSimilarity(normalize_embeddings=False))
    labels = torch.arange(12) % 5

    def call(loss: torch.nn.Module):  # type: ignore[no-untyped-def]
        def run(x: torch.Tensor, y: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
            loss.temperature = temperature
            return loss(x, labels, ref_emb=y)

        return run

    leaves = {"x": features(12, 8), "y": features(12, 8), "temperature": torch.tensor([0.5])}
    assert_same(call(theirs), call(adapted), leaves, 20.0)


def test_an_overridden_hook_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"Mine\._compute_loss: overridden"):

        class Mine(ours.NTXentLoss):
            def _compute_loss(self, *args: object) -> None: ...


def test_what_is_not_covered() -> None:
    x, labels = features(8, 4), torch.arange(8) % 2
    loss = ours.NTXentLoss()
    with pytest.raises(NotImplementedError, match=r"indices_tuple: got chosen .* miner, or from Dist.*efficient=False"):
        loss(x, labels, miners.MultiSimilarityMiner()(x, labels))
    with pytest.raises(NotImplementedError, match="distance: got LpDistance"):
        ours.SupConLoss(distance=distances.LpDistance())(x, labels)
    with pytest.raises(NotImplementedError, match="distance: got power = 2"):
        ours.SupConLoss(distance=distances.CosineSimilarity(power=2))(x, labels)
    assert torch.equal(
        *(m.CrossBatchMemory(losses.NTXentLoss(), 4)(x, labels) for m in (losses, ours))
    )  # the library's
    with pytest.raises(NotImplementedError, match="miner: got MultiSimilarityMiner"):
        ours.CrossBatchMemory(loss, 4, miner=miners.MultiSimilarityMiner())
    with pytest.raises(NotImplementedError, match="TripletMarginLoss: a class of pytorch_metric_learning"):
        ours.TripletMarginLoss  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_named_as_it_was_passed(name: str) -> None:
    x, labels = features(8, 4), torch.arange(8) % 2
    for reference, message in (
        (features(8, 6), "ref_emb: got D = 6, expected 4, the D of embeddings"),
        (x.double(), "ref_emb: got dtype torch.float64, expected torch.float32, the dtype of embeddings"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            getattr(ours, name)()(x, labels, ref_emb=reference, ref_labels=labels)


def test_patch() -> None:
    with ours.patch_pytorch_metric_learning():
        assert losses.NTXentLoss is ours.NTXentLoss
    assert losses.NTXentLoss is not ours.NTXentLoss
