"""Metrics of groups: ranks within each group, compared with those from each group's sorted logits in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranked import Expected, check, same_step
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.core.spec import StatsSpec

SCALE, NEAR, D = 5.0, 1e-4, 12
LENGTHS = torch.tensor([3, 0, 1, 70, 0, 12])  # a group of several tiles on a GPU, one of one row, two of no rows
LONG = torch.tensor([40, 1, 600, 0, 130, 7])  # on a CPU all threads share the group of 600 rows

LOSSES: dict[str, Callable[..., Any]] = {
    "clip": lambda x, y, **o: fc.clip_loss(x, y, SCALE, **o),
    "info_nce": lambda x, y, **o: fc.info_nce_loss(x, y, logit_scale=SCALE, **o),
    "nt_xent": lambda x, y, **o: fc.nt_xent_loss(x, y, logit_scale=SCALE, normalize=False, **o),
    "siglip": lambda x, y, **o: fc.siglip_loss(x, y, SCALE, -3.0, **o),
}


def features(lengths: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = (F.normalize(torch.randn(int(lengths.sum()), D), dim=1).to(dtype) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def split(lengths: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of each group that has any."""
    parts = zip(*(t.detach().split(lengths.tolist()) for t in tensors), strict=True)
    return (each for each in parts if len(each[0]))


def of_matrix(s: Tensor, targets: Tensor, left_out: Tensor | None = None) -> Expected:
    """From the logits (M, N) of one group. Float32 may order logits that differ by less than NEAR in either way."""
    places = torch.arange(len(s)), targets
    positive = s[places]
    s = s.clone() if left_out is None else s.masked_fill(left_out, -torch.inf)
    ranks = []
    for near in (NEAR, -NEAR):
        s[places] = positive + near
        ranks.append(s.argsort(dim=1, descending=True).argsort(dim=1)[places])
    s[places] = -torch.inf
    return positive, s.amax(dim=1), *ranks


def of_groups(matrices: list[tuple[Tensor, ...]]) -> Expected:
    return tuple(map(torch.cat, zip(*(of_matrix(*each) for each in matrices), strict=True)))


def expected(name: str, lengths: Tensor, x: Tensor, y: Tensor) -> tuple[Expected, Expected | None]:
    """What to expect of the rows, and of the columns if the loss has ranks for them."""
    rows, cols = [], []
    for a, b in split(lengths, x, y):
        i = torch.arange(len(a))
        if name == "nt_xent":
            z = torch.cat((a, b)).double()
            rows.append((SCALE * z @ z.T, torch.arange(len(z)).roll(len(a)), torch.eye(len(z), dtype=torch.bool)))
            continue
        s = SCALE * a.double() @ b.double().T - (3 if name == "siglip" else 0)
        rows.append((s, i))
        cols.append((s.T, i))
    return of_groups(rows), of_groups(cols) if name == "clip" else None


