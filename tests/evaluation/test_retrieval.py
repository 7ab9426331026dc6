"""Recall, median rank and target ranks where queries have one right answer or several, against the definition."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from fused_contrastive import median_rank, recall_at_k, target_ranks
from fused_contrastive.ops import ranking


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(ranking, name, (16, 24))


def integers(rows: int) -> Tensor:
    """Features whose products are exact, and often equal."""
    return torch.randint(-3, 4, (rows, 5)).float()


def best_places(scores: Tensor, answers: list[list[int]], exclude_self: bool = False) -> Tensor:
    """The best place of each query's answers, by definition: score descending, NaN last, ties by the smaller index."""
    found = []
    for i, row in enumerate(scores.tolist()):
        columns = [j for j in range(len(row)) if not (exclude_self and j == i)]
        order = sorted(columns, key=lambda j: (row[j] != row[j], -row[j], j))
        found.append(min(order.index(j) for j in answers[i] if j in order))
    return torch.tensor(found, device=scores.device)


def padded(answers: list[list[int]]) -> Tensor:
    """(M, P) answers, padded with -1 at random places."""
    width = 1 + max(map(len, answers))
    rows = [
        torch.tensor(row + [-1] * (width - len(row)))[torch.randperm(width, device="cpu").tolist()] for row in answers
    ]
    return torch.stack(rows)


def drawn(m: int, n: int, most: int) -> list[list[int]]:
    return [torch.randint(n, (int(torch.randint(1, most + 1, ())),)).tolist() for _ in range(m)]


@pytest.mark.parametrize(
    ("m", "n", "most", "exclude_self"),
    [(50, 50, 4, False), (50, 50, 4, True), (1, 1, 1, False), (70, 70, 40, False), (70, 70, 40, True)],
)
def test_the_best_of_several_answers_counts(backend: str, m: int, n: int, most: int, exclude_self: bool) -> None:
    queries, candidates = integers(m), integers(n)
    candidates[::11] = torch.nan
    answers = drawn(m, n, most)
    if exclude_self:
        answers = [[*row, (i + 1) % m] for i, row in enumerate(answers)]  # itself as an answer does not count
    found = target_ranks(queries, candidates, targets=padded(answers), exclude_self=exclude_self, backend=backend)
    assert torch.equal(found, best_places(queries @ candidates.T, answers, exclude_self))


@pytest.mark.parametrize(("m", "n", "most"), [(20, 100, 5), (100, 20, 3), (1, 90, 70)])
def test_more_queries_than_candidates_or_fewer(backend: str, m: int, n: int, most: int) -> None:
    queries, candidates, answers = integers(m), integers(n), drawn(m, n, most)
    found = target_ranks(queries, candidates, targets=padded(answers), backend=backend)
    assert torch.equal(found, best_places(queries @ candidates.T, answers))


def test_five_captions_an_image(backend: str) -> None:
    """The protocol of COCO and Flickr30K: an image is found by any of its captions, a caption by its image."""
    images, captions = torch.randn(20, 16), torch.randn(100, 16)
    of_image, image_of = torch.arange(100).view(20, 5), torch.arange(100) // 5
    captions += 0.3 * images[image_of]
    order = (images @ captions.T).argsort(dim=1, descending=True)
    hits = {k: (image_of[order[:, :k]] == torch.arange(20)[:, None]).any(dim=1).double().mean().item() for k in (1, 5)}
    assert 0 < hits[1] < hits[5]
    assert recall_at_k(images, captions, (1, 5), targets=of_image, backend=backend) == hits
    places = (captions @ images.T).argsort(dim=1, descending=True).eq(image_of[:, None]).int().argmax(dim=1)
    recall = {k: (places < k).double().mean().item() for k in (1, 5)}
    assert recall_at_k(captions, images, (1, 5), targets=image_of, backend=backend) == recall
    assert median_rank(captions, images, targets=image_of, backend=backend) == 1 + places.double().quantile(0.5).item()


def test_another_of_the_same_class(backend: str) -> None:
    """Recall at k as in metric learning, of a set against itself."""
    features, labels = torch.randn(40, 6), torch.arange(40) % 4
    same = [(labels == label).nonzero().flatten() for label in labels]
    scores = (features @ features.T).fill_diagonal_(-torch.inf)
    nearest = labels[scores.argmax(dim=1)]
    recall = recall_at_k(features, features, (1,), targets=torch.stack(same), exclude_self=True, backend=backend)
    assert recall == {1: (nearest == labels).double().mean().item()}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_of_any_integer_dtype(backend: str, dtype: torch.dtype) -> None:
    queries, candidates, targets = integers(30), integers(40), torch.randint(40, (30,))
    expected = target_ranks(queries, candidates, targets=targets, backend=backend)
    assert torch.equal(target_ranks(queries, candidates, targets=targets.to(dtype), backend=backend), expected)


