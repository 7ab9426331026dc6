"""The primitives on values that training produces only by accident, against float64, under the error budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from adversarial import (
    BACKENDS,
    BEYOND,
    DTYPES,
    FINITE,
    SEEDS,
    SHARED,
    Results,
    bits,
    evaluate,
    examples,
    largest_error,
    tiny,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.core.budget import allowed, difference
from fused_contrastive.core.order import ahead
from fused_contrastive.testing import harness, oracle, textbook_tokens
from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.testing.registry import PRIMITIVES

SCALES = st.sampled_from((0.01, 1.0, 100.0))
PAIRS = st.tuples(st.sampled_from(list(FINITE)), st.sampled_from(list(FINITE)))


@examples(150)
@given(
    backend=BACKENDS, option=st.sampled_from(list(PRIMITIVES["contrastive_stats"].options)), m=st.integers(1, 12),
    n=st.integers(1, 12), d=st.integers(1, 20), dtype=st.sampled_from(DTYPES), scale=SCALES,
    fills=PAIRS, seed=SEEDS,
)  # fmt: skip
def test_statistics_keep_the_budget(backend, option, m, n, d, dtype, scale, fills, seed) -> None:  # type: ignore[no-untyped-def]
    case = Case("contrastive_stats", option, Sizes(n, d, dtype, scale, m=m), seed)
    torch.manual_seed(seed)
    x, y, *_ = case.inputs()[0].values()
    x, y = FINITE[fills[0]](x), FINITE[fills[1]](y)
    if not (x.isfinite().all() and y.isfinite().all()):
        return  # float16 has no such values
    norms = [t.double().norm(dim=1).max().item() for t in (x, y)]
    for found in harness.deviations(replace(case, features=(x, y)), backend):
        if found.quantity.startswith("d") and scale * norms[0] * norms[1] > SHARED:
            assert found.error < torch.inf, f"{case} {fills}: {found}"
        elif found.allowed < torch.finfo(dtype).max / 4:
            assert found.error <= found.allowed + tiny(dtype, scale, *norms), f"{case} {fills}: {found}"


def denominators(
    x: Tensor, y: Tensor, scale: Tensor, ids: Tensor | None = None, equal_ids: str = "exclude", form: str | None = None
) -> Tensor:
    """The definition of ``self_stats``, on the whole matrix."""
    logits = (oracle.LOGITS[form] if form else oracle.exact)(x, y, scale)
    excluded = torch.eye(len(x), dtype=torch.bool)
    if ids is not None:
        equal = ids[:, None] == ids
        excluded = excluded | (equal if equal_ids == "exclude" else ~equal)
    return oracle.logsumexp(logits.masked_fill(excluded, -torch.inf), 1)


@examples(60)
@given(
    backend=BACKENDS, n=st.integers(1, 12), d=st.integers(1, 20), scale=SCALES,
    fill=st.sampled_from(list(FINITE)), ids=st.sampled_from((None, "exclude", "only")), seed=SEEDS,
)  # fmt: skip
def test_self_stats_keep_the_budget(backend, n, d, scale, fill, ids, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    x = FINITE[fill](torch.nn.functional.normalize(torch.randn(n, d), dim=1))
    options = {} if ids is None else {"ids": torch.randint(3, (n,)) - 1, "equal_ids": ids}
    leaves = {"x": x, "scale": torch.tensor(scale)}

    def whole(form: str | None) -> Callable[..., Tensor]:
        return lambda x, scale: finite(denominators(x, x, scale, **options, form=form))

    ours = evaluate(lambda x, scale: finite(fc.self_stats(x, scale, **options, backend=backend)), leaves, {})
    assert_close(ours, whole, leaves, scale, f"self_stats of {fill}, {n} x {d}")


def finite(t: Tensor) -> Tensor:
    """Replaces the -inf of empty rows by 0, which has no gradient."""
    return t.masked_fill(t == -torch.inf, 0)


@examples(60)
@given(
    backend=BACKENDS, m=st.integers(1, 12), n=st.integers(1, 12), d=st.integers(1, 20), ids=st.booleans(),
    scale=SCALES,
    fills=PAIRS, seed=SEEDS,
)  # fmt: skip
def test_sigmoid_stats_keep_the_budget(backend, m, n, d, ids, scale, fills, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    x, y = (
        FINITE[fill](torch.nn.functional.normalize(torch.randn(size, d), dim=1))
        for fill, size in zip(fills, (m, n), strict=True)
    )
    targets = torch.randint(n, (m,))
    row_ids, col_ids = torch.randint(3, (m,)), torch.randint(3, (n,))
    options: dict[str, Any] = {"targets": targets, **({"row_ids": row_ids, "col_ids": col_ids} if ids else {})}
    leaves = {"x": x, "y": y, "scale": torch.tensor(scale)}

    def whole(form: str | None) -> Callable[..., Any]:
        def stats(x: Tensor, y: Tensor, scale: Tensor) -> fc.SigmoidStats:
            logits = (oracle.LOGITS[form] if form else oracle.exact)(x, y, scale)
            signs = torch.where(row_ids[:, None] == col_ids, -1.0, 1.0).to(x) if ids else torch.ones_like(logits)
            pairs = -torch.nn.functional.logsigmoid(-signs * logits)
            own = torch.arange(n) == targets[:, None]
            return fc.SigmoidStats(logits[own], pairs.masked_fill(own, 0).sum(dim=1))

        return stats

    ours = evaluate(fc.sigmoid_stats, leaves, {**options, "backend": backend})
    assert_close(ours, whole, leaves, scale, f"sigmoid_stats of {fills}, {m} x {n} x {d}")


def assert_close(
    ours: Results, whole: Callable[[str | None], Callable[..., Any]], leaves: dict[str, Tensor], scale: float, of: str
) -> None:
    """Asserts the error budget for float32 outputs, whose sum is weighted by up to 1.5."""
    truth = evaluate(whole(None), {name: t.double() for name, t in leaves.items()}, {})
    eager = [evaluate(whole(form), leaves, {}) for form in oracle.LOGITS]
    norms = [t.norm(dim=1).max().item() for name, t in leaves.items() if name != "scale"]
    x, y = norms[0], norms[-1]
    count = max(len(t) for name, t in leaves.items() if name != "scale")
    terms = {"dx": 1.5 * scale * y * count, "dy": 1.5 * scale * x * count, "dscale": 1.5 * count**2 * x * y}
    for name, value in ours.items():
        exact = truth[name]
        if name.startswith("d") and scale * x * y > SHARED:
            assert value.isfinite().all(), (of, name, value)
            continue
        error = largest_error(eager, name, exact)
        largest = exact.abs().max().item() + terms.get(name, 2 * scale * x * y)
        most = allowed(error, torch.float32, largest) + tiny(torch.float32, scale, x, y)
        assert difference(value, exact) <= most, (of, name, value, exact, most)


def of_norm_1(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@examples(60)
@given(
    backend=BACKENDS, sizes=st.tuples(*(st.integers(1, 7) for _ in range(4))), d=st.integers(1, 20),
    fills=PAIRS, seed=SEEDS,
)  # fmt: skip
def test_max_sim_keeps_the_budget(backend, sizes, d, fills, seed) -> None:  # type: ignore[no-untyped-def]
    """Scores keep it, and so do gradients if no products tie: in a tie any of the tokens may get the gradient."""
    torch.manual_seed(seed)
    (m, n, t, p), one = sizes, torch.tensor(1.0)
    leaves = {"x": FINITE[fills[0]](of_norm_1(m, t, d)), "y": FINITE[fills[1]](of_norm_1(n, p, d))}
    ours = evaluate(lambda x, y: fc.max_sim(x, y, direction="both", backend=backend), leaves, {})

    def whole(form: oracle.Logits) -> Callable[..., fc.MaxSimScores]:
        def scores(x: Tensor, y: Tensor) -> fc.MaxSimScores:
            of_x, of_y = textbook_tokens._max_sim(form, x, y, one.to(x), None, None)
            return fc.MaxSimScores(of_x * t, of_y * p)

        return scores

    truth = evaluate(whole(oracle.exact), {name: v.double() for name, v in leaves.items()}, {})
    eager = [evaluate(whole(form), leaves, {}) for form in oracle.LOGITS.values()]
    x, y = (v.norm(dim=-1).max().item() for v in leaves.values())
    terms = {"x": t * x * y, "y": p * x * y, "dx": 1.5 * n * p * y, "dy": 1.5 * m * t * x}
    ties = d == 1 or set(fills) - {"ordinary", "logits to 1e4", "huge"}
    for name, value in ours.items():
        if ties and name.startswith("d"):
            assert value.isfinite().all()
            continue
        error = largest_error(eager, name, truth[name])
        most = allowed(error, torch.float32, truth[name].abs().max().item() + terms[name])
        most += tiny(torch.float32, d, x, y)
        assert difference(value, truth[name]) <= most, (sizes, d, fills, name)


@examples(80)
@given(
    backend=BACKENDS, m=st.integers(1, 12), n=st.integers(1, 40), data=st.data(), seed=SEEDS,
    fills=st.tuples(st.sampled_from([*FINITE, *BEYOND]), st.sampled_from([*FINITE, *BEYOND])),
)  # fmt: skip
def test_rankings(backend, m, n, data, seed, fills) -> None:  # type: ignore[no-untyped-def]
    """With D = 1 each product has one rounding, so that the whole order is determined."""
    torch.manual_seed(seed)
    queries, candidates = (
        {**FINITE, **BEYOND}[fill](torch.randn(size, 1)) for fill, size in zip(fills, (m, n), strict=True)
    )
    before = bits(queries), bits(candidates)
    k = data.draw(st.integers(1, n))
    scores, indices = fc.rank(queries, candidates, k, backend=backend)
    everything, columns = queries @ candidates.T, torch.arange(n)
    places = torch.stack([ahead(row, columns, row[:, None], columns[:, None]).sum(dim=1) for row in everything])
    assert torch.equal(places.argsort(dim=1)[:, :k], indices)
    torch.testing.assert_close(scores, everything.gather(1, indices), rtol=0, atol=0, equal_nan=True)
    targets = torch.randint(n, (m,))
    ranks = fc.target_ranks(queries, candidates, targets=targets, backend=backend)
    assert torch.equal(ranks, places.gather(1, targets[:, None]).squeeze(1))
    assert torch.equal(before[0], bits(queries))
    assert torch.equal(before[1], bits(candidates))
