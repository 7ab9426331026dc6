"""The C++ backend's normalisation agrees with F.normalize in value and gradient, except for rows of no length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.backends import cpp

DTYPES = [torch.float32, torch.float64]
# 1: a single row or column; 65: one past a task's rows; 37: no multiple of any vector; (3, 5, 8): items with negatives
SHAPES = [(1, 1), (65, 37), (7, 64), (3, 5, 8), (0, 4)]


def both(x: Tensor, g: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(value, gradient) of ours, and of F.normalize in float64."""
    found = []
    for function, dtype in ((cpp.BACKEND.normalize, x.dtype), (lambda t: F.normalize(t, dim=-1), torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, g.to(dtype).clone())
        found.append((value.detach(), gradient))
    return found[0], found[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e8])
def test_value_and_gradient(shape: tuple[int, ...], size: float, dtype: torch.dtype) -> None:
    x, g = size * torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    ours, exact = both(x, g)
    eps = torch.finfo(dtype).eps
    shortest = x.norm(dim=-1).min().item() if x.numel() else 1.0  # with one dimension it may be far below `size`
    for a, b, unit in zip(ours, exact, (1.0, 1 / shortest), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=32 * eps * unit * max(1, shape[-1]) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_length(dtype: torch.dtype) -> None:
    """Below the least norm the divisor is a constant, and the gradient is zero."""
    x = torch.zeros(4, 6, dtype=dtype)
    x[1] = 1e-14
    x[2] = 1.0
    ours, exact = both(x, torch.randn(4, 6, dtype=dtype))
    exact[1][[0, 1, 3]] = 0
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_nan_and_inf_stay_in_their_rows() -> None:
    x = torch.randn(5, 33)
    x[1, 3], x[2, 4], x[3, 32] = torch.nan, torch.inf, -torch.inf
    leaf = x.requires_grad_()
    value = cpp.BACKEND.normalize(leaf)
    expected = F.normalize(leaf, dim=-1)
    torch.testing.assert_close(value, expected, equal_nan=True)
    g = torch.randn(5, 33)
    ours, theirs = (torch.autograd.grad(v, leaf, g.clone())[0] for v in (value, expected))
    torch.testing.assert_close(ours[[0, 4]], theirs[[0, 4]])
    assert ours[[1, 2, 3]].isnan().any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_numbers_whose_squares_overflow(dtype: torch.dtype) -> None:
    x = torch.tensor([[3e19], [-3e19], [0.5], [-torch.finfo(dtype).max]], dtype=dtype)
    signs = x.sign()
    torch.testing.assert_close(cpp.BACKEND.normalize(x), signs)
    found = fc.nt_xent_loss(x, x.flip(0), normalize=True, memory_budget=0)
    torch.testing.assert_close(found, fc.nt_xent_loss(signs, signs.flip(0), normalize=False))


def test_strides() -> None:
    g = torch.randn(6, 4)
    for x in (torch.randn(4, 6).T, torch.randn(6, 8)[:, ::2], torch.randn(1, 4).expand(6, 4)):
        ours, exact = both(x, g)
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    negated = torch._neg_view(torch.randn(6, 4))
    ours, exact = both(negated, negated)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-6)
    upstream = torch.randn(4, 6).T
    ours, exact = both(torch.randn(6, 4), upstream)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("views", [1, 3])
def test_second_derivative(views: int) -> None:
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(views)]

    def value(*leaves: Tensor) -> Tensor:
        return cpp.BACKEND.normalize(*leaves) * 1.0  # a gradient of its own, which may be written to

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


def test_views_come_one_after_the_other() -> None:
    leaves = [torch.randn(n, 9, requires_grad=True) for n in (70, 1, 33)]
    g = torch.randn(104, 9)
    value = cpp.BACKEND.normalize(*leaves)
    assert torch.equal(value, torch.cat([cpp.BACKEND.normalize(x) for x in leaves]))
    found = torch.autograd.grad(value, leaves, g.clone())
    for x, dx, own in zip(leaves, found, g.split([70, 1, 33]), strict=True):
        assert torch.equal(dx, torch.autograd.grad(cpp.BACKEND.normalize(x), x, own.clone())[0])


def test_what_is_given_is_not_written_to() -> None:
    x = torch.randn(70, 9, requires_grad=True)
    before = x.detach().clone()
    value = cpp.BACKEND.normalize(x)
    kept = value.detach().clone()
    torch.autograd.grad(value, x, torch.randn(70, 9))
    assert torch.equal(x.detach(), before)
    assert torch.equal(value.detach(), kept)
