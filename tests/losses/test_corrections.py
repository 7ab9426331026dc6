"""``debias`` and ``hardness``: their limits, and their errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc

x4, ids4 = torch.randn(4, 3), torch.arange(4)
several = {"row_ids": ids4, "col_ids": ids4, "equal_ids": "mean"}


def features(n: int) -> Tensor:
    return F.normalize(torch.randn(n, 8), dim=1)


@pytest.mark.parametrize("loss", [fc.clip_loss, fc.info_nce_loss])
def test_a_number_of_debias_is_that_of_each_row(loss: Callable[..., Tensor], backend: str) -> None:
    x, y = features(9), features(9)
    found, each = (
        loss(x, y, logit_scale=5.0, debias=debias, backend=backend) for debias in (0.1, torch.full((9,), 0.1))
    )
    torch.testing.assert_close(found, each)


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_debias_keeps_the_sum_above_its_least_value(backend: str, share: float) -> None:
    """All negatives are as far as can be: the sum would fall below N exp(-scale), for a share of 0.9 even below 0."""
    x = F.normalize(torch.ones(4, 3), dim=1)
    found = fc.info_nce_loss(
        x, torch.cat((x[:1], -x[1:])), logit_scale=2.0, debias=share, reduction="none", backend=backend
    )
    assert found[0].item() == pytest.approx(
        torch.tensor([2.0, torch.tensor(3.0).log().item() - 2.0]).logsumexp(0).item() - 2, abs=1e-6
    )


def test_corrections_of_nothing_change_nothing(backend: str) -> None:
    x, y = features(7), features(7)
    plain = fc.clip_loss(x, y, 5.0, backend=backend)
    torch.testing.assert_close(fc.clip_loss(x, y, 5.0, debias=0.0, backend=backend), plain)
    assert torch.equal(fc.clip_loss(x, y, 5.0, hardness=0.0, backend=backend), plain)


@pytest.mark.parametrize(
    ("text", "error", "options"),
    [
        ("hardness: got -1", ValueError, {"hardness": -1}),
        ("hardness: got 1e+38", ValueError, {"hardness": 1e38}),
        ("hardness: got inf", ValueError, {"hardness": float("inf")}),
        ("hardness: got '1'", TypeError, {"hardness": "1"}),
        ("debias: got 1.0, expected a number in [0, 1)", ValueError, {"debias": 1.0}),
        ("debias: got -0.1", ValueError, {"debias": -0.1}),
        ("debias: got values from 1.5 to 1.5, expected numbers in [0, 1)", ValueError, {"debias": torch.tensor(1.5)}),
        ("debias: got shape (5,)", ValueError, {"debias": torch.zeros(5)}),
        ("label_smoothing: got it together with debias", ValueError, {"debias": 0.1, "label_smoothing": 0.1}),
        ("absolute_margin: got it together with debias", ValueError, {"hardness": 1.0, "absolute_margin": 0.1}),
        (
            "equal_ids: got it together with debias",
            ValueError,
            {"hardness": 1.0, **several},
        ),
    ],
)
def test_bad_corrections(text: str, error: type, options: dict) -> None:
    for loss in (fc.clip_loss, fc.info_nce_loss):
        with pytest.raises(error) as raised:
            loss(x4, x4, logit_scale=1.0, **options)
        assert str(raised.value).startswith(text)
    with pytest.raises(ValueError, match="views: got it together with debias"):
        fc.nt_xent_loss(x4, x4, 1.0, views=[x4], hardness=1.0, normalize=True)
