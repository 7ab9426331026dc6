"""contrastive_stats: cases worked out by hand, limits, layouts of memory, determinism."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_contrastive import clip_loss, contrastive_stats, nt_xent_loss
from fused_contrastive.backends import cpp

INF = torch.inf
NEEDS_CPP = pytest.mark.skipif(cpp.BACKEND.unavailable() is not None, reason="backend cpp cannot run here")


def one_hot_stats(logits: list[list[float]], backend: str, **options: object):
    """Statistics of a given matrix of logits: y is the identity, so x @ y.T is x."""
    x = torch.tensor(logits, dtype=torch.float32)
    return contrastive_stats(x, torch.eye(x.shape[1]), backend=backend, **options)


def lse(*values: float) -> float:
    return math.log(sum(math.exp(v) for v in values))


def test_by_hand(backend: str) -> None:
    pos, row, col = one_hot_stats([[1, 2, 3], [4, 5, 6]], backend)
    assert pos.tolist() == [1, 5]
    torch.testing.assert_close(row, torch.tensor([lse(2, 3), lse(4, 6)]).double())
    torch.testing.assert_close(col, torch.tensor([4, 2, lse(3, 6)]).double())


def test_targets_by_hand(backend: str) -> None:
    pos, row, col = one_hot_stats([[1, 2], [3, 4], [5, 6]], backend, targets=torch.tensor([1, 0, 1]))
    assert pos.tolist() == [2, 3, 6]
    assert row.tolist() == [1, 4, 5]
    torch.testing.assert_close(col, torch.tensor([lse(1, 5), 4]).double())


def test_ids_by_hand(backend: str) -> None:
    """Row 0 and column 2 have equal ids; the positive is excluded whatever its ids; ids may be large or negative."""
    ids = {"row_ids": torch.tensor([-(2**62), 7]), "col_ids": torch.tensor([1, 7, -(2**62)])}
    pos, row, col = one_hot_stats([[1, 2, 3], [4, 5, 6]], backend, **ids)
    assert pos.tolist() == [1, 5]
    torch.testing.assert_close(row, torch.tensor([2, lse(4, 6)]).double())
    assert col.tolist() == [4, 2, 6]


def test_ids_that_no_column_has_exclude_nothing(backend: str) -> None:
    ids = {"row_ids": torch.tensor([9, -9]), "col_ids": torch.tensor([5, 6, 1])}
    _, row, col = one_hot_stats([[1, 2, 3], [4, 5, 6]], backend, **ids)
    torch.testing.assert_close(row, torch.tensor([lse(2, 3), lse(4, 6)]).double())
    torch.testing.assert_close(col, torch.tensor([4, 2, lse(3, 6)]).double())


def test_exclude_self_by_hand(backend: str) -> None:
    pos, row, col = one_hot_stats(
        [[1, 2, 3], [4, 5, 6], [7, 8, 9]], backend, targets=torch.tensor([1, 2, 0]), exclude_self=True
    )
    assert pos.tolist() == [2, 6, 7]
    assert row.tolist() == [3, 4, 8]
    assert col.tolist() == [4, 8, 3]


def test_scale_and_bias_by_hand(backend: str) -> None:
    pos, row, _ = one_hot_stats([[1, 2, 3]], backend, scale=2.0, col_bias=torch.tensor([10, -INF, 20.0]))
    assert pos.tolist() == [12]
    assert row.tolist() == [26]


def test_only_asked_directions(backend: str) -> None:
    x, y = torch.randn(5, 4), torch.randn(6, 4)
    both = contrastive_stats(x, y, backend=backend)
    rows = contrastive_stats(x, y, backend=backend, directions=["row"])
    cols = contrastive_stats(x, y, backend=backend, directions=("col",))
    assert rows.col is None
    assert cols.row is None
    assert torch.equal(rows.row, both.row)
    assert torch.equal(cols.col, both.col)


@pytest.mark.parametrize("budget", ["auto", 0])
def test_nothing_left_in_a_row(backend: str, budget: object) -> None:
    """Ids exclude all pairs, or all other columns are empty: row is -inf, softplus 0, gradients are 0 and not NaN."""
    for options in (
        {"row_ids": torch.zeros(3, dtype=torch.long), "col_ids": torch.zeros(3, dtype=torch.long)},
        {"col_bias": torch.tensor([0.0, -INF, -INF]), "targets": torch.zeros(3, dtype=torch.long)},
    ):
        x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        scale = torch.tensor(3.0, requires_grad=True)
        pos, row, _col = contrastive_stats(x, y, scale, backend=backend, memory_budget=budget, **options)
        assert row.tolist() == [-INF] * 3
        loss = -F.logsigmoid(pos - row).sum()
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, (x, y, scale)):
            assert not gradient.any()


def test_single_pair(backend: str) -> None:
    x = torch.randn(1, 4, requires_grad=True)
    loss = clip_loss(x, torch.randn(1, 4), 10.0, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def test_empty_slots_get_no_gradient(backend: str) -> None:
    """A queue whose last slots are empty gives the results of a queue without them."""
    x, y = torch.randn(3, 8), torch.randn(7, 8, requires_grad=True)
    bias = torch.zeros(7).index_fill(0, torch.tensor([5, 6]), -INF).requires_grad_()
    stats = contrastive_stats(x, y, 5.0, col_bias=bias, backend=backend, directions=["row"])
    dy, dbias = torch.autograd.grad((stats.row - stats.pos).sum(), (y, bias))
    assert torch.equal(stats.row, contrastive_stats(x, y[:5], 5.0, backend=backend, directions=["row"]).row)
    assert not dy[5:].any()
    assert not dbias[5:].any()
    assert dy[:5].all()


@pytest.mark.parametrize("value", [torch.nan, INF, -INF])
def test_nan_and_inf_propagate(value: float, backend: str) -> None:
    x, y = torch.randn(40, 8), torch.randn(40, 8)
    x[17, 3] = value
    logits = 5 * x @ y.T
    labels = torch.arange(40)
    eager = sum(F.cross_entropy(s, labels) for s in (logits, logits.T)) / 2
    ours = clip_loss(x.requires_grad_(), y, 5.0, backend=backend)
    ours.backward()
    assert not eager.isfinite()
    assert not ours.isfinite()
    assert x.grad.isnan().any()


def test_infinite_positive_is_nan(backend: str) -> None:
    """softmax at +inf is undefined even where every other logit is finite."""
    x = torch.tensor([[1.0, 0.0], [0.0, INF]])
    assert clip_loss(x, torch.eye(2), 1.0, backend=backend).isnan()


@pytest.mark.parametrize("budget", [0, 3 * 40 * 4, 17 * 40 * 4, "auto"])
def test_any_memory_budget_gives_the_same(budget: object, backend: str) -> None:
    x, y = torch.randn(33, 8), torch.randn(40, 8)
    results = []
    for memory in (10**9, budget):
        leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(7.0))]
        stats = contrastive_stats(*leaves, memory_budget=memory, backend=backend)
        (stats.row.sum() + stats.col.sum() - stats.pos.sum()).backward()
        results.append([*stats, *(leaf.grad for leaf in leaves)])
    # A block of another shape may round a product differently: by 1e-5 for a logit of 100, and so every weight.
    for kept, other in zip(*results, strict=True):
        torch.testing.assert_close(kept, other, rtol=2e-4, atol=2e-4)


def test_a_scale_s_gradient_past_float32_is_inf(backend: str) -> None:
    """The terms of two rows, 2.9e38 each, fit float32 and their sum does not: it is inf, and no conversion raises."""
    x = 1.7e19 * torch.eye(2)
    scale = torch.tensor(1e-40, requires_grad=True)
    contrastive_stats(x, x, scale, backend=backend).pos.sum().backward()
    assert scale.grad == torch.inf


def test_large_losses_alive_at_once(backend: str) -> None:
    """Each loss has several blocks in both directions, and keeps megabytes of products that the next one reuses."""
    n = 3001 if backend != "triton" or torch.cuda.is_available() else 201  # the interpreter's blocks are smaller
    problems = [[torch.randn(n, 8).requires_grad_() for _ in range(2)] for _ in range(3)]
    losses = [clip_loss(x, y, 3.0, backend=backend) for x, y in problems[:2]]
    losses.pop(0).backward()
    losses.append(clip_loss(*problems[2], 3.0, backend=backend))
    for loss in losses:
        loss.backward()
    for x, y in problems:
        leaves = [t.detach().double().requires_grad_() for t in (x, y)]
        logits = 3.0 * leaves[0] @ leaves[1].T
        labels = torch.arange(n)
        ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
        for ours, exact in zip((x, y), leaves, strict=True):
            torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=3e-5 / n)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n"), [(2100, 40), (4096, 40), (2100, 2060), (2060, 2300)])
def test_gradients_of_megabytes_are_rounded_whole(m: int, n: int, dtype: torch.dtype) -> None:
    """Gradients are summed in float32, then rounded. One alone frees its float32 memory in parts, two share it."""
    x, y = (F.normalize(torch.randn(rows, 512), dim=1).to(dtype) for rows in (m, n))
    targets, weights = torch.randint(n, (m,)), torch.rand(m, dtype=torch.float64) + 0.5
    found = []
    for on, at in (("cpp", dtype), ("reference", torch.float64)):
        leaves = [t.to(at).requires_grad_() for t in (x, y)]
        stats = contrastive_stats(*leaves, 5.0, targets=targets, directions=["row"], backend=on)
        found.append(torch.autograd.grad((weights * (stats.row - stats.pos)).sum(), leaves))
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 * exact.abs().max())
        assert ours.untyped_storage().nbytes() == ours.nbytes
    first, second = found[0]
    expected = second.clone()
    first.fill_(1.0)  # it has its own memory: the other one stays when it is freed
    found.clear()
    del first
    torch.empty(8 << 20, dtype=torch.uint8).fill_(255)
    assert torch.equal(second, expected)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("targets", [None, "some"])
@pytest.mark.parametrize("asked", [("x", "y", "scale"), ("y", "scale"), ("x", "scale"), ("y",)], ids=str)
def test_rounded_gradients_of_many_columns(asked: tuple[str, ...], targets: str | None, dtype: torch.dtype) -> None:
    """dy is summed in float32 for a group of columns at a time, and rounded before the next group is summed."""
    m, n = 150, 2100
    x, y = (F.normalize(torch.randn(rows, 16), dim=1).to(dtype) for rows in (m, n))
    options = {} if targets is None else {"targets": torch.randint(n, (m,))}
    weights = torch.rand(m, dtype=torch.float64) + 0.5, torch.rand(n, dtype=torch.float64) + 0.5
    found = []
    for on, at in (("cpp", dtype), ("reference", torch.float64)):
        leaves = {"x": x.to(at), "y": y.to(at), "scale": torch.tensor(5.0, dtype=torch.float64)}
        inputs = [leaves[name].requires_grad_() for name in asked]
        pos, row, col = contrastive_stats(leaves["x"], leaves["y"], leaves["scale"], backend=on, **options)
        found.append(torch.autograd.grad((weights[0] * (row - pos)).sum() + (weights[1] * col).sum(), inputs))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 * exact.abs().max())


@NEEDS_CPP
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("loss", [clip_loss, nt_xent_loss])
def test_kept_products_on_another_number_of_threads(loss: Callable[..., torch.Tensor]) -> None:
    """More threads take larger sections of rows: the backward must still find what the forward has kept."""
    gradients = []
    x, y = (torch.randn(1100, 4) for _ in range(2))
    for budget in (1 << 40, 0):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        torch.set_num_threads(2)
        value = loss(*leaves, 0.5, memory_budget=budget, backend="cpp")
        torch.set_num_threads(9)
        gradients.append(torch.autograd.grad(value, leaves))
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=1e-8)


@NEEDS_CPP
def test_kept_products_of_problems_that_grow_and_shrink() -> None:
    """The memory that one problem frees is too small for the second, far too large for the next, and fits the last."""
    for n, megabytes in ((3001, 20), (4201, 50), (2950, 3), (1800, 1.5), (2950, 30), (3001, 25)):
        x, y = (torch.randn(n, 4) for _ in range(2))
        gradients = []
        for budget in (int(megabytes * 2**20), 0):
            leaves = [t.clone().requires_grad_() for t in (x, y)]
            clip_loss(*leaves, 3.0, memory_budget=budget, backend="cpp").backward()
            gradients.append([t.grad for t in leaves])
        for kept, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=1e-5 / n)


@pytest.mark.parametrize("n", [37, 70, 139])
def test_normalisers_of_float32_features_are_not_rounded(n: int, backend: str) -> None:
    """All logits are 1000, so row is 1000 + log(n - 1): rounded to float32, every weight would be off by up to 3e-5."""
    m = 20
    x, y = torch.ones(m, 1), torch.ones(n, 1)
    bias = torch.zeros(n, requires_grad=True)
    _, row, col = contrastive_stats(x, y, 1000.0, col_bias=bias, backend=backend)
    (of_rows,) = torch.autograd.grad(row.sum(), bias, retain_graph=True)
    (of_cols,) = torch.autograd.grad(col.sum(), bias)
    own = torch.arange(n) < m  # columns that are a row's positive
    expected = torch.where(own, m - 1, m) / (n - 1)
    torch.testing.assert_close(of_rows, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(of_cols, torch.ones(n), rtol=2e-6, atol=0)


def test_small_weights_of_float16_features_do_not_vanish(backend: str) -> None:
    """One row's gradient is a millionth of another's, as in a batch of a million: rounded to float16 it would be 0."""
    x, y = (torch.nn.functional.normalize(torch.randn(n, 4), dim=1).half() for n in (2, 64))
    g = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    gradients = []
    for features, used in ((x.clone(), backend), (x.double(), "reference")):
        features.requires_grad_()
        stats = contrastive_stats(features, y.to(features), 100.0, directions=["row"], backend=used)
        gradients.append(torch.autograd.grad((stats.row * g).sum(), features)[0].double())
    error = (gradients[0] - gradients[1]).abs().amax(1)
    eps, smallest = torch.finfo(torch.float16).eps, 2**-24
    assert (error <= 8 * eps * 100 * g + smallest).all(), error / (eps * 100 * g)  # the error budget, row by row


@pytest.mark.parametrize("logit", [30.0, 200.0])  # 200: float32 cannot hold both
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_far_below_their_neighbours(dtype: torch.dtype, kept: bool, logit: float, backend: str) -> None:
    """One row's logits are far below the other's, and the exponentials of both are relative to one maximum."""
    m, n = 2, 50
    x, y = torch.tensor([[1.0], [0.0]], dtype=dtype), torch.ones(n, 1, dtype=dtype)
    bias = torch.zeros(n, requires_grad=True)
    stats = contrastive_stats(
        x, y, logit, col_bias=bias, directions=["row"], memory_budget=10**9 if kept else 0, backend=backend
    )  # fmt: skip
    (found,) = torch.autograd.grad(stats.row.sum(), bias)
    expected = torch.where(torch.arange(n) < m, m - 1, m) / (n - 1)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    padded = torch.full((t.shape[0] * 2, t.shape[1] + 5), torch.nan)
    padded[::2, 2:-3] = t
    return {"transposed": t.T.contiguous().T, "strided view with an offset": padded[::2, 2:-3]}


def test_layouts(backend: str) -> None:
    x, y = torch.randn(9, 6), torch.randn(9, 6)
    expected = clip_loss(x, y, 3.0, backend=backend)
    for name, view in layouts(x).items():
        torch.testing.assert_close(clip_loss(view, y, 3.0, backend=backend), expected, msg=name)
        torch.testing.assert_close(clip_loss(y, view, 3.0, backend=backend), expected, msg=name)
    row = torch.randn(1, 6).expand(9, 6)  # zero stride
    torch.testing.assert_close(clip_loss(row, y, 3.0, backend=backend), clip_loss(row.clone(), y, 3.0, backend=backend))


def test_strided_vectors(backend: str) -> None:
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    vectors = {
        "targets": torch.randperm(5),
        "col_bias": torch.randn(5),
        "row_ids": torch.arange(5),
        "col_ids": torch.arange(5) // 2,
    }
    strided = {name: torch.stack((v, torch.zeros_like(v)), dim=1)[:, 0] for name, v in vectors.items()}
    expected = contrastive_stats(x, y, backend=backend, **vectors)
    for a, b in zip(contrastive_stats(x, y, backend=backend, **strided), expected, strict=True):
        assert torch.equal(a, b)


def test_same_call_same_bits(backend: str) -> None:
    m, n = (1500, 1700) if backend != "triton" or torch.cuda.is_available() else (70, 170)
    x, y = torch.randn(m, 24), torch.randn(n, 24)

    def run() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(9.0))]
        stats = contrastive_stats(*leaves, backend=backend, memory_budget=2 * m // 3 * n * 4)
        (stats.row.sum() + stats.col.sum() - 2 * stats.pos.sum()).backward()
        return [*stats, *(leaf.grad for leaf in leaves)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.usefixtures("threads")
def test_statistics_do_not_depend_on_threads() -> None:
    """Partial sums are merged in a fixed order. With D = 1 products are exact, so that no GEMM rounds them."""
    x, y = torch.randint(-3, 4, (700, 1)).float(), torch.randint(-3, 4, (900, 1)).float()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(contrastive_stats(x, y, 0.25, backend="cpp"))
    for stats in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(stats, found[0], strict=True))


@pytest.mark.parametrize("memory_budget", ["auto", 0])  # gradients formed in the forward, and in the backward
def test_only_needed_gradients(memory_budget: Any, backend: str) -> None:
    x, y, scale = torch.randn(6, 4), torch.randn(6, 4), torch.tensor(2.0)
    full = [t.clone().requires_grad_() for t in (x, y, scale)]
    options = {"memory_budget": memory_budget, "backend": backend}
    expected = torch.autograd.grad(clip_loss(*full, **options), full)
    for i in range(3):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, y, scale))]
        (gradient,) = torch.autograd.grad(clip_loss(*some, **options), some[i])
        torch.testing.assert_close(gradient, expected[i])


@pytest.mark.parametrize("memory_budget", ["auto", 0])
def test_scale_zero_has_a_gradient(memory_budget: Any, backend: str) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    scale = torch.tensor(0.0, requires_grad=True)
    clip_loss(x, y, scale, memory_budget=memory_budget, backend=backend).backward()
    expected = (x @ y.T).mean() - (x * y).sum(dim=1).mean()  # uniform softmax
    torch.testing.assert_close(scale.grad, expected)


def test_negative_scale(backend: str) -> None:
    x, y = torch.randn(9, 4), torch.randn(9, 4)
    torch.testing.assert_close(clip_loss(x, y, -3.0, backend=backend), clip_loss(-x, y, 3.0, backend=backend))
