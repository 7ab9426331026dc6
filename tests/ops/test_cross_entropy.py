"""The loss on the statistics: every backend, every reduction, extreme values, and a second derivative."""

from __future__ import annotations

import pytest
import torch

from fused_contrastive.core.reduction import REDUCTIONS, Reduction
from fused_contrastive.ops import dispatch

INF, NAN = float("inf"), float("nan")


def cross_entropy(
    pos: torch.Tensor,
    *normalisers: torch.Tensor,
    dtype: torch.dtype,
    backend: str,
    decoupled: bool = False,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """The backend's own function, which takes float64 vectors whatever features the backend supports."""
    return dispatch.BACKENDS[backend].cross_entropy(pos, normalisers, decoupled, reduction, dtype)


def leaves(rows: int = 5, directions: int = 2) -> list[torch.Tensor]:
    return [torch.randn(rows, dtype=torch.float64).mul(3).requires_grad_() for _ in range(1 + directions)]


@pytest.mark.thinned("decoupled reduction", "directions")
@pytest.mark.parametrize("directions", [1, 2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_derivatives(decoupled: bool, reduction: Reduction, directions: int, backend: str) -> None:
    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return cross_entropy(*inputs, dtype=torch.float64, decoupled=decoupled, reduction=reduction, backend=backend)

    inputs = leaves(directions=directions)
    assert torch.autograd.gradcheck(loss, inputs)
    if not decoupled:  # the decoupled form's are 0, which gradgradcheck takes for a missing graph
        assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_by_hand(reduction: Reduction, backend: str) -> None:
    """Denominators e^row + e^pos of 4 and 2, e^col + e^pos of 8 and 2, with e^pos = 1."""
    pos = torch.zeros(2, dtype=torch.float64)
    row, col = torch.tensor([3.0, 1.0]).double().log(), torch.tensor([7.0, 1.0]).double().log()
    pairs = torch.tensor([(2 + 3) / 2, (1 + 1) / 2]) * torch.tensor(2.0).log()
    expected = {"none": pairs, "sum": pairs.sum(), "mean": pairs.mean()}[reduction]
    loss = cross_entropy(pos, row, col, dtype=torch.float32, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("pos", "normaliser", "loss", "gradient"),
    [
        (0.0, -INF, 0.0, 0.0),  # an empty denominator
        (0.0, INF, INF, 1.0),
        (0.0, 2000.0, 2000.0, 1.0),
        (0.0, -50.0, 1.928749847963918e-22, 1.928749847963918e-22),  # e^-50, which 1 + e^-50 would lose
        (0.0, NAN, NAN, NAN),
        (NAN, 0.0, NAN, NAN),
    ],
)
def test_extremes(pos: float, normaliser: float, loss: float, gradient: float, backend: str) -> None:
    inputs = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (pos, normaliser)]
    value = cross_entropy(*inputs, dtype=torch.float64, backend=backend)
    value.backward()
    found = [value.item(), inputs[1].grad.item(), -inputs[0].grad.item()]
    torch.testing.assert_close(found, [loss, gradient, gradient], equal_nan=True, rtol=1e-12, atol=0)
