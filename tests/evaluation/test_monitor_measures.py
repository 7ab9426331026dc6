"""What ``monitor`` measures, against formulas on whole matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monitored import LOSSES, logged, no_warning, unit
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.evaluation import live


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_clip_has_the_measures_of_diagnose(dtype: torch.dtype, normalize: bool) -> None:
    x, y = (F.normalize(torch.randn(90, 8), dim=1).to(dtype) for _ in range(2))
    y = F.normalize(x + y, dim=1)
    expected = fc.diagnose(*(F.normalize(t.double(), dim=1) if normalize else t for t in (x, y)), 20.0)
    found = logged(lambda: fc.clip_loss((2 if normalize else 1) * x, y, torch.tensor(20.0), normalize=normalize))
    assert found["temperature"] == pytest.approx(0.05)
    of_diagnosis = {
        "top1": (expected.top1_x_to_y + expected.top1_y_to_x) / 2,
        "hardest_share": expected.hardest_share,
        "alignment": expected.alignment,
        "uniformity": (expected.uniformity_x + expected.uniformity_y) / 2,
    }
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert {key: found[key] for key in of_diagnosis} == pytest.approx(of_diagnosis, rel=tolerance, abs=tolerance)


def formulas(s: Tensor, positive: Tensor, negative: Tensor, unit_x: Tensor, unit_y: Tensor) -> dict[str, float]:
    """Each measure of the rows that have a positive and a negative, row by row, in float64."""
    rows = []
    total = count = 0.0
    for i in range(len(s)):
        p, n = positive[i].nonzero().flatten(), negative[i].nonzero().flatten()
        if not len(p) or not len(n):
            continue
        weights = s[i, n].softmax(0).sort(descending=True).values
        own = unit_y[p[0]]
        inside = n[n < len(unit_y)]
        distances = (own - unit_y[inside]).square().sum(1)
        total, count = total + (-2 * distances).exp().sum().item(), count + len(inside)
        rows.append(
            [
                float(s[i, p].max() > s[i, n].max()), weights[:10].sum().item(),
                (unit_x[i] - own).square().sum().item(), float((distances < 1e-8).any()),
                math.log(1 + (distances < 1e-8).sum()) if len(p) == 1 else 0.0,
            ]
        )  # fmt: skip
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    keys = ("top1", "hardest_share", "alignment", "duplicates", "duplicates_floor")
    return {**dict(zip(keys, means, strict=True)), "uniformity": math.log(total / count)}


def eye(m: int, n: int) -> Tensor:
    return torch.eye(m, n, dtype=torch.bool)


SEEDS = st.integers(0, 2**31)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, n=st.integers(4, 40), equal=st.sampled_from(["exclude", "mean", "sum"]), ids=st.integers(1, 2))
def test_ids(seed: int, n: int, equal: Any, ids: int) -> None:
    torch.manual_seed(seed)
    x, y = unit(n, 6), unit(n, 6)
    y[1] = y[3]
    of = torch.randint(0, 5, (2, n, ids)).squeeze(2)
    related = (of[0].reshape(n, 1, -1) == of[1].reshape(1, n, -1)).any(2)
    positive = eye(n, n) | related if equal != "exclude" else eye(n, n)
    negative = ~(eye(n, n) | related)
    found = logged(lambda: fc.info_nce_loss(x, y, logit_scale=9.0, row_ids=of[0], col_ids=of[1], equal_ids=equal))
    if not (negative.any(1) & positive.any(1)).any():
        assert math.isnan(found["top1"])
        return
    expected = formulas(9 * x @ y.T, positive, negative, x, y)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, own=st.booleans(), bias=st.booleans(), targets=st.booleans(), k=st.integers(1, 14))
def test_columns_of_info_nce(seed: int, own: bool, bias: bool, targets: bool, k: int) -> None:
    torch.manual_seed(seed)
    m, n = 20, 26
    x, y = unit(m, 6), unit(n, 6)
    negatives = unit(m, k, 6) if own else unit(k, 6)
    given: dict[str, Any] = {"negatives": negatives, "temperature": torch.tensor(0.1)}
    s, columns = 10 * x @ y.T, y
    positive, negative = eye(m, n), ~eye(m, n)
    if targets:
        given["targets"] = torch.randint(0, n, (m,))
        positive = given["targets"][:, None] == torch.arange(n)
        negative = ~positive
    if bias:
        given["col_bias"] = torch.randn(n if own else n + k, dtype=torch.float64)
        given["col_bias"][n - 1] = -torch.inf
        s = s + given["col_bias"][:n]
        if targets:
            given["targets"].clamp_(max=n - 2)
            positive = given["targets"][:, None] == torch.arange(n)
        negative = ~positive & (given["col_bias"][:n] > -torch.inf)
    if own:
        given["negatives_mask"] = torch.rand(m, k) < 0.7
        negatives = negatives.masked_fill(~given["negatives_mask"][..., None], torch.nan)
        given["negatives"] = negatives
        more = 10 * (x[:, None] * negatives).sum(2)
        there = given["negatives_mask"]
    else:
        more, there = 10 * x @ negatives.T, torch.ones(m, k, dtype=torch.bool)
        more = more + given["col_bias"][n:] if bias else more
        columns = torch.cat((y, negatives))
    s = torch.cat((s, more), 1)
    there = there & (s[:, n:] > -torch.inf)
    positive = torch.cat((positive, torch.zeros(m, k, dtype=torch.bool)), 1)
    expected = formulas(s, positive, torch.cat((negative, there), 1), x, columns)
    found = logged(lambda: fc.info_nce_loss(x, y, **given))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, n=st.integers(3, 30), views=st.integers(2, 3), scale=st.floats(0.5, 30))
def test_one_set_of_features(seed: int, n: int, views: int, scale: float) -> None:
    torch.manual_seed(seed)
    z, labels = unit(n, views, 6), torch.cat((torch.tensor([4]), torch.randint(0, 4, (n - 1,))))  # some negatives
    ids = labels.repeat_interleave(views)
    flat = z.flatten(0, 1)
    itself, related = eye(n * views, n * views), ids[:, None] == ids
    expected = formulas(scale * flat @ flat.T, related & ~itself, ~related, flat, flat)
    found = logged(lambda: fc.supcon_loss(z, labels, logit_scale=scale))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)

    ids = torch.arange(n).repeat(views)
    flat = z.transpose(0, 1).flatten(0, 1)
    expected = formulas(scale * flat @ flat.T, (ids[:, None] == ids) & ~itself, ids[:, None] != ids, flat, flat)
    a, b, *more = (3 * view for view in z.unbind(1))  # normalised by the loss
    found = logged(lambda: fc.nt_xent_loss(a, b, 1 / scale, views=more, normalize=True))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_siglip_weighs_negatives_by_their_sigmoids() -> None:
    x, y = unit(30, 6), unit(30, 6)
    s = 10 * x @ y.T - 2
    expected = formulas(F.logsigmoid(s), eye(30, 30), ~eye(30, 30), x, y)
    found = logged(lambda: fc.siglip_loss(x, y, 10.0, torch.tensor(-2.0)))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("copies", [2, 3])
def test_the_floor_is_the_least_loss(name: str, copies: int) -> None:
    """With each item ``copies`` times and all other logits far below, the best logit of the copies gives the floor."""
    x = torch.eye(20).repeat(copies, 1)
    found = logged(lambda: LOSSES[name](x, x, 10.0))
    best = (1000 * x @ x.T).softmax(1).diagonal().log().neg().mean().item()
    if name == "siglip_loss":
        logits = torch.linspace(-3, 3, 60001, dtype=torch.float64)
        best = (F.softplus(-logits) + (copies - 1) * F.softplus(logits)).min().item()
    assert found["duplicates_floor"] == pytest.approx(best, rel=1e-6)
    assert found["duplicates"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"row_ids": "ids", "col_ids": "ids"}, {"row_ids": "ids", "col_ids": "ids", "equal_ids": "mean"},
        {"guide": "guide"}, {"relative_margin": 0.1}, {"decoupled": True}, {"hardness": 0.5}, {"debias": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_no_floor_where_duplicates_are_dealt_with(options: dict[str, Any]) -> None:
    x = unit(10, 8).repeat(2, 1)
    given = {"ids": torch.arange(10).repeat(2), "guide": (x, x)}
    with no_warning(), fc.monitor() as m:
        fc.clip_loss(x, x, 10.0, **{key: given.get(str(value), value) for key, value in options.items()})
    assert m.measures["clip_loss"]["clip_loss/duplicates_floor"] == 0


def test_large_batches_are_sampled_block_by_block() -> None:
    """Only rows 200 to 219 are duplicates: in the second block of 128 rows, which the second check measures."""
    x = F.normalize(torch.randn(600, 32), dim=1)
    x[200:210] = x[210:220]
    found: list[dict[str, float]] = []
    with no_warning(), fc.monitor(every=3, log=found.append):
        for _ in range(3):
            fc.clip_loss(x, x, 10.0)
        with pytest.warns(UserWarning, match="call 4: 15.6% of the rows"):
            fc.clip_loss(x, x, 10.0)
        fc.clip_loss(x, x, 10.0)
    assert [each["clip_loss/duplicates"] for each in found] == [0, 20 / 128]


def test_at_most_so_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAIRS", 250)
    x, y = unit(100, 8), unit(100, 8)
    found = logged(lambda: fc.clip_loss(x, y, 10.0))  # 2 rows in each direction
    s = x @ y.T
    top1 = [float(s[i, i] > s[i][torch.arange(100) != i].max()) for i in range(2)]
    top1 += [float(s[i, i] > s[:, i][torch.arange(100) != i].max()) for i in range(2)]
    assert found["top1"] == sum(top1) / 4
