"""Logits whose rows and columns lie near each other, or so far apart that one reference cannot serve all of a tile.

x is the matrix of logits itself and y the identity: the products are exact, and x's gradient is that of the logits.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_contrastive import contrastive_stats

# Either size is several tiles in each direction: N in C++ and on a GPU, INTERPRETED_N in Triton's interpreter.
N, INTERPRETED_N = 300, 130


def size_for(backend: str) -> int:
    return INTERPRETED_N if backend == "triton" and not torch.cuda.is_available() else N


OFFSETS = {
    "near": lambda i, j: 0.0,
    "near, all large": lambda i, j: 9000.0,
    "near, all small": lambda i, j: -9000.0,
    "near, at a million": lambda i, j: 1e6,  # n ln 2 is inexact (shared_exp.inl)
    "near, at ten million": lambda i, j: 1e7,  # so is n
    "near, at minus ten million": lambda i, j: -1e7,
    "rows drift a little": lambda i, j: -0.12 * i,
    "columns drift a little": lambda i, j: 0.12 * j,
    "rows drift": lambda i, j: 0.4 * i,
    "columns drift": lambda i, j: -0.4 * j,
    "both drift": lambda i, j: 3.0 * i - 2.5 * j,
    "a row far below": lambda i, j: -200.0 * (i == 17),
    "a row far above": lambda i, j: 200.0 * (i == 17),
    "a row above by 2^9 powers of 2": lambda i, j: 355.0 * (i == 17),
    "the first row far below": lambda i, j: -200.0 * (i == 0),
    "a column far below": lambda i, j: -200.0 * (j == 21),
    "a column far above": lambda i, j: 200.0 * (j == 21),
    "beyond any exponent": lambda i, j: 30000.0 * ((i + j) % 3 - 1),
}
# Rows and columns that have the same id are excluded.
EMPTY = {
    "a row": (lambda i: i != 17, lambda j: j < 0),
    "the first rows": (lambda i: i >= 20, lambda j: j < 0),
    "a column": (lambda i: i < 0, lambda j: j != 21),
    "the first columns": (lambda i: i < 0, lambda j: j >= 20),
    "a whole tile": (lambda i: i >= len(i) - 44, lambda j: 2 * (j >= len(j) - 44)),
}
BOTH, ROWS, COLS = ("row", "col"), ("row",), ("col",)


def logits(offset: str, backend: str) -> Tensor:
    n = size_for(backend)
    at = torch.arange(n, device="cpu")
    noise = 4 * torch.randn(n, n, generator=torch.Generator().manual_seed(5), device="cpu")
    return noise + OFFSETS[offset](at[:, None], at)


def check(s: Tensor, backend: str, directions: tuple[str, ...], size: float = 1.0, **ids: Tensor) -> None:
    """Compares log-sum-exps over the pairs that are not excluded, and gradients of a weighted sum, with float64."""
    n, generator = len(s), torch.Generator().manual_seed(6)
    weights = {name: torch.rand(n, generator=generator, device="cpu") + 0.5 for name in BOTH}
    exact = s.double().requires_grad_()
    excluded = torch.eye(n, dtype=torch.bool, device="cpu")
    if ids:
        excluded |= ids["row_ids"][:, None] == ids["col_ids"]
    others = exact.masked_fill(excluded, -torch.inf)
    expected = {"row": others.logsumexp(1), "col": others.logsumexp(0)}
    there = {name: expected[name].isfinite() for name in directions}
    (g,) = torch.autograd.grad(
        sum((weights[name] * size).double()[there[name]] @ expected[name][there[name]] for name in directions), exact
    )

    device = torch.get_default_device()  # the backend's
    x = s.to(device).requires_grad_()
    on = {name: value.to(device) for name, value in ids.items()}
    found = contrastive_stats(x, torch.eye(n), backend=backend, directions=directions, **on)
    total = torch.zeros((), device="cpu")
    for name in directions:
        values = getattr(found, name).cpu()
        torch.testing.assert_close(values, expected[name].detach(), rtol=1e-7, atol=1e-6)
        total = total + (weights[name] * size)[there[name]] @ values[there[name]].to(torch.float32)
    (dx,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(dx.cpu().double() / size, g / size, rtol=4e-6, atol=1e-11)


@pytest.mark.thinned("offset", "directions")
@pytest.mark.parametrize("directions", [BOTH, ROWS, COLS], ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_against_float64(offset: str, directions: tuple[str, ...], backend: str) -> None:
    check(logits(offset, backend), backend, directions)


@pytest.mark.thinned("size", "offset")
@pytest.mark.parametrize("size", [1e-33, 1e34])
@pytest.mark.parametrize("offset", ["near", "rows drift a little", "columns drift a little"])
def test_tiny_and_huge_weights(offset: str, size: float, backend: str) -> None:
    check(logits(offset, backend), backend, BOTH, size)


@pytest.mark.thinned("empty", "offset")
@pytest.mark.parametrize("offset", ["near", "a row far below", "a column far below"])
@pytest.mark.parametrize("empty", EMPTY)
def test_nothing_left(empty: str, offset: str, backend: str) -> None:
    of_row, of_col = EMPTY[empty]
    at = torch.arange(size_for(backend), device="cpu")
    check(logits(offset, backend), backend, BOTH, row_ids=of_row(at).long(), col_ids=of_col(at).long())


@pytest.mark.parametrize("by", ["bias", "ids"])
def test_one_pair_that_counts(by: str, backend: str) -> None:
    """If one pair of a row counts, the log-sum-exp is its logit, without the rounding of an exponential."""
    n = size_for(backend)
    x, y = 0.02 * torch.randn(n, 16), 0.02 * torch.randn(n, 16)
    bias = torch.full((n,), -torch.inf).index_fill(0, torch.tensor(3), 0.0)
    ids = {"row_ids": torch.zeros(n, dtype=torch.long), "col_ids": (torch.arange(n) == 3).long()}
    options = {"col_bias": bias} if by == "bias" else ids
    row = contrastive_stats(x, y, backend=backend, directions=["row"], **options).row
    expected = x.double() @ y[3].double()
    others = torch.arange(n) != 3  # row 3 has no negative
    torch.testing.assert_close(row[others], expected[others], rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [0.3, 6.09])
def test_collapsed_features(scale: float, backend: str) -> None:
    """All logits are the same: log-sum-exps of n - 1 equal terms, and gradients that cancel."""
    n = size_for(backend)
    x, y = (torch.zeros(n, 8).index_fill(1, torch.tensor(0), 1.0).requires_grad_() for _ in range(2))
    stats = contrastive_stats(x, y, scale, backend=backend)
    expected = torch.full((n,), scale + math.log(n - 1), dtype=torch.float64)
    for found in (stats.row, stats.col):
        torch.testing.assert_close(found, expected, rtol=0, atol=8e-7)
    loss = (stats.row + stats.col - 2 * stats.pos).mean()
    for gradient in torch.autograd.grad(loss, (x, y)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5 * scale / n)


@pytest.mark.parametrize("at", [(0, 5), (17, 0), (-1, -2)])
def test_one_nan(at: tuple[int, int], backend: str) -> None:
    """A NaN stays in its own row and column."""
    n = size_for(backend)
    at = at[0] % n, at[1] % n
    s = logits("near", backend).to(torch.get_default_device())
    good = contrastive_stats(s, torch.eye(n), backend=backend)
    # A NaN in a column's bias would reach all rows, so inf - inf makes a single product NaN.
    x = torch.cat([s, torch.zeros(n, 2)], dim=1)
    y = torch.cat([torch.eye(n), torch.zeros(n, 2)], dim=1)
    x[at[0], n], x[at[0], n + 1] = 1, -1
    y[at[1], n:] = 3e38
    x[at[0], n:] *= 3e38
    found = contrastive_stats(x, y, backend=backend)
    for name, index in (("row", at[0]), ("col", at[1])):
        values = getattr(found, name)
        assert values.isnan().nonzero().flatten().tolist() == [index]
        rest = torch.arange(n) != index
        torch.testing.assert_close(values[rest], getattr(good, name)[rest], rtol=1e-6, atol=1e-6)