def test_recall_and_median(backend: str) -> None:
    queries, candidates = integers(41), integers(90)
    targets = torch.randint(90, (41,))
    for rows in (41, 40):  # odd and even
        ranks = target_ranks(queries[:rows], candidates, targets=targets[:rows], backend=backend).double()
        recall = recall_at_k(queries[:rows], candidates, (1, 30, 500), targets=targets[:rows], backend=backend)
        assert recall == {k: (ranks < k).double().mean().item() for k in (1, 30, 500)}
        assert recall[500] == 1
        middle = median_rank(queries[:rows], candidates, targets=targets[:rows], backend=backend)
        assert middle == 1 + ranks.quantile(0.5).item()


X, Y = torch.randn(4, 3), torch.randn(5, 3)
BAD = {
    "more queries": (
        lambda: target_ranks(Y, X),
        ValueError,
        "targets: got None for 5 queries and 4 candidates, expected",
    ),
    "fewer queries": (
        lambda: recall_at_k(X, Y),
        ValueError,
        "targets: got None for 4 queries and 5 candidates, expected",
    ),
    "too large": (
        lambda: recall_at_k(X, Y, targets=torch.arange(4) + 2),
        ValueError,
        "targets: got values from 2 to 5, expected 0 to 4 (N - 1), or -1 for none",
    ),
    "too small": (
        lambda: recall_at_k(X, Y, targets=torch.full((4, 2), -100)),
        ValueError,
        "targets: got values from -100 to -100, expected 0 to 4",
    ),
    "none": (
        lambda: median_rank(X, Y, targets=torch.tensor([[1, -1], [-1, 0], [-1, -1], [2, 3]])),
        ValueError,
        "targets: got none for query 2, expected at least one for each",
    ),
    "none but itself": (
        lambda: median_rank(X, X, targets=torch.tensor([1, 2, 2, 0]), exclude_self=True),
        ValueError,
        "targets: got none for query 2 but itself, expected at least one for each",
    ),
    "dtype": (lambda: median_rank(X, Y, targets=torch.ones(4)), TypeError, "targets: got dtype torch.float32"),
    "a list": (
        lambda: median_rank(X, Y, targets=[0, 1, 2, 3]),
        TypeError,
        "targets: got list, expected an integer tensor",
    ),
    "3-D": (
        lambda: target_ranks(X, Y, targets=torch.zeros(4, 1, 1).long()),
        ValueError,
        "targets: got shape (4, 1, 1), expected an integer tensor of shape (4,) or (4, P)",
    ),
    "rows": (lambda: target_ranks(X, Y, targets=torch.arange(3)), ValueError, "targets: got shape (3,), expected an"),
    "no columns": (
        lambda: target_ranks(X, Y, targets=torch.zeros(4, 0).long()),
        ValueError,
        "targets: got shape (4, 0), expected an integer tensor",
    ),
    "itself by default": (
        lambda: recall_at_k(X, X, exclude_self=True),
        ValueError,
        "targets: got None with exclude_self=True, expected the candidates that belong to each query",
    ),
    "itself elsewhere": (
        lambda: recall_at_k(X, Y, targets=torch.arange(4), exclude_self=True),
        ValueError,
        "exclude_self: got True for 4 queries and 5 candidates, expected as many of both",
    ),
    "itself a number": (
        lambda: recall_at_k(X, X, targets=torch.arange(4), exclude_self=1),
        TypeError,
        "exclude_self: got 1, expected True or False",
    ),
    "ks a number": (lambda: recall_at_k(X, X, 5), TypeError, "ks: got 5, expected a sequence of integers"),
    "ks empty": (lambda: recall_at_k(X, X, ()), ValueError, "ks: got none"),
    "ks of 0": (lambda: recall_at_k(X, X, (1, 0)), ValueError, "ks[1]: got 0, expected an integer of at least 1"),
    "ks floats": (lambda: recall_at_k(X, X, (1.0,)), TypeError, "ks[0]: got 1.0, expected an integer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        call()
