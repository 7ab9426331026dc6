"""Rankings, target ranks and their measures, on every backend, against a stable sort of the whole matrix in float64."""

from __future__ import annotations

import re

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive import rank, recall_at_k, target_ranks, zero_shot
from fused_contrastive.core.order import ahead
from fused_contrastive.ops import ranking

# 1 row; 1 column; several blocks and a part; k beyond one block; k = N.
SHAPES = [(1, 1, 1), (50, 90, 10), (1, 300, 7), (90, 7, 7), (33, 200, 1), (20, 150, 150), (3, 260, 100)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(ranking, name, (16, 24))


def skip_unsupported(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend does not take float64")


def whole(m: int, n: int, dtype: torch.dtype = torch.float32, values: int = 4) -> tuple[Tensor, Tensor]:
    """Small integers: products are exact in every dtype, and many are equal."""
    draw = lambda rows: torch.randint(1 - values, values, (rows, 5)).to(dtype)  # noqa: E731
    return draw(m), draw(n)


def brute(scores: Tensor) -> tuple[Tensor, Tensor]:
    """All columns of each row by the definition: score descending, NaN last, ties by the smaller index."""
    order = [sorted(range(len(row)), key=lambda j: (row[j] != row[j], -row[j], j)) for row in scores.tolist()]
    indices = torch.tensor(order, device=scores.device)
    return scores.gather(1, indices), indices


def places(indices: Tensor, targets: Tensor) -> Tensor:
    return (indices == targets[:, None]).int().argmax(dim=1)


@pytest.mark.thinned("shape", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_with_ties(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    skip_unsupported(backend, dtype)
    m, n, k = shape
    queries, candidates = whole(m, n, dtype)
    scores, indices = rank(queries, candidates, k, backend=backend)
    expected, order = brute(queries.double() @ candidates.double().T)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), expected[:, :k], rtol=0, atol=0)
    assert torch.equal(indices, order[:, :k])


@pytest.mark.parametrize("shape", [(40, 40), (30, 100), (100, 30), (1, 80), (80, 1)], ids=str)
def test_target_ranks_with_ties(backend: str, shape: tuple[int, int]) -> None:
    m, n = shape
    queries, candidates = whole(m, n)
    order = brute(queries.double() @ candidates.double().T)[1]
    targets = torch.randint(n, (m,))
    assert torch.equal(target_ranks(queries, candidates, targets=targets, backend=backend), places(order, targets))
    if m == n:
        assert torch.equal(target_ranks(queries, candidates, backend=backend), places(order, torch.arange(m)))


@pytest.mark.parametrize("n", [33, 64, 70])
def test_the_best_is_found_wherever_it_stands(n: int, backend: str) -> None:
    """The best column is found in every place, the last one of a full or partial block included."""
    scores, indices = rank(torch.eye(n), torch.eye(n), 2, backend=backend)
    assert torch.equal(indices[:, 0], torch.arange(n))
    assert torch.equal(scores, torch.tensor([1.0, 0.0]).expand(n, 2))


def test_duplicates_go_by_index(backend: str) -> None:
    queries = torch.ones(20, 3)
    candidates = torch.ones(100, 3)
    _, indices = rank(queries, candidates, 30, backend=backend)
    assert torch.equal(indices, torch.arange(30).expand(20, 30))
    assert torch.equal(target_ranks(queries, candidates, targets=torch.arange(20), backend=backend), torch.arange(20))
    assert recall_at_k(candidates, candidates, (1, 5), backend=backend) == {1: 1 / 100, 5: 5 / 100}


def test_zeros_of_either_sign_are_equal(backend: str) -> None:
    queries, candidates = torch.ones(1, 1), torch.tensor([[0.0], [-0.0]] * 30)
    _, indices = rank(queries, candidates, 40, backend=backend)
    assert torch.equal(indices[0], torch.arange(40))


def test_nan_and_infinity(backend: str) -> None:
    queries, candidates = torch.ones(20, 1), torch.randint(-3, 4, (70, 1)).float()
    for value, every in ((torch.nan, 3), (-torch.inf, 7), (torch.inf, 11)):
        candidates[::every] = value
    order = brute(queries.double() @ candidates.double().T)[1]
    assert torch.equal(rank(queries, candidates, 70, backend=backend).indices, order)
    for k in (1, 30, 60):
        assert torch.equal(rank(queries, candidates, k, backend=backend).indices, order[:, :k])
    targets = torch.randint(70, (20,))
    assert torch.equal(target_ranks(queries, candidates, targets=targets, backend=backend), places(order, targets))
    nothing = torch.full((20, 1), torch.nan)
    assert torch.equal(rank(nothing, candidates, 50, backend=backend).indices[3], torch.arange(50))
    assert torch.equal(target_ranks(nothing, candidates, targets=targets, backend=backend), targets)


def test_ascending_and_descending_scores(backend: str) -> None:
    """With ascending scores every column enters the list of the k best; with descending scores only the first k do."""
    queries, candidates = torch.tensor([[1.0], [-1.0]]), torch.arange(200.0)[:, None]
    _, indices = rank(queries, candidates, 12, backend=backend)
    assert torch.equal(indices, torch.stack((torch.arange(199, 187, -1), torch.arange(12))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_features(backend: str, dtype: torch.dtype) -> None:
    """Scores agree to within rounding, and ranks to within the rounding of the scores."""
    queries, candidates = torch.randn(60, 64).to(dtype), torch.randn(130, 64).to(dtype)
    exact = queries.double() @ candidates.double().T
    scores, indices = rank(queries, candidates, 130, backend=backend)
    torch.testing.assert_close(scores.double(), exact.gather(1, indices), rtol=1e-5, atol=1e-5)
    assert (scores.diff(dim=1) <= 0).all()
    assert torch.equal(indices.sort(dim=1).values, torch.arange(130).expand(60, 130))
    own = exact.diagonal()[:, None]
    ranks = target_ranks(queries, candidates, targets=torch.arange(len(queries)), backend=backend)
    assert ((exact > own + 1e-4).sum(dim=1) <= ranks).all()
    assert (ranks <= (exact > own - 1e-4).sum(dim=1)).all()


def test_own_block_is_where_the_score_comes_from(backend: str) -> None:
    """x is y: each unit feature ranks itself first, whichever block computes its score."""
    x = F.normalize(torch.randn(100, 48), dim=1)
    assert (target_ranks(x, x, backend=backend) == 0).all()
    assert recall_at_k(x, x, (1,), backend=backend) == {1: 1.0}
    shuffled = torch.randperm(100)
    assert (target_ranks(x[shuffled], x, targets=shuffled, backend=backend) == 0).all()


def test_scale(backend: str) -> None:
    queries, candidates = whole(30, 70)
    plain = rank(queries, candidates, 9, backend=backend)
    for scale in (2.5, torch.tensor(2.5, requires_grad=True)):
        scaled = rank(queries.requires_grad_(), candidates, 9, scale=scale, backend=backend)
        assert torch.equal(scaled.indices, plain.indices)
        assert torch.equal(scaled.scores, 2.5 * plain.scores)
        assert not scaled.scores.requires_grad
    reversed_order = rank(queries, -candidates, 9, scale=-1.0, backend=backend)
    assert torch.equal(reversed_order.indices, plain.indices)


def test_strided_inputs(backend: str) -> None:
    queries, candidates = whole(40, 120)
    expected = rank(queries, candidates, 6, backend=backend)
    strided = rank(queries.T.contiguous().T, candidates.repeat_interleave(2, dim=0)[::2], 6, backend=backend)
    assert torch.equal(strided.indices, expected.indices)
    targets = torch.randint(120, (80,))[::2]
    ranks = target_ranks(queries.T.contiguous().T, candidates, targets=targets, backend=backend)
    assert torch.equal(ranks, target_ranks(queries, candidates, targets=targets.clone(), backend=backend))


def test_block_sizes_do_not_matter(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, candidates = whole(70, 110)
    results = []
    for block in ((1, 1), (7, 5), (64, 64), (1000, 1000)):
        for name in ("BLOCK", "GPU_BLOCK"):
            monkeypatch.setattr(ranking, name, block)
        indices = rank(queries[:8], candidates[:40], 20, backend=backend).indices
        results.append((indices, target_ranks(queries[:8], candidates[:40], targets=torch.arange(8), backend=backend)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_autocast_changes_nothing(backend: str) -> None:
    queries, candidates = torch.randn(20, 16), torch.randn(50, 16)
    expected = rank(queries, candidates, 5, backend=backend)
    with torch.autocast(queries.device.type, dtype=torch.bfloat16):
        assert torch.equal(rank(queries, candidates, 5, backend=backend).scores, expected.scores)


@pytest.mark.usefixtures("threads")
def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "BLOCK", (512, 512))  # enough for several threads
    queries, candidates = whole(1500, 1700)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(
            (
                rank(queries, candidates, 40).indices,
                target_ranks(queries, candidates, targets=torch.arange(len(queries))),
            )
        )
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_order_is_total() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, torch.nan, -torch.inf, torch.inf, torch.nan, 1.0])
    columns = torch.arange(len(values))
    matrix = ahead(values, columns, values[:, None], columns[:, None])  # [i, j]: j ahead of i
    assert torch.equal(matrix ^ matrix.T, ~torch.eye(len(values), dtype=torch.bool))
    assert matrix.sum(dim=1).sort().values.tolist() == list(range(len(values)))


@pytest.mark.thinned("dtype", "normalize prompts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prompts", [0, 3])
def test_zero_shot(backend: str, dtype: torch.dtype, normalize: bool, prompts: int) -> None:
    skip_unsupported(backend, dtype)
    images = torch.randn(30, 16).to(dtype)
    texts = (3 * torch.randn(50, prompts, 16) if prompts else torch.randn(50, 16)).to(dtype)
    a, b = images.double(), texts.double()
    if normalize:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    if prompts:
        b = b.mean(dim=1)
        b = F.normalize(b, dim=-1) if normalize else b
    logits = 20 * a @ b.T
    best = zero_shot(images, texts, k=5, scale=20.0, normalize=normalize, backend=backend)
    expected = logits.topk(5, dim=1)
    torch.testing.assert_close(best.scores.double(), expected.values, rtol=1e-4, atol=1e-4)
    assert (best.indices == expected.indices).float().mean() > 0.99
    shares = zero_shot(
        images, texts, k=50, scale=torch.tensor(20.0), normalize=normalize, probabilities=True, backend=backend
    )
    torch.testing.assert_close(
        shares.scores.double(), logits.softmax(1).gather(1, shares.indices), rtol=1e-3, atol=1e-5
    )
    rounding = 1e-5 + 2 * torch.finfo(torch.float32).eps * logits.abs().max().item()  # features may be unnormalised
    torch.testing.assert_close(shares.scores.sum(dim=1), torch.ones_like(shares.scores[:, 0]), rtol=0, atol=rounding)
    assert (shares.scores <= 1).all()


X, Y = torch.randn(4, 3), torch.randn(5, 3)
BAD = {
    "queries rank": (lambda: rank(X[0], Y, 1), ValueError, "queries: got shape (3,), expected 2 dimensions"),
    "D differs": (lambda: rank(X, Y[:, :2], 1), ValueError, "candidates: got D = 2, expected 3, the D of queries"),
    "dtypes differ": (lambda: rank(X, Y.half(), 1), TypeError, "candidates: got dtype torch.float16"),
    "k too large": (lambda: rank(X, Y, 6), ValueError, "k: got 6, expected an integer from 1 to 5 (N, the number of"),
    "k of 0": (lambda: rank(X, Y, 0), ValueError, "k: got 0, expected an integer from 1 to 5"),
    "k a float": (lambda: rank(X, Y, 2.0), TypeError, "k: got 2.0, expected an integer from 1 to 5"),
    "scale": (lambda: rank(X, Y, 1, scale="2"), TypeError, "scale: got str"),
    "backend": (lambda: rank(X, Y, 1, backend="gpu"), ValueError, "backend: got 'gpu'"),
    "classes rank": (
        lambda: zero_shot(X, torch.randn(2, 2, 2, 3)),
        ValueError,
        "class_text_features: got shape (2, 2, 2, 3), expected (C, D) or (C, P, D)",
    ),
    "no prompts": (
        lambda: zero_shot(X, torch.randn(2, 0, 3)),
        ValueError,
        "class_text_features: got shape (2, 0, 3), expected (C, D) or (C, P, D) with none of them 0",
    ),
    "classes a list": (lambda: zero_shot(X, [1.0]), TypeError, "class_text_features: got list"),
    "k of classes": (lambda: zero_shot(X, Y, k=6), ValueError, "k: got 6, expected an integer from 1 to 5"),
    "no scale": (lambda: zero_shot(X, Y, probabilities=True), ValueError, "scale: got None, expected the model's"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_memory_does_not_grow_with_the_matrix() -> None:
    """16384 x 16384: the scores would be 1 GB; a block is 16 MB."""
    code = """
import resource, torch
from fused_contrastive import rank, target_ranks
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def work(n):
    x = torch.randn(n, 16)
    rank(x, x, 10)
    target_ranks(x, x, targets=torch.randperm(n))
work(64)
before = peak()
work(16384)
print(peak() - before)
"""
    result = processes.run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100
