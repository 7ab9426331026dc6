"""Dot products of features with partners made of the same features (ops/row_dots.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_contrastive.ops import row_dots as module
from fused_contrastive.ops.row_dots import row_dots


@pytest.fixture(autouse=True)
def few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes row_dots take several steps, the last with fewer columns."""
    monkeypatch.setattr(module, "ELEMENTS", 16)
    monkeypatch.setattr(module, "LEAST_COLUMNS", 3)


def value(z: Tensor, a: Tensor) -> Tensor:
    """A number that depends on both results."""
    same, dots = row_dots(z, lambda part: a.to(part) @ part, lambda part: a.T.to(part) @ part)
    return (same.sin() * torch.arange(8.0).to(same)).sum() + (dots.to(same) ** 2).sum()


def plain(z: Tensor, a: Tensor) -> Tensor:
    return (z.sin() * torch.arange(8.0).to(z)).sum() + ((z * (a.to(z) @ z)).sum(dim=1) ** 2).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(dtype: torch.dtype) -> None:
    z, a = torch.randn(5, 8).to(dtype), torch.randn(5, 5, dtype=torch.float64)
    results = []
    for function, leaf in ((value, z.clone()), (plain, z.double())):
        found = function(leaf.requires_grad_(), a)
        results.append((found.detach(), torch.autograd.grad(found, leaf)[0]))
    largest = float(plain(z.detach().double().abs(), a.abs()))  # the value's terms, which may cancel
    for ours, truth in zip(*results, strict=True):
        allowed = 20 * torch.finfo(dtype).eps * (largest if truth.dim() == 0 else float(truth.abs().max()))
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=allowed)


def test_symmetric_map_needs_no_transpose() -> None:
    z, a = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 5, dtype=torch.float64)
    a = a + a.T
    found = torch.autograd.grad(row_dots(z, lambda part: a @ part)[1].sum(), z)[0]
    torch.testing.assert_close(found, torch.autograd.grad((z * (a @ z)).sum(), z)[0])


def test_either_result_alone() -> None:
    z, a = torch.randn(5, 8, requires_grad=True), torch.randn(5, 5)
    same, dots = row_dots(z, lambda part: a @ part, lambda part: a.T @ part)
    assert torch.equal(torch.autograd.grad(same.sum(), z, retain_graph=True)[0], torch.ones(5, 8))
    torch.testing.assert_close(
        torch.autograd.grad(dots.sum(), z)[0], torch.autograd.grad((z * (a @ z)).sum(), z)[0], rtol=1e-5, atol=1e-5
    )


def test_second_derivative() -> None:
    z, a = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: value(z, a), z)
    assert torch.autograd.gradgradcheck(lambda z: value(z, a), z)


def test_no_columns() -> None:
    z = torch.zeros(4, 0, requires_grad=True)
    same, dots = row_dots(z, lambda part: part)
    assert torch.equal(dots, torch.zeros(4))
    assert torch.autograd.grad(same.sum() + dots.sum(), z)[0].shape == (4, 0)
