"""False negatives and several positives: ids and margins at their edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from seeds import SEED
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.losses.related import related_counts


@hypothesis_seed(SEED)
@settings(max_examples=80, deadline=None, database=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_related_counts(m: int, n: int, k: int, high: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-high, high, (size, k), generator=g) * 2**40 for size in (m, n))
    assert torch.equal(related_counts(a, b), (a[:, None] == b).any(dim=2).sum(dim=1))
    assert torch.equal(related_counts(a[:, 0], b[:, 0]), (a[:, :1] == b[:, 0]).sum(dim=1))


def features(n: int, d: int = 8) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1)


def test_one_id_in_a_column_is_one_id(backend: str) -> None:
    x, y, ids = features(9), features(9), torch.arange(9) // 2
    for form in ("exclude", "mean", "sum"):
        one, other = (
            fc.clip_loss(x, y, 5.0, row_ids=t, col_ids=t, equal_ids=form, backend=backend) for t in (ids, ids[:, None])
        )
        assert torch.equal(one, other)


def test_distinct_ids_leave_clip_as_it_is(backend: str) -> None:
    x, y, ids = features(9), features(9), torch.arange(9) * 3
    plain = fc.clip_loss(x, y, 5.0, backend=backend)
    for form in ("exclude", "mean", "sum"):
        found = fc.clip_loss(x, y, 5.0, row_ids=ids, col_ids=ids, equal_ids=form, backend=backend)
        torch.testing.assert_close(found, plain)


def test_what_has_no_positive_does_not_count(backend: str) -> None:
    """Image 2 and texts 3 and 4 have no partner: their losses are 0, and they are not in the mean."""
    x, y = features(3), features(5)
    row_ids, col_ids = torch.tensor([0, 1, 9]), torch.tensor([0, 0, 1, 5, 6])
    s = 4.0 * x @ y.T
    for form, reduce in (("mean", torch.mean), ("sum", lambda p: p.exp().sum().log())):
        rows = [-reduce(s.log_softmax(1)[i][row_ids[i] == col_ids]) for i in (0, 1)]
        cols = [-reduce(s.log_softmax(0)[:, j][row_ids == col_ids[j]]) for j in (0, 1, 2)]
        expected = (torch.stack(rows).mean() + torch.stack(cols).mean()) / 2
        found = fc.clip_loss(x, y, 4.0, row_ids=row_ids, col_ids=col_ids, equal_ids=form, backend=backend)
        torch.testing.assert_close(found, expected)
    by_row = fc.info_nce_loss(
        x, y, logit_scale=4.0, row_ids=row_ids, col_ids=col_ids, equal_ids="mean", reduction="none", backend=backend
    )
    assert by_row[2] == 0


ALL_LEFT_OUT = {
    "ids": {"row_ids": torch.zeros(6, dtype=torch.int64), "col_ids": torch.zeros(6, dtype=torch.int64)},
    "absolute": {"absolute_margin": 3.0},
    "relative": {"relative_margin": 1e6},
}


@pytest.mark.parametrize("options", ALL_LEFT_OUT.values(), ids=ALL_LEFT_OUT)
def test_a_row_that_loses_all_negatives_has_loss_0_and_zero_gradients(options: dict, backend: str) -> None:
    leaves = [features(6).requires_grad_(), features(6).requires_grad_(), torch.tensor(9.0, requires_grad=True)]
    for loss in (
        fc.clip_loss(*leaves, backend=backend, **options),
        fc.info_nce_loss(leaves[0], leaves[1], logit_scale=leaves[2], backend=backend, **options),
    ):
        assert loss == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_copies_of_the_positive_count_at_margin_0(dtype: torch.dtype, seed: int) -> None:
    """Every text comes three times. A copy is as similar as the positive, but for roundings, and is not above it."""
    torch.manual_seed(seed)
    x = features(150, 67).to(dtype)
    y = x.repeat_interleave(3, dim=0)[torch.randperm(450)]
    targets = torch.stack([(y == row).all(dim=1).nonzero()[0, 0] for row in x])
    found = fc.info_nce_loss(x, y, logit_scale=20.0, targets=targets, absolute_margin=0.0, reduction="none")
    torch.testing.assert_close(found, torch.full_like(found, 3.0).log(), atol=1e-3, rtol=0)


def test_margins_of_features_that_are_not_normalised(backend: str) -> None:
    """The margin is in units of the product x . y, without the scale."""
    x, y = torch.tensor([[2.0], [1.0]]), torch.tensor([[3.0], [7.0]])  # products: 6, 14; 3, 7
    for margin, left in ((-8.5, True), (-7.5, False)):
        loss = fc.info_nce_loss(x, y, logit_scale=0.1, absolute_margin=margin, reduction="none", backend=backend)
        assert (loss[0] > 0) == left


def test_own_negatives_have_the_margin_too() -> None:
    query, key = torch.eye(2), torch.eye(2)
    negatives = torch.tensor([[[0.95, 0.0], [0.5, 0.0]], [[0.0, 0.5], [0.0, 0.95]]])
    found = fc.info_nce_loss(query, key, logit_scale=2.0, negatives=negatives, absolute_margin=0.1)
    assert found.item() == pytest.approx(torch.tensor([2.0, 0.0, 1.0]).logsumexp(0).item() - 2.0)


@pytest.mark.parametrize("dims", [0, 1])
def test_a_margin_that_is_a_tensor_has_a_gradient(dims: int, backend: str) -> None:
    x, y = features(5).requires_grad_(), features(5)
    margin = (torch.rand(5) if dims else torch.tensor(0.3)).requires_grad_()
    s = 6.0 * x @ y.T - margin * torch.eye(5)
    expected = torch.autograd.grad(F.cross_entropy(s, torch.arange(5)), (x, margin))
    loss = fc.info_nce_loss(x, y, logit_scale=6.0, margin=margin, backend=backend)
    for found, g in zip(torch.autograd.grad(loss, (x, margin)), expected, strict=True):
        torch.testing.assert_close(found, g, atol=1e-6, rtol=1e-4)


IDS = torch.arange(8) // 2
COMPILED = [
    (fc.clip_loss, {"row_ids": IDS, "col_ids": IDS, "equal_ids": "sum"}),
    (
        fc.clip_loss,
        {"row_ids": IDS.view(8, 1).expand(8, 3), "col_ids": torch.arange(24).view(8, 3), "equal_ids": "mean"},
    ),
    (fc.clip_loss, {"relative_margin": 0.1}),
    (fc.clip_loss, {"weight": torch.arange(1.0, 9.0), "normalize": True}),
    (fc.siglip_loss, {"row_ids": IDS, "col_ids": IDS, "positive_weight": "mean"}),
]


@pytest.mark.parametrize(("loss", "options"), COMPILED)
def test_compile_fullgraph(loss, options: dict) -> None:  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    leaves = [features(8).requires_grad_(), features(8).requires_grad_(), torch.tensor(4.0, requires_grad=True)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves, **options), loss(*leaves, **options)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


x4, x5, ids4, ids5 = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4), torch.arange(5)
several = {"row_ids": ids4, "col_ids": ids4, "equal_ids": "mean"}
BAD = [
    ("row_ids: got shape (3,)", ValueError, {"row_ids": ids4[:3], "col_ids": ids4}),
    ("row_ids: got shape (4, 5)", ValueError, {"row_ids": ids4.view(4, 1).expand(4, 5), "col_ids": ids4}),
    ("row_ids: got shape (4, 0)", ValueError, {"row_ids": ids4.view(4, 1)[:, :0], "col_ids": ids4}),
    ("col_ids: got 1 ids a column, expected 2", ValueError, {"row_ids": ids4.view(4, 1).expand(4, 2), "col_ids": ids4}),
    ("row_ids: got dtype torch.float32", TypeError, {"row_ids": ids4.float(), "col_ids": ids4}),
    ("row_ids, col_ids: got only one", ValueError, {"row_ids": ids4}),
    ("equal_ids: got 'all'", ValueError, {"equal_ids": "all"}),
    ("equal_ids: got 'sum' without row_ids", ValueError, {"equal_ids": "sum"}),
    ("absolute_margin: got it with equal_ids='mean'", ValueError, {**several, "absolute_margin": 0.1}),
    ("relative_margin: got it with equal_ids='mean'", ValueError, {**several, "relative_margin": 0.1}),
    ("absolute_margin, relative_margin: got both", ValueError, {"absolute_margin": 0.1, "relative_margin": 0.1}),
    ("absolute_margin: got nan", ValueError, {"absolute_margin": float("nan")}),
    ("relative_margin: got '1'", TypeError, {"relative_margin": "1"}),
    ("label_smoothing: got it together with ids", ValueError, {**several, "label_smoothing": 0.1}),
    ("label_smoothing: got it together with a margin", ValueError, {"absolute_margin": 0.0, "label_smoothing": 0.1}),
    ("weight: got shape (5,)", ValueError, {"weight": torch.ones(5)}),
    ("logit_scale: got -1.0 with a margin", ValueError, {"absolute_margin": 0.0, "logit_scale": -1.0}),
]


@pytest.mark.parametrize(("text", "error", "options"), BAD, ids=[text for text, _, _ in BAD])
def test_bad_input_names_the_argument(text: str, error: type, options: dict) -> None:
    for loss in (fc.clip_loss, fc.info_nce_loss):
        with pytest.raises(error) as raised:
            loss(x4, x4, **{"logit_scale": 1.0, **options})
        assert str(raised.value).startswith(text)


def test_unequal_numbers_need_ids_as_positives() -> None:
    for options in ({}, {"row_ids": ids4, "col_ids": ids5}):
        with pytest.raises(ValueError, match="text_features: got 5 rows, expected 4"):
            fc.clip_loss(x4, x5, 1.0, **options)
    with pytest.raises(ValueError, match="text_features: got 5 rows, expected 4"):
        fc.clip_loss(x4, x5, 1.0, row_ids=ids4, col_ids=ids5, equal_ids="sum", reduction="none")
    with pytest.raises(ValueError, match="text_features: got 5 rows, expected 4"):
        fc.siglip_loss(x4, x5, 1.0)
    with pytest.raises(ValueError, match="positive_weight: got 'two'"):
        fc.siglip_loss(x4, x4, 1.0, positive_weight="two")


def test_modules_pass_everything_on() -> None:
    x, y = features(8), features(8)
    for module, function, options in (
        (fc.ClipLoss, fc.clip_loss, {"equal_ids": "sum"}),
        (fc.ClipLoss, fc.clip_loss, {"absolute_margin": 0.1, "normalize": True}),
        (fc.InfoNCELoss, fc.info_nce_loss, {"relative_margin": 0.2}),
        (fc.InfoNCELoss, fc.info_nce_loss, {"equal_ids": "mean", "margin": torch.tensor(0.1)}),
        (fc.SigLipLoss, fc.siglip_loss, {"positive_weight": "mean"}),
    ):
        given = {"logit_scale": 3.0, "row_ids": IDS, "col_ids": IDS, "weight": torch.arange(1.0, 9.0)}
        assert torch.equal(module(**options)(x, y, **given), function(x, y, **given, **options))
    with pytest.raises(ValueError, match="absolute_margin: got it with equal_ids='sum'"):
        fc.ClipLoss(equal_ids="sum", absolute_margin=0.1)


def test_a_guide_decides_what_is_left_out(backend: str) -> None:
    """Our features say that nothing is similar, the guide that columns 0 and 1 are: each is left out for the other."""
    x = y = torch.eye(3)
    guide = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    found = fc.clip_loss(x, y, 2.0, guide=(guide, guide), absolute_margin=0.2, reduction="none", backend=backend)
    kept = torch.tensor([2.0, 0.0]).logsumexp(0).item() - 2.0
    both = torch.tensor([2.0, 0.0, 0.0]).logsumexp(0).item() - 2.0
    assert found.tolist() == pytest.approx([kept, kept, both])


def test_a_guide_of_own_and_of_shared_negatives() -> None:
    query, key, negatives = torch.eye(2), torch.eye(2), torch.zeros(3, 2)
    guide = (torch.ones(2, 1), torch.ones(2, 1) * 0.5, torch.tensor([[0.4], [0.6], [0.7]]))
    of_shared = fc.info_nce_loss(query, key, logit_scale=1.0, negatives=negatives, guide=guide)
    assert of_shared.item() == pytest.approx(torch.tensor([1.0, 0.0, 0.0]).logsumexp(0).item() - 1.0)
    own = negatives.expand(2, 3, 2)
    of_own = fc.info_nce_loss(query, key, logit_scale=1.0, negatives=own, guide=(*guide[:2], guide[2].expand(2, 3, 1)))
    assert of_own.item() == pytest.approx(of_shared.item())


@pytest.mark.parametrize(
    ("guide", "error", "text"),
    [
        (torch.ones(4, 2), TypeError, "guide: got Tensor, expected a tuple of 2"),
        ((torch.ones(4, 2),), TypeError, "guide: got 1 tensors, expected a tuple of 2"),
        ((torch.ones(4, 2), [1.0]), TypeError, r"guide\[1\]: got list, expected a tensor of shape \(4, G\)"),
        ((torch.ones(3, 2), torch.ones(4, 2)), ValueError, r"guide\[0\]: got shape \(3, 2\), expected \(4, G\)"),
        ((torch.ones(4, 2), torch.ones(4, 3)), ValueError, r"guide\[1\]: got shape \(4, 3\), expected \(4, G\)"),
        ((torch.ones(4, 2), torch.ones(4, 2).long()), TypeError, r"guide\[1\]: got dtype torch.int64"),
    ],
)
def test_bad_guides(guide: object, error: type, text: str) -> None:
    for loss in (fc.clip_loss, fc.info_nce_loss):
        with pytest.raises(error, match=text):
            loss(x4, x4, logit_scale=1.0, guide=guide)


@pytest.mark.parametrize("form", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"weight": torch.arange(1.0, 9.0)}])
def test_shared_negatives_are_no_rows_of_the_other_direction(form: str, options: dict, backend: str) -> None:
    query, key, negatives, ids = features(8), features(8), features(5), torch.arange(8) // 3
    given = {"logit_scale": 5.0, "row_ids": ids, "equal_ids": form, "backend": backend, **options}
    found = fc.info_nce_loss(
        query, key, negatives=negatives, col_ids=torch.cat((ids, torch.arange(5))), symmetric=True, **given
    )
    rows = fc.info_nce_loss(query, key, negatives=negatives, col_ids=torch.cat((ids, torch.arange(5))), **given)
    columns = fc.info_nce_loss(key, query, col_ids=ids, **given)
    torch.testing.assert_close(found, (rows + columns) / 2)


def test_weights_count_with_any_reduction_and_dtype(backend: str) -> None:
    # float16 cannot hold the sum of the weights.
    x, y, weight = features(250), features(250), torch.full((250,), 300.0, dtype=torch.float16)
    ids = torch.arange(250) // 2
    plain = fc.clip_loss(x, y, 5.0, backend=backend)
    torch.testing.assert_close(fc.clip_loss(x, y, 5.0, weight=weight, backend=backend), plain)
    for options in ({}, {"row_ids": ids, "col_ids": ids, "equal_ids": "mean"}):
        given = {"reduction": "none", "backend": backend, **options}
        found = fc.clip_loss(x, y, 5.0, weight=weight, **given)
        torch.testing.assert_close(found, 300 * fc.clip_loss(x, y, 5.0, **given))


def test_targets_are_checked_where_they_become_ids() -> None:
    for options in (several, {"absolute_margin": 0.1}, {}):
        with pytest.raises(ValueError, match="targets: got values from 0 to 9, expected 0 to 3"):
            fc.info_nce_loss(x4, x4, targets=torch.tensor([0, 1, 2, 9]), **options)


@pytest.mark.parametrize("form", ["exclude", "mean", "sum"])
def test_a_positive_in_an_empty_slot_makes_the_loss_infinite(form: str, backend: str) -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    loss = fc.info_nce_loss(x4, x4, row_ids=ids4, col_ids=ids4, equal_ids=form, col_bias=bias, backend=backend)
    assert loss == torch.inf


@pytest.mark.parametrize("d", [768, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_count_at_margin_0_for_any_width(d: int, dtype: torch.dtype, backend: str) -> None:
    centre = torch.randn(1, d)
    keys = F.normalize(centre + 0.3 * torch.randn(1, d), dim=1).repeat(64, 1).to(dtype)
    queries = F.normalize(centre + 0.2 * torch.randn(64, d), dim=1).to(dtype)
    found = fc.info_nce_loss(queries, keys, logit_scale=10.0, absolute_margin=0.0, reduction="none", backend=backend)
    torch.testing.assert_close(found, torch.full_like(found, 64.0).log(), atol=1e-2, rtol=0)


def test_numbers_of_numpy_and_numbers_that_change_under_compile() -> None:
    x, y = features(8), features(8)
    for name in ("absolute_margin", "relative_margin", "debias", "hardness"):
        found = fc.clip_loss(x, y, 5.0, **{name: np.float32(0.25)})
        assert torch.equal(found, fc.clip_loss(x, y, 5.0, **{name: 0.25}))
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda a, b, value, name=name: fc.clip_loss(a, b, 5.0, **{name: value}), fullgraph=True, backend="aot_eager"
        )
        for value in (0.1, 0.2, 0.3):
            torch.testing.assert_close(compiled(x, y, value), fc.clip_loss(x, y, 5.0, **{name: value}))


def test_guides_of_changing_sizes_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b, c, d: fc.clip_loss(a, b, 5.0, guide=(c, d)), fullgraph=True, backend="aot_eager"
    )
    for n in (12, 9, 7):
        given = features(n), features(n), features(n, 3), features(n, 3)
        torch.testing.assert_close(compiled(*given), fc.clip_loss(*given[:2], 5.0, guide=given[2:]))


@pytest.mark.parametrize(
    ("text", "error", "options"),
    [
        ("absolute_margin: got", ValueError, {"absolute_margin": 10**400}),
        ("hardness: got", ValueError, {"hardness": 10**400}),
        (
            "logit_scale: got -5.0 with a margin",
            ValueError,
            {"absolute_margin": 0.1, "logit_scale": torch.tensor(-5.0)},
        ),
        (
            "guide[0]: got values from nan to nan",
            ValueError,
            {"guide": (torch.full((4, 2), torch.nan), torch.ones(4, 2))},
        ),
        ("guide[0]: got shape (4, 0)", ValueError, {"guide": (torch.ones(4, 0), torch.ones(4, 0))}),
        ("guide[0]: got layout", TypeError, {"guide": (torch.ones(4, 2).to_sparse(), torch.ones(4, 2))}),
        ("weight: got layout", TypeError, {"weight": torch.ones(4).to_sparse()}),
    ],
)
def test_more_bad_input(text: str, error: type, options: dict) -> None:
    for loss in (fc.clip_loss, fc.info_nce_loss):
        with pytest.raises(error) as raised:
            loss(x4, x4, **{"logit_scale": 1.0, **options})
        assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    "options",
    [
        {"debias": torch.tensor(2.0)},
        {"debias": 0.1, "equal_ids": "mean"},
        {"hardness": 0.1, "absolute_margin": 0.1},
        {"label_smoothing": 0.1, "relative_margin": 0.1},
    ],
)
def test_modules_refuse_at_construction(options: dict) -> None:
    for module in (fc.ClipLoss, fc.InfoNCELoss):
        with pytest.raises(ValueError, match=r"debias|absolute_margin|equal_ids|label_smoothing"):
            module(**options)
