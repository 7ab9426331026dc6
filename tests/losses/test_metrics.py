"""Metrics that come with a loss: ranks of the positives, against the sorted N x N matrix in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ranked import check, same_step
from torch import Tensor

import fused_contrastive as fc

SCALE, NEAR = 5.0, 1e-4


def features(n: int, d: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1).to(dtype).requires_grad_()


def expected(logits: Tensor, targets: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, ...]:
    """The positive's logit and the hardest negative's of each row of an (M, N) matrix, and the least and the highest
    rank that the positive may have: products in float32 decide near ties either way."""
    positive = logits.gather(1, targets[:, None]).squeeze(1)
    out = F.one_hot(targets, logits.shape[1]).bool()
    out = out if excluded is None else out | excluded
    negatives = logits.masked_fill(out, -torch.inf)
    ranks = ((negatives > positive[:, None] + near).sum(dim=1) for near in (NEAR, -NEAR))
    return positive, negatives.amax(dim=1), *ranks


def matrix(x: Tensor, y: Tensor) -> Tensor:
    return SCALE * x.detach().double() @ y.detach().double().T


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("budget", [0, "auto"])
def test_clip(backend: str, dtype: torch.dtype, n: int, budget: int | str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton backend takes no float64 features")
    x, y, i = features(n, dtype=dtype), features(n, dtype=dtype), torch.arange(n)

    def loss(**more: bool) -> Tensor:
        return fc.clip_loss(x, y, SCALE, backend=backend, memory_budget=budget, **more)

    s = matrix(x, y)
    _, metrics = loss(metrics=True)
    check(metrics, expected(s, i), expected(s.T, i))
    same_step(loss, x, y)


@pytest.mark.parametrize(
    "options",
    [
        {"hardness": 0.5},
        {"debias": 0.1},
        {"label_smoothing": 0.1},
        {"decoupled": True},
        {"reduction": "none"},
        {"weight": torch.arange(1.0, 41.0)},
        {"normalize": True},
    ],
)
def test_options_of_clip_change_no_rank(backend: str, options: dict) -> None:
    x, y, i = features(40), features(40), torch.arange(40)

    def loss(**more: bool) -> Tensor:
        return fc.clip_loss(x, y, SCALE, backend=backend, **options, **more)

    s = matrix(x, y)
    check(loss(metrics=True)[1], expected(s, i), expected(s.T, i))
    same_step(loss, x, y)


def test_what_a_rule_leaves_out_has_no_rank(backend: str) -> None:
    x, y, i, ids = features(40), features(40), torch.arange(40), torch.arange(40) // 3
    s, related = matrix(x, y), ids[:, None] == ids
    _, metrics = fc.clip_loss(x, y, SCALE, row_ids=ids, col_ids=ids, metrics=True, backend=backend)
    check(metrics, expected(s, i, related), expected(s.T, i, related))
    _, metrics = fc.clip_loss(x, y, SCALE, absolute_margin=0.1, metrics=True, backend=backend)
    above = s > s.diagonal()[:, None] - SCALE * 0.1
    assert metrics.row_rank.eq(0).all()  # every negative above the positive is left out
    assert metrics.col_rank.eq(0).all()
    check(metrics, expected(s, i, above), expected(s.T, i, s.diagonal()[:, None] - SCALE * 0.1 < s.T))


@pytest.mark.parametrize("symmetric", [True, False])
def test_info_nce(backend: str, symmetric: bool) -> None:
    x, y, shared = features(30), features(30), features(50)
    targets = torch.arange(30) if symmetric else torch.randint(30, (30,))
    bias = torch.randn(80)

    def loss(**more: bool) -> Tensor:
        return fc.info_nce_loss(
            x, y, logit_scale=SCALE, negatives=shared, col_bias=bias, symmetric=symmetric,
            targets=None if symmetric else targets, backend=backend, **more,
        )  # fmt: skip

    s = matrix(x, torch.cat((y, shared))) + bias.double()
    check(loss(metrics=True)[1], expected(s, targets), expected(s[:, :30].T, targets) if symmetric else None)
    same_step(loss, x, y, shared)


def test_own_negatives_count(backend: str) -> None:
    x, y, own = features(20), features(20), features(80).detach().view(20, 4, 12)
    mask = torch.rand(20, 4) < 0.7
    _, metrics = fc.info_nce_loss(
        x, y, logit_scale=SCALE, negatives=own, negatives_mask=mask, metrics=True, backend=backend
    )
    more = SCALE * (x.detach().double()[:, None] * own.double()).sum(dim=2)
    s = torch.cat((matrix(x, y), more.masked_fill(~mask, -torch.inf)), dim=1)
    check(metrics, expected(s, torch.arange(20)), None)


@pytest.mark.parametrize("budget", [0, "auto"])
def test_nt_xent(backend: str, budget: int | str) -> None:
    a, b, n = features(65), features(65), 65

    def loss(**more: bool) -> Tensor:
        return fc.nt_xent_loss(
            a, b, logit_scale=SCALE, normalize=True, memory_budget=budget, backend=backend, **more
        )  # fmt: skip

    z = torch.cat((a, b))
    rows = expected(matrix(z, z), torch.arange(2 * n).roll(n), torch.eye(2 * n, dtype=torch.bool))
    check(loss(metrics=True)[1], rows, None)
    same_step(loss, a, b)


@pytest.mark.parametrize("with_ids", [True, False])
def test_siglip(backend: str, with_ids: bool) -> None:
    x, y, i, ids = features(70), features(70), torch.arange(70), torch.arange(70) // 2
    given = {"row_ids": ids, "col_ids": ids} if with_ids else {}

    def loss(**more: bool) -> Tensor:
        return fc.siglip_loss(x, y, SCALE, -3.0, backend=backend, **given, **more)

    check(loss(metrics=True)[1], expected(matrix(x, y) - 3, i, ids[:, None] == ids if with_ids else None), None)
    same_step(loss, x, y)


def test_ties_and_nan(backend: str) -> None:
    x = features(8).detach()
    y = x.clone()
    y[5] = y[2]  # a copy of the positive is no better than the positive
    _, metrics = fc.clip_loss(x, y, SCALE, metrics=True, backend=backend)
    assert metrics.row_rank[[0, 1, 2, 3, 4, 6, 7]].eq(0).all()
    y[3] = torch.nan
    _, metrics = fc.clip_loss(x, y, SCALE, metrics=True, backend=backend)
    assert metrics.row_rank[3] == 7  # a positive of NaN is last
    assert metrics.row_rank[0] == 1  # and a negative of NaN is above


def test_a_batch_of_nan_is_not_perfect(backend: str) -> None:
    x = torch.full((6, 8), torch.nan)
    metrics = fc.clip_loss(x, x, 3.0, metrics=True, backend=backend)[1]
    assert metrics.row_rank.tolist() == metrics.col_rank.tolist() == [5] * 6
    assert metrics.summary()["top1"] == 0


def test_a_positive_of_minus_inf_is_below_the_others(backend: str) -> None:
    x, y = torch.rand(2, 6, 8) + 0.1
    x[2, 0], y[2, 0] = torch.inf, -1.0
    ranks = fc.clip_loss(x, y, 3.0, metrics=True, backend=backend)[1].row_rank
    assert ranks.tolist()[2] == 5  # the others are inf


def test_many_dimensions_of_ties(backend: str) -> None:
    x = F.normalize(torch.randn(1, 700), dim=1).expand(90, 700).contiguous()
    _, metrics = fc.clip_loss(x, x.clone(), 100.0, metrics=True, backend=backend)
    assert metrics.top1 == 1


def test_properties() -> None:
    metrics = fc.Metrics(
        torch.tensor([0, 3, 1, 0]), torch.tensor([0, 0, 0, 7]), torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([0.0, 3.0, 5.0, 2.0]),
    )  # fmt: skip
    assert metrics.top1 == 5 / 8
    assert metrics.top(2) == 6 / 8
    assert metrics.mean_rank == 11 / 8
    assert metrics.summary() == {
        "top1": 5 / 8, "top5": 7 / 8, "mean_rank": 11 / 8, "positive": 2.5, "hardest_negative": 2.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="k: got 0, expected an integer of at least 1"):
        metrics.top(0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: fc.clip_loss(x, x, 1.0, metrics=1), TypeError, "metrics: got 1, expected True or False"),
        (
            lambda x: fc.clip_loss(
                x, x, 1.0, metrics=True, equal_ids="mean", row_ids=torch.arange(4), col_ids=torch.arange(4)
            ),
            ValueError,
            "metrics: got it with equal_ids='mean'",
        ),
        (
            lambda x: fc.nt_xent_loss(x, x, views=[x], normalize=True, metrics=True),
            ValueError,
            "metrics: got True with 3",
        ),
        (
            lambda x: fc.siglip_loss(
                x, x, 1.0, row_ids=torch.arange(4), col_ids=torch.arange(4), metrics=True, positive_weight="mean"
            ),
            ValueError,
            "metrics: got True with images",
        ),
    ],
)
def test_bad_metrics(call: Callable[[Tensor], object], error: type, text: str) -> None:
    with pytest.raises(error) as raised:
        call(features(4))
    assert str(raised.value).startswith(text)


def test_compiled(backend: str) -> None:
    x, y = features(40), features(40)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, metrics = fc.clip_loss(x, y, SCALE, metrics=True, backend=backend)
        return loss, metrics.row_rank, metrics.top1

    if backend == "triton":
        pytest.skip("Triton's interpreter runs no compiled graph")
    torch._dynamo.reset()
    for found, right in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(x, y), step(x, y), strict=True):
        torch.testing.assert_close(found, right)


def test_verified() -> None:
    x, y = features(40), features(40)
    with fc.verify_against_reference(every=1, on_breach="raise") as watch:
        _, metrics = fc.clip_loss(x, y, SCALE, metrics=True)
    assert watch.checked == 1
    assert len(metrics.row_rank) == 40
    assert fc.verify(fc.clip_loss, x, y, SCALE, metrics=True).held


def test_modules_return_them_when_asked() -> None:
    x, y = features(9), features(9)
    for module, function in (
        (fc.ClipLoss(), lambda **o: fc.clip_loss(x, y, SCALE, **o)),
        (fc.SigLipLoss(), lambda **o: fc.siglip_loss(x, y, SCALE, -1.0, **o)),
        (fc.InfoNCELoss(symmetric=True), lambda **o: fc.info_nce_loss(x, y, logit_scale=SCALE, symmetric=True, **o)),
        (fc.NTXentLoss(normalize=False), lambda **o: fc.nt_xent_loss(x, y, 1 / SCALE, normalize=False, **o)),
    ):
        given = {"logit_bias": -1.0} if isinstance(module, fc.SigLipLoss) else {}
        loss, metrics = module(x, y, logit_scale=SCALE, metrics=True, **given)
        wanted, of_function = function(metrics=True)
        torch.testing.assert_close(loss, wanted)
        assert torch.equal(metrics.row_rank, of_function.row_rank)
        torch.testing.assert_close(module(x, y, logit_scale=SCALE, **given), wanted)