@pytest.mark.thinned("name", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_are_within_the_group(name: str, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton backend takes no float64 features")
    x, y = features(LENGTHS, dtype)

    def loss(**more: Any) -> Any:
        return LOSSES[name](x, y, lengths=LENGTHS, backend=backend, **more)

    check(loss(metrics=True)[1], *expected(name, LENGTHS, x, y))
    same_step(loss, x, y)


@pytest.mark.thinned("name", "budget", everywhere=True)
@pytest.mark.parametrize("budget", [0, "auto", 600 * 1000])
@pytest.mark.parametrize("name", LOSSES)
def test_small_and_large_groups(name: str, budget: int | str, threads: None) -> None:
    """The same bits on any number of threads, whether one of them or all compute a group."""
    x, y = features(LONG)
    found = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        loss, metrics = LOSSES[name](x, y, lengths=LONG, metrics=True, memory_budget=budget, backend="cpp")
        check(metrics, *expected(name, LONG, x, y))
        found.append([loss, *(t for t in metrics if t is not None)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    "options",
    [
        {"decoupled": True},
        {"reduction": "none"},
        {"reduction": "sum"},
        {"weight": torch.arange(1.0, 87.0)},
        {"normalize": True},
        {"decoupled": True, "reduction": "none", "normalize": True},
    ],
)
def test_options_of_clip_change_no_rank(backend: str, options: dict[str, Any]) -> None:
    x, y = features(LENGTHS)

    def loss(**more: Any) -> Any:
        return fc.clip_loss(x, y, SCALE, lengths=LENGTHS, backend=backend, **options, **more)

    check(loss(metrics=True)[1], *expected("clip", LENGTHS, x, y))
    if not options.get("decoupled"):  # a decoupled loss of a group of one row is -inf
        same_step(loss, x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_order_of_rows_is_that_of_their_losses(backend: str, reduction: str) -> None:
    """NT-Xent's rows are ordered by group and, in each group, by view."""
    x, y = features(LENGTHS)
    loss, metrics = fc.nt_xent_loss(
        x, y, logit_scale=SCALE, normalize=False, lengths=LENGTHS, reduction=reduction, metrics=True, backend=backend
    )
    each = [LOSSES["nt_xent"](a, b, reduction="none", metrics=True) for a, b in split(LENGTHS, x, y)]
    wanted = torch.cat([found for found, _ in each])
    torch.testing.assert_close(loss, wanted if reduction == "none" else wanted.mean(), rtol=1e-5, atol=1e-6)
    assert torch.equal(metrics.row_rank, torch.cat([found.row_rank for _, found in each]))


def test_what_a_rule_leaves_out_has_no_rank(backend: str) -> None:
    x, y = features(LENGTHS)
    ids = torch.arange(len(x)) // 3  # equal ids in two groups do not relate a pair
    ids[:3] = ids[-3:]
    given = {"lengths": LENGTHS, "row_ids": ids, "col_ids": ids, "metrics": True, "backend": backend}
    _, metrics = fc.clip_loss(x, y, SCALE, **given)
    _, of_sigmoids = fc.siglip_loss(x, y, SCALE, -3.0, **given)
    matrices = []
    for a, b, i in split(LENGTHS, x, y, ids):
        matrices.append((SCALE * a.double() @ b.double().T, torch.arange(len(a)), i[:, None] == i))
    rows = of_groups(matrices)
    check(metrics, rows, of_groups([(s.T, i, out) for s, i, out in matrices]))
    check(of_sigmoids, (rows[0] - 3, rows[1] - 3, *rows[2:]), None)
    _, metrics = fc.clip_loss(x, y, SCALE, absolute_margin=0.1, lengths=LENGTHS, metrics=True, backend=backend)
    assert metrics.row_rank.eq(0).all()  # every negative above the positive is left out
    assert metrics.hardest_negative.le(metrics.positive - SCALE * 0.1 + NEAR).all()


def test_targets_biases_and_more_columns(backend: str) -> None:
    x, y = features(torch.tensor([15]))[0], features(torch.tensor([35]))[0]
    targets, bias = torch.randint(7, (15,)), torch.randn(35)

    def loss(**more: Any) -> Any:
        return fc.info_nce_loss(
            x.view(5, 3, D), y.view(5, 7, D), logit_scale=SCALE, targets=targets, col_bias=bias, backend=backend, **more
        )  # fmt: skip

    s = SCALE * x.detach().double().view(5, 3, D) @ y.detach().double().view(5, 7, D).mT + bias.double().view(5, 1, 7)
    check(loss(metrics=True)[1], of_groups(list(zip(s, targets.view(5, 3), strict=True))), None)
    same_step(loss, x, y)


def test_equal_groups_and_both_directions(backend: str) -> None:
    """Features (B, N, D) have the same metrics as the flattened rows with lengths."""
    lengths = torch.tensor([5, 5, 5])
    x, y = features(lengths)
    for name, more in (*((name, {}) for name in LOSSES), ("info_nce", {"symmetric": True})):
        _, of_rows = LOSSES[name](x, y, lengths=lengths, metrics=True, backend=backend, **more)
        _, batched = LOSSES[name](x.view(3, 5, D), y.view(3, 5, D), metrics=True, backend=backend, **more)
        for a, b in zip(of_rows, batched, strict=True):
            assert (a is None) if b is None else torch.equal(a, b)
    check(batched, *expected("clip", lengths, x, y))


def test_own_negatives_count(backend: str) -> None:
    x, y = features(LENGTHS)
    own = F.normalize(torch.randn(len(x), 4, D), dim=2)
    _, metrics = fc.info_nce_loss(
        x, y, logit_scale=SCALE, lengths=LENGTHS, negatives=own, metrics=True, backend=backend
    )
    matrices = []
    for a, b, c in split(LENGTHS, x, y, own):
        more = (a.double()[:, None] * c.double()).sum(dim=2)
        matrices.append((SCALE * torch.cat((a.double() @ b.double().T, more), dim=1), torch.arange(len(a))))
    check(metrics, of_groups(matrices), None)


def test_ties_nan_and_rows_alone(backend: str) -> None:
    lengths = torch.tensor([4, 1, 0, 4])
    x = features(lengths)[0].detach()
    y = x.clone()
    y[2] = y[0]  # a copy of the positive is no better than the positive
    y[8] = 2 * x[1]  # a column with a higher logit than row 1's positive, in another group
    _, metrics = fc.clip_loss(x, y, SCALE, lengths=lengths, metrics=True, backend=backend)
    assert metrics.row_rank[[0, 1, 3, 4]].eq(0).all()
    assert metrics.hardest_negative[4] == -torch.inf
    y[3], y[8] = torch.nan, x[8]
    _, metrics = fc.clip_loss(x, y, SCALE, lengths=lengths, metrics=True, backend=backend)
    assert metrics.row_rank[3] == 3  # a positive of NaN is last in its group
    assert metrics.row_rank[[0, 1]].eq(1).all()  # and a negative of NaN is above
    assert metrics.row_rank[[4, 5, 6, 7, 8]].eq(0).all()
    ones = torch.ones(9, dtype=torch.int64)
    _, metrics = fc.clip_loss(x, x.clone(), SCALE, lengths=ones, metrics=True, backend=backend)
    assert metrics.col_rank is not None
    assert not metrics.row_rank.any()
    assert not metrics.col_rank.any()
    assert metrics.hardest_negative.eq(-torch.inf).all()


def test_summaries_are_over_all_rows(backend: str) -> None:
    x, y = features(LENGTHS)
    _, metrics = fc.clip_loss(x, y, SCALE, lengths=LENGTHS, metrics=True, backend=backend)
    each = [fc.clip_loss(a, b, SCALE, metrics=True)[1] for a, b in split(LENGTHS, x, y)]
    ranks = torch.cat([t for found in each for t in (found.row_rank, found.col_rank) if t is not None])
    assert len(ranks) == 2 * len(x)
    torch.testing.assert_close(metrics.top1, ranks.eq(0).float().mean())
    torch.testing.assert_close(metrics.top(5), ranks.lt(5).float().mean())
    assert metrics.summary()["mean_rank"] == pytest.approx(ranks.float().mean().item())


@pytest.mark.thinned("name", "form", everywhere=True)
@pytest.mark.parametrize("form", ["batched", "packed"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled(name: str, form: str) -> None:
    x, y = features(torch.tensor([9]))
    lengths = torch.tensor([3, 0, 1, 5]) if form == "packed" else None
    if form == "batched":
        x, y = (t.detach().view(3, 3, D).requires_grad_() for t in (x, y))

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss, metrics = LOSSES[name](x, y, lengths=lengths, metrics=True)
        return loss, metrics.row_rank, metrics.hardest_negative, metrics.top1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, y)
    for found, right in zip(compiled, step(x, y), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(compiled[0], x)[0].isfinite().all()


def test_autocast_verify_and_modules() -> None:
    x, y = features(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        _, metrics = fc.clip_loss(x, y, SCALE, lengths=LENGTHS, metrics=True)
    check(metrics, *expected("clip", LENGTHS, x.bfloat16(), y.bfloat16()))
    with fc.verify_against_reference(every=1, on_breach="raise") as watch:
        fc.clip_loss(x, y, SCALE, lengths=LENGTHS, metrics=True)
    assert watch.checked == 1
    assert fc.verify(fc.clip_loss, x, y, SCALE, lengths=LENGTHS, metrics=True).held
    for name, module in (
        ("clip", fc.ClipLoss()), ("siglip", fc.SigLipLoss()), ("info_nce", fc.InfoNCELoss()),
        ("nt_xent", fc.NTXentLoss(normalize=False)),
    ):  # fmt: skip
        given = {"logit_bias": -3.0} if name == "siglip" else {}
        loss, metrics = module(x, y, logit_scale=SCALE, lengths=LENGTHS, metrics=True, **given)
        torch.testing.assert_close(loss, LOSSES[name](x, y, lengths=LENGTHS))
        check(metrics, *expected(name, LENGTHS, x, y))


@pytest.mark.parametrize("upper", [False, True])
def test_operator(upper: bool) -> None:
    x, y = (t.detach() for t in features(LENGTHS))
    y = x if upper else y
    reference = torch.zeros(len(x))
    spec = StatsSpec(
        torch.tensor(SCALE), row_lengths=LENGTHS, col_lengths=LENGTHS, row_reference=reference,
        col_reference=reference, paired=not upper, want_col=not upper, upper=upper,
    )  # fmt: skip
    found = []
    for backend in ("reference", "cpp"):
        arguments = (x, y, *spec, backend)
        torch.library.opcheck(torch.ops.fused_contrastive.stats_forward.default, arguments)
        found.append(torch.ops.fused_contrastive.stats_forward(*arguments)[:3])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="row_reference: got shape"):
        torch.ops.fused_contrastive.stats_forward(x, y, *spec._replace(row_reference=reference[1:]), "cpp")
