"""A row of zeros has a finite loss and a gradient of zeros, and does not change the gradients of other rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.core.unit import unit_rows

N, D, ZERO = 16, 8, 3
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def info_nce(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / 0.2, torch.arange(len(x)))


def nt_xent(x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(torch.cat((x, y)), dim=1)
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * N).roll(N))


def supcon(x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(torch.cat((x, y)), dim=1)
    labels = torch.arange(2 * N) % 5
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    positive = (labels[:, None] == labels) & ~torch.eye(2 * N, dtype=torch.bool)
    return -logits.log_softmax(dim=1).where(positive, 0).sum(dim=1).div(positive.sum(dim=1)).mean()


Ours = Callable[..., Tensor]
LOSSES: dict[str, tuple[Ours, Callable[[Tensor, Tensor], Tensor]]] = {
    "info_nce": (lambda x, y, **o: fc.info_nce_loss(x, y, temperature=0.2, normalize=True, **o), info_nce),
    "info_nce none": (
        lambda x, y, **o: fc.info_nce_loss(x, y, temperature=0.2, normalize=True, reduction="none", **o).mean(),
        info_nce,
    ),
    "info_nce recomputed": (
        lambda x, y, **o: fc.info_nce_loss(x, y, temperature=0.2, normalize=True, memory_budget=0, **o),
        info_nce,
    ),
    "nt_xent": (lambda x, y, **o: fc.nt_xent_loss(x, y, 0.2, normalize=True, **o), nt_xent),
    "supcon": (
        lambda x, y, **o: fc.supcon_loss(torch.cat((x, y)), torch.arange(2 * N) % 5, 0.2, normalize=True, **o),
        supcon,
    ),
}


@pytest.mark.thinned("name", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_zeros(name: str, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend does not take float64")
    ours, textbook = LOSSES[name]
    x, y = torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(N, D).to(dtype).requires_grad_()
    x.data[ZERO] = y.data[2 * ZERO] = 0
    loss = ours(x, y, backend=backend)
    found = torch.autograd.grad(loss, (x, y))
    leaves = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    expected = textbook(*leaves)
    exact = torch.autograd.grad(expected, leaves)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for gradient, right, zero in zip(found, exact, (ZERO, 2 * ZERO), strict=True):
        assert (gradient[zero] == 0).all()
        others = torch.arange(N) != zero
        torch.testing.assert_close(gradient[others].double(), right[others], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_short_rows_are_divided_by_the_least_norm(dtype: torch.dtype) -> None:
    x = torch.tensor([[3.0, 4.0], [3e-14, 4e-14], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    z = unit_rows(x)
    torch.testing.assert_close(z, torch.tensor([[0.6, 0.8], [0.03, 0.04], [0, 0]], dtype=dtype))
    z.sum().backward()
    assert (x.grad[1:] == 0).all()
