"""Limits on logits: forward and backward leave out the same pairs, also where a logit is equal to its limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_contrastive as fc

SCALE = 3.0


def problem(seed: int, m: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y and limits that are logits of the problem, as the backend rounds them.

    Two more features leave the products as they are: they are (0, 1) in x and (1, 0) in y. The gradients there are the
    row sums and the column sums of the weights.
    """
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(m, d, generator=g), torch.randn(n, d, generator=g)
    x = torch.cat((x / d**0.5, torch.zeros(m, 1), torch.ones(m, 1)), dim=1).to(dtype)
    y = torch.cat((y / d**0.5, torch.ones(n, 1), torch.zeros(n, 1)), dim=1).to(dtype)
    return x, y, torch.randint(0, n, (m,), generator=g), torch.randint(0, m, (n,), generator=g)


def limits_on_logits(
    x: Tensor, y: Tensor, of_rows: Tensor, of_cols: Tensor, dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    logits = fc.contrastive_stats(x, y, SCALE, targets=of_rows, backend=backend).pos
    transposed = fc.contrastive_stats(y, x, SCALE, targets=of_cols, backend=backend).pos
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return {"row_limit": logits.to(compute), "col_limit": transposed.to(compute)}


def sums_of_weights(x: Tensor, y: Tensor, limits: dict[str, Tensor], backend: str, **options: object) -> list[Tensor]:
    """The sums of each row's and each column's weights, and the statistics."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    _, row, col = fc.contrastive_stats(x, y, SCALE, backend=backend, **limits, **options)
    (dx,) = torch.autograd.grad(torch.where(row.isfinite(), row, 0).sum(), x, retain_graph=True)
    (dy,) = torch.autograd.grad(torch.where(col.isfinite(), col, 0).sum(), y)
    return [dx[:, -2].double() / SCALE, dy[:, -1].double() / SCALE, row.detach(), col.detach()]


def assert_sums_are_one(seed: int, m: int, n: int, d: int, dtype: torch.dtype, backend: str, **options: object) -> None:
    x, y, of_rows, of_cols = problem(seed, m, n, d, dtype)
    limits = limits_on_logits(x, y, of_rows, of_cols, dtype, backend)
    by_row, by_col, row, col = sums_of_weights(x, y, limits, backend, targets=of_rows.roll(1), **options)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for sums, statistic in ((by_row, row), (by_col, col)):
        torch.testing.assert_close(sums, (statistic > -torch.inf).double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("part", range(4))
def test_no_pair_is_left_out_on_one_side_only(part: int, seed: int) -> None:
    """10,000 problems in all, so small that every weight counts."""
    for k in range(2500):
        one = seed + 2500 * part + k
        m = 1 + one % 13
        assert_sums_are_one(one, m, m + one % 7, 1 + one % 5, torch.float32, "cpp", memory_budget=one % 2 * 10**6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [0, 100_000, "auto"])
def test_over_many_tiles(dtype: torch.dtype, budget: int | str, seed: int) -> None:
    assert_sums_are_one(seed, 300, 700, 48, dtype, "cpp", memory_budget=budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [0, "auto"])
def test_both_directions_at_once_are_the_sum_of_each(dtype: torch.dtype, budget: int | str, seed: int) -> None:
    """One backward of rows and columns shares their exponential; a pair that one of them leaves out counts once."""
    x, y, of_rows, of_cols = problem(seed, 300, 700, 48, dtype)
    limits = limits_on_logits(x, y, of_rows, of_cols, dtype, "cpp")
    operands = (x.requires_grad_(), y.requires_grad_())
    _, row, col = fc.contrastive_stats(x, y, SCALE, backend="cpp", memory_budget=budget, **limits)
    sums = [torch.where(each.isfinite(), each, 0).sum() for each in (row, col)]
    of_row, of_col, of_both = (
        torch.autograd.grad(each, operands, retain_graph=True) for each in (*sums, sums[0] + sums[1])
    )
    for a, b, both in zip(of_row, of_col, of_both, strict=True):
        torch.testing.assert_close(both, a + b, rtol=1e-4, atol=1e-6)


def test_on_every_backend(backend: str, seed: int) -> None:
    for k in range(3):
        assert_sums_are_one(seed + k, 20, 40, 6, torch.float32, backend)


@pytest.mark.parametrize("budget", [0, 200_000, "auto"])
def test_any_number_of_threads_gives_the_same_bits(budget: int | str, seed: int) -> None:
    x, y, _, _ = problem(seed, 500, 600, 32, torch.float32)
    limits = {"row_limit": x[:, 0] * 0.5, "col_limit": y[:, 0] * 0.5}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sums_of_weights(x, y, limits, "cpp", memory_budget=budget))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("limits", "error", "text"),
    [
        (
            {"row_limit": torch.zeros(3)},
            ValueError,
            r"row_limit: got shape \(3,\), expected a floating tensor of shape",
        ),
        ({"col_limit": torch.zeros(4)}, ValueError, r"col_limit: got shape \(4,\)"),
        ({"row_limit": torch.zeros(4, dtype=torch.int64)}, TypeError, "row_limit: got dtype torch.int64"),
        (
            {"col_limit": torch.full((5,), torch.nan)},
            ValueError,
            "col_limit: got values from nan to nan, expected numbers",
        ),
        ({"row_limit": [0.0]}, TypeError, "row_limit: got list"),
        ({"row_limit": torch.zeros(4), "directions": ("col",)}, ValueError, "row_limit: got a tensor with directions="),
    ],
)
def test_bad_limits(limits: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        fc.contrastive_stats(torch.randn(4, 2), torch.randn(5, 2), **limits)


def test_limits_have_no_gradient_and_do_not_touch_the_bias(backend: str) -> None:
    """A pair whose product is at its limit counts, whatever its bias; one above it does not."""
    x, y = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [2.0]])
    limit = torch.ones(1, requires_grad=True)
    bias = torch.tensor([0.0, 5.0, -5.0], requires_grad=True)
    row = fc.contrastive_stats(x, y, 1.0, col_bias=bias, row_limit=limit, directions=("row",), backend=backend).row
    assert row.item() == pytest.approx(6.0)
    (gradient,) = torch.autograd.grad(row.sum(), bias)
    assert gradient.tolist() == pytest.approx([0.0, 1.0, 0.0])


@pytest.mark.parametrize("budget", [0, "auto"])
def test_a_guide_over_many_tiles(budget: int | str) -> None:
    """Several groups of columns, in value and gradient."""
    x, y = torch.randn(90, 6, requires_grad=True), torch.randn(2300, 6, requires_grad=True)
    guide, limit = (torch.randn(90, 4), torch.randn(2300, 4)), torch.randn(90)
    row = fc.contrastive_stats(
        x, y, 1.0, row_limit=limit, guide=guide, directions=("row",), memory_budget=budget, backend="cpp"
    ).row
    excluded = (guide[0] @ guide[1].T > limit[:, None]) | torch.eye(90, 2300, dtype=torch.bool)
    expected = (x.double() @ y.double().T).masked_fill(excluded, -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(row.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_guide_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="guide: got features without row_limit and col_limit"):
        fc.contrastive_stats(torch.randn(4, 2), torch.randn(5, 2), guide=(torch.randn(4, 2), torch.randn(5, 2)))
