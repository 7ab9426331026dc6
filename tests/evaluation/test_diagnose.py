"""``diagnose`` and the temperature sweep against the formulas on the whole matrix in float64, and at their limits."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive import clip_loss, diagnose, recall_at_k
from fused_contrastive.evaluation import negatives
from fused_contrastive.evaluation.sweep import sweep

# test_hints.py tests the hints, which most of the scales and some of the features here would cause.
pytestmark = pytest.mark.filterwarnings("ignore:.*expected 1")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negatives, "CHUNK_ELEMENTS", 700)  # several chunks and a part


def pairs(n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d, dtype=torch.float64)
    y = x + 0.7 * torch.randn(n, d, dtype=torch.float64)
    return F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype)


def formulas(x: Tensor, y: Tensor, scale: float, k: int) -> dict[str, float]:
    """Each quantity as its paper has it, from whole matrices."""
    x, y = x.double(), y.double()
    n, found = len(x), {}
    unit_x, unit_y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    found["alignment"] = (unit_x - unit_y).norm(dim=1).pow(2).mean().item()
    for name, unit in (("uniformity_x", unit_x), ("uniformity_y", unit_y)):
        found[name] = F.pdist(unit).pow(2).mul(-2).exp().mean().log().item()
    for name, (a, b) in {"x_to_y": (x, y), "y_to_x": (y, x)}.items():
        others = ~torch.eye(n, dtype=torch.bool, device=x.device)
        weights = (scale * a @ b.T)[others].view(n, n - 1).softmax(dim=1)
        entropy = -(weights * weights.clamp_min(1e-300).log()).sum(dim=1)
        found[f"top1_{name}"] = recall_at_k(a, b, (1,))[1]
        found[f"effective_negatives_{name}"] = entropy.exp().mean().item()
        found[f"hardest_share_{name}"] = weights.sort(dim=1, descending=True).values[:, :k].sum(dim=1).mean().item()
    return found | {"k": k}


@pytest.mark.parametrize("scale", [0.01, 1.0, 14.3, 100.0, 1000.0])
@pytest.mark.parametrize(("n", "d", "k"), [(2, 3, 1), (53, 8, 10), (40, 1, 5), (70, 16, 69)], ids=str)
def test_the_formulas(n: int, d: int, k: int, scale: float) -> None:
    x, y = pairs(n, d)
    assert asdict(diagnose(x, y, scale, k=k)) == pytest.approx(formulas(x, y, scale, k), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Features of lower precision are widened, so the formulas hold exactly for the values that they have."""
    x, y = pairs(60, 32, dtype)
    found = diagnose(x, y, torch.tensor(20.0, requires_grad=True))
    assert asdict(found) == pytest.approx(formulas(x, y, 20.0, 10), rel=1e-4, abs=1e-5)
    assert found.effective_negatives == pytest.approx(
        (found.effective_negatives_x_to_y + found.effective_negatives_y_to_x) / 2
    )
    assert found.hardest_share == pytest.approx((found.hardest_share_x_to_y + found.hardest_share_y_to_x) / 2)


def test_features_that_are_not_normalised() -> None:
    x, y = pairs(50, 8)
    x, y = 3 * x, torch.rand(50, 1) * y
    assert asdict(diagnose(x, y, 5.0)) == pytest.approx(formulas(x, y, 5.0, 10), rel=1e-9, abs=1e-12)


def test_strided_inputs_are_not_written() -> None:
    x, y = pairs(50, 8)
    before = x.clone()
    strided = asdict(diagnose(x.T.contiguous().T, y.repeat_interleave(2, dim=0)[::2], 5.0))
    assert strided == pytest.approx(asdict(diagnose(x, y, 5.0)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_all_duplicates(scale: float, dtype: torch.dtype) -> None:
    """All features are one point: all negatives weigh the same, and only the first row ranks its own column first."""
    x = F.normalize(torch.ones(30, 4, dtype=dtype), dim=1)
    found = diagnose(x, x, scale, k=10)
    assert found.alignment == 0
    assert found.uniformity_x == pytest.approx(0, abs=1e-6)
    assert found.top1_x_to_y == found.top1_y_to_x == 1 / 30
    assert found.effective_negatives == pytest.approx(29, rel=1e-3)
    assert found.hardest_share == pytest.approx(10 / 29, rel=1e-3)


def test_one_negative() -> None:
    x, y = pairs(2, 5)
    found = diagnose(x, y, 7.0)  # k = 10, of one negative
    assert found.effective_negatives == pytest.approx(1)
    assert found.hardest_share == pytest.approx(1)
    assert found.k == 10


def test_nan_is_not_hidden() -> None:
    x, y = pairs(20, 5)
    x[3, 2] = math.nan
    found = diagnose(x, y, 7.0)
    assert all(math.isnan(value) for value in (found.alignment, found.uniformity_x, found.effective_negatives_x_to_y))


def test_sweep_at_each_temperature() -> None:
    """Each entry equals a diagnosis and the loss of ``clip_loss``; temperatures are sorted, without duplicates."""
    x, y = pairs(120, 16, torch.float32)
    rows = sweep(3 * x, y, (1.0, 0.01, 0.1, 0.1))
    assert [row.temperature for row in rows] == [0.01, 0.1, 1.0]
    for row in rows:
        found = diagnose(x, y, 1 / row.temperature)
        assert row.effective == pytest.approx(found.effective_negatives, rel=1e-4)
        assert row.share(10) == pytest.approx(found.hardest_share, rel=1e-4)
        assert row.share(100) <= row.share(10_000) <= 1 + 1e-6
        assert row.loss == pytest.approx(clip_loss(x, y, 1 / row.temperature).item(), rel=1e-4, abs=1e-6)


def test_smaller_temperatures_concentrate() -> None:
    """Wang & Liu 2021: the entropy of the weights only grows with the temperature, the hardest one's share falls."""
    rows = sweep(*pairs(150, 16), [10**exponent for exponent in (-4, -3, -2, -1, 0, 1, 2, 3)])
    for colder, warmer in itertools.pairwise(rows):
        assert colder.effective < warmer.effective
        assert colder.share(1) > warmer.share(1)
    assert rows[0].effective == pytest.approx(1, abs=0.1)
    assert rows[-1].effective == pytest.approx(149, rel=1e-3)


X = torch.randn(4, 3)
BAD = {
    "rows differ": (lambda: diagnose(X, X[:3], 1.0), ValueError, "y: got 3 rows, expected 4, as many as x"),
    "one row": (lambda: diagnose(X[:1], X[:1], 1.0), ValueError, "x: got 1 row, expected at least 2"),
    "scale 0": (lambda: diagnose(X, X, 0.0), ValueError, "scale: got 0.0, expected a finite number above 0"),
    "scale inf": (lambda: diagnose(X, X, math.inf), ValueError, "scale: got inf, expected a finite number"),
    "scale type": (lambda: diagnose(X, X, None), TypeError, "scale: got NoneType"),
    "k of 0": (lambda: diagnose(X, X, 1.0, k=0), ValueError, "k: got 0, expected an integer of at least 1"),
    "k type": (lambda: diagnose(X, X, 1.0, k=1.5), TypeError, "k: got 1.5, expected an integer of at least 1"),
    "temperature": (lambda: sweep(X, X, [0.1, -1.0]), ValueError, "temperatures: got -1.0, expected a finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        call()
