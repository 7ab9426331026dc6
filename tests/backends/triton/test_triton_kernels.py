"""Properties of single kernels that no loss shows: no products computed twice, precision, rows without negatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive import contrastive_stats, siglip_loss, sigmoid_stats
from fused_contrastive.core.spec import Needs, StatsSpec, Upstream

pytest.importorskip("triton")

from fused_contrastive.backends.triton import forward as kernels
from fused_contrastive.backends.triton import launch, storage

pytestmark = pytest.mark.usefixtures("triton_kernels")

WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def features(*sizes: int, d: int = 24, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [F.normalize(torch.randn(size, d, device="cpu")).to(WHERE, dtype) for size in sizes]


SPECS = {
    "nothing excluded": {},
    "equal ids only": {"equal_ids": "only"},
    "a triangle": {"upper": True, "want_col": False},
    "a triangle of equal ids only": {"upper": True, "want_col": False, "equal_ids": "only"},
}


@pytest.mark.parametrize("name", SPECS)
def test_products_are_made_once_where_no_sum_is_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns whose pairs in a tile are all excluded must not make a kernel compute its products again."""
    n = 150
    (x,) = features(n)
    ids = torch.arange(n, device=WHERE) % 60
    spec = StatsSpec(torch.tensor(5.0, device=WHERE), **SPECS[name])
    if "ids" in name:
        spec = spec._replace(row_ids=ids, col_ids=ids)
    expected = launch.forward(spec, x, x)
    original = kernels.exact_statistics

    class Spoilt:
        """Marks all strips as lost and passes features of NaN: what the kernel computes again is then NaN."""

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
    assert torch.equal(found.col, expected.col)  # empty for a triangle


@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
def test_sums_of_softplus_are_precise(bias: float) -> None:
    """The polynomial's relative error is 1.3e-6, for small and large sums; half-precision products are exact here."""
    x, y = features(40, 130)
    row = sigmoid_stats(x, y, 4.0, col_bias=torch.full((130,), bias, device=WHERE), backend="triton").row
    s = 4 * x.double() @ y.double().T + bias
    s = s.masked_fill(torch.eye(40, 130, dtype=torch.bool, device=WHERE), -torch.inf)
    truth = torch.logaddexp(s, torch.zeros_like(s)).sum(dim=1)
    assert ((row - truth) / truth).abs().max() < 3e-6


@pytest.mark.parametrize("logit", [-40.0, 40.0, 1e4, -1e4])
def test_extreme_sigmoids(logit: float) -> None:
    """Weights near 0 keep their relative precision, and those near 1 do not exceed 1."""
    x, y = features(4, 4)
    bias = torch.tensor(logit, device=WHERE, requires_grad=True)
    siglip_loss(x, y, 1.0, bias, backend="triton", memory_budget=0).backward()
    s = (x.double() @ y.double().T + logit).sigmoid()
    truth = s.masked_fill(torch.eye(4, dtype=torch.bool, device=WHERE), 0).sum() - (1 - s.diagonal()).sum()
    assert bias.grad == pytest.approx(truth.item() / 4, rel=1e-2, abs=1e-37)


@pytest.mark.parametrize("scale", [-300.0, -1.0, 0.0])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_scales_that_are_not_positive(scale: float, budget: int) -> None:
    x, y = features(70, 160)  # some tiles have no positive and no edge
    found = []
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, y)]
        stats = contrastive_stats(*leaves, scale, backend=backend, memory_budget=budget)
        (stats.row.sum() + stats.col.sum()).backward()
        found.append([stats.row.detach(), stats.col.detach(), *(t.grad.double() for t in leaves)])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize("logit", [80.0, 88.0, 95.0, 100.0, 105.0, 200.0])
@pytest.mark.parametrize("at", [3, 100], ids=["first tile", "last tile"])
def test_one_logit_far_above_the_others(at: int, logit: float) -> None:
    """The references of tiles lie far apart: the small logits of rows without the large logit must still count."""
    n = 130
    x, y = torch.zeros(n, 2), torch.zeros(n, 2)
    x[5, 0], y[at, 0] = 1.0, 1.0  # S[5, at] = logit, all others 0
    stats = contrastive_stats(x.bfloat16().to(WHERE), y.bfloat16().to(WHERE), logit, backend="triton")
    s = torch.zeros(n, n, dtype=torch.float64)
    s[5, at] = logit
    s.fill_diagonal_(-torch.inf)
    assert (stats.row.cpu() - s.logsumexp(dim=1)).abs().max() < 1e-5
    assert (stats.col.cpu() - s.logsumexp(dim=0)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_below_the_diagonal_memory_holds_anything(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of a triangle leaves tiles unwritten that the backward reads; finite numbers there must not count."""
    monkeypatch.setattr(launch, "STATISTICS_BLOCK", (16384, 16384))
    monkeypatch.setattr(launch, "GRADIENT_BLOCK", (16384, 16384))
    n = 150
    (x,) = features(n, dtype=dtype)
    spec = StatsSpec(torch.tensor(5.0, device=WHERE), upper=True, want_col=False)
    g = torch.rand(n, dtype=torch.float64, device=WHERE)
    upstream, needs = Upstream(None, g, None), Needs(True, True, False, False)
    spec = spec._replace(kept_rows=n)
    saved = launch.forward(spec, x, x)
    exponentials = n * storage.padded(n)  # float32 references follow, half of which may look like a bfloat16 NaN
    references = saved.kept[exponentials:].view(torch.float32)
    unwritten = torch.cat((saved.kept[:exponentials].isnan(), references.isnan().repeat_interleave(2)))
    assert unwritten.any()  # by poisoned_memory in conftest.py
    expected, found = (
        launch.backward(spec, x, x, saved._replace(kept=saved.kept.masked_fill(unwritten, value)), upstream, needs)
        for value in (0.0, 1.0)
    )
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.y, expected.y)


@pytest.mark.parametrize("budget", [0, 10**9])
@pytest.mark.parametrize("scale", [1e7, 1e12])
def test_logits_larger_than_their_roundings(scale: float, budget: int) -> None:
    """If rounding a logit changes its exponential by many powers of 2, one reference for a tile would overflow."""
    x, y = features(70, 90)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    stats = contrastive_stats(*leaves, scale, backend="triton", memory_budget=budget)
    (stats.row.sum() + stats.col.sum()).backward()
    exact = contrastive_stats(x.double(), y.double(), scale, backend="reference")
    for ours, truth in ((stats.row, exact.row), (stats.col, exact.col)):
        assert ((ours - truth) / truth).abs().max() < 1e-5
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("directions", [("row", "col"), ("col",)], ids=str)
def test_an_infinite_column_is_alone(directions: tuple[str, ...]) -> None:
    x, y = features(70, 90)
    bias = torch.zeros(90, device=WHERE)
    bias[80] = torch.inf
    stats = contrastive_stats(x, y, 5.0, col_bias=bias, directions=directions, backend="triton")
    assert (~stats.col.isfinite()).nonzero().tolist() == [[80]]
