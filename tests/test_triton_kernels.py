"""What single kernels promise that no loss shows: no products made twice, precision, rows with nothing left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import small_blocks
from torch import Tensor

from fused_contrastive import contrastive_stats, siglip_loss, sigmoid_stats
from fused_contrastive.core.spec import StatsSpec
from fused_contrastive.ops import dispatch

pytest.importorskip("triton")

from fused_contrastive.backends.triton import forward as kernels
from fused_contrastive.backends.triton import launch

WHERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := dispatch.BACKENDS["triton"].unavailable()) is not None:
        pytest.skip(f"backend 'triton': {reason}")
    if WHERE == "cpu":
        small_blocks(monkeypatch)


def features(*sizes: int, d: int = 24, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [F.normalize(torch.randn(size, d, device="cpu")).to(WHERE, dtype) for size in sizes]


SPECS = {
    "nothing excluded": {},
    "equal ids only": {"equal_ids": "only"},
    "a triangle": {"upper": True},
    "a triangle of equal ids only": {"upper": True, "equal_ids": "only"},
}


@pytest.mark.parametrize("name", SPECS)
def test_products_are_made_once_where_no_sum_is_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most rows and columns have nothing left in a tile, which is no reason to look at its products again."""
    n = 150
    (x,) = features(n)
    ids = torch.arange(n, device=WHERE) % 60
    spec = StatsSpec(torch.tensor(5.0, device=WHERE), **SPECS[name])
    if "ids" in name:
        spec = spec._replace(row_ids=ids, col_ids=ids)
    expected = launch.forward(spec, x, x)
    original = kernels.exact_statistics

    class Spoilt:
        """All strips are said to be lost, and whoever multiplies again multiplies NaN."""

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def run(x: Tensor, y: Tensor, *rest: object, **options: object) -> object:
                (lost,) = (t for t in rest if isinstance(t, Tensor) and t.dtype == torch.int32)
                lost.fill_(1)
                return original[grid](torch.full_like(x, torch.nan), torch.full_like(y, torch.nan), *rest, **options)

            return run

    if WHERE == "cuda":
        pytest.skip("features are descriptors on a GPU with a tensor memory accelerator")
    monkeypatch.setattr(kernels, "exact_statistics", Spoilt())
    found = launch.forward(spec, x, x)
    assert torch.equal(found.row, expected.row)
    assert torch.equal(found.col, expected.col)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
def test_sums_of_softplus_are_precise(bias: float) -> None:
    """The polynomial's relative error is 1.3e-6, for sums of 1e-5 and of 1e3; half-precision products are exact here."""
    x, y = features(40, 130)
    row = sigmoid_stats(x, y, 4.0, col_bias=torch.full((130,), bias, device=WHERE), backend="triton").row
    s = 4 * x.double() @ y.double().T + bias
    s = s.masked_fill(torch.eye(40, 130, dtype=torch.bool, device=WHERE), -torch.inf)
    truth = torch.logaddexp(s, torch.zeros_like(s)).sum(dim=1)
    assert ((row - truth) / truth).abs().max() < 3e-6


@pytest.mark.parametrize("logit", [-40.0, 40.0, 1e4, -1e4])
def test_extreme_sigmoids(logit: float) -> None:
    """Weights near 0 keep their relative precision, and those near 1 do not pass it."""
    x, y = features(4, 4)
    bias = torch.tensor(logit, device=WHERE, requires_grad=True)
    siglip_loss(x, y, 1.0, bias, backend="triton", memory_budget=0).backward()
    s = (x.double() @ y.double().T + logit).sigmoid()
    truth = s.masked_fill(torch.eye(4, dtype=torch.bool, device=WHERE), 0).sum() - (1 - s.diagonal()).sum()
    assert bias.grad == pytest.approx(truth.item() / 4, rel=1e-2, abs=1e-37)


@pytest.mark.parametrize("scale", [-300.0, -1.0, 0.0])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_scales_that_are_not_positive(scale: float, budget: int) -> None:
    x, y = features(70, 90)
    found = []
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, y)]
        stats = contrastive_stats(*leaves, scale, backend=backend, memory_budget=budget)
        (stats.row.sum() + stats.col.sum()).backward()
        found.append([stats.row.detach(), stats.col.detach(), *(t.grad.double() for t in leaves)])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() <= 2e-2 * exact.abs().max()
