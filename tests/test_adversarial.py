"""Values and layouts that training never means to make: every public function, on every backend.

Where float32 holds the truth, values and gradients keep the error budget. Where it does not, nothing crashes, all
backends are NaN, inf and finite in the same places, and no loss is finite that the float64 formula says is not.
Arguments stay as they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from adversarial import BEYOND, FINITE, LAYOUTS, bits, kinds
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from seeds import SEED
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.core.order import ahead
from fused_contrastive.testing import budget, cases, family, oracle, textbook

Results = dict[str, Tensor]
BACKENDS = st.sampled_from(["reference", "cpp"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 2**31)


def examples(count: int) -> Callable[[Any], Any]:
    chosen = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    return lambda test: hypothesis_seed(SEED)(chosen(test))


def evaluate(function: Callable[..., Any], leaves: dict[str, Tensor], options: dict[str, Any]) -> Results:
    """Outputs and gradients, in float64, of tensors as they are: no copy. They must not change."""
    held = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    before = {name: bits(t) for name, t in held.items()}
    found = function(**held, **options)
    outputs = {"loss": found} if isinstance(found, Tensor) else {k: v for k, v in found._asdict().items() if v is not None}
    total = sum((t.double() * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in outputs.values())
    gradients = torch.autograd.grad(total, list(held.values()), allow_unused=True)
    results = {name: t.detach().double() for name, t in outputs.items()}
    for (name, leaf), g in zip(held.items(), gradients, strict=True):
        results[f"d{name}"] = (torch.zeros_like(leaf) if g is None else g).double()
    for name, t in held.items():
        assert torch.equal(bits(t), before[name]), f"{name} was written to"
    return results


# The four primitives and clip_loss ---------------------------------------------------------------------------------


@examples(150)
@given(
    backend=BACKENDS, option=st.sampled_from((*cases.STATS_OPTIONS, *cases.CLIP_OPTIONS)), m=st.integers(1, 12),
    n=st.integers(1, 12), d=st.integers(1, 20), dtype=st.sampled_from(DTYPES), scale=st.sampled_from((0.01, 1.0, 100.0)),
    fills=st.tuples(st.sampled_from(list(FINITE)), st.sampled_from(list(FINITE))), seed=SEEDS,
)  # fmt: skip
def test_statistics_keep_the_budget(backend, option, m, n, d, dtype, scale, fills, seed) -> None:  # type: ignore[no-untyped-def]
    n = max(n, 2) if "decoupled" in option else n  # of a single pair -inf, the denominator being empty
    m = n if option in cases.CLIP_OPTIONS else m
    case = cases.Case(dtype, m, n, d, scale, option, seed)
    torch.manual_seed(seed)
    made = case.inputs()
    inputs = replace(made, x=FINITE[fills[0]](made.x), y=FINITE[fills[1]](made.y))
    if not (inputs.x.isfinite().all() and inputs.y.isfinite().all()):
        return  # float16 has no such values
    norms = [t.double().norm(dim=1).max().item() for t in (inputs.x, inputs.y)]
    for found in budget.deviations(case, backend, inputs, budget.expected(case, inputs)):
        limit = torch.finfo(dtype).max / 4
        if found.allowed < limit:
            assert found.error <= found.allowed + tiny(dtype, scale, *norms), f"{case} {fills}: {found}"


def tiny(dtype: torch.dtype, *factors: float) -> float:
    """What is lost below the smallest normal number, where a GEMM may count a subnormal as 0, times what follows."""
    lost = 8 * torch.finfo(dtype).tiny
    for factor in factors:
        lost *= max(1.0, factor)
    return lost


def largest_error(eager: list[Results], name: str, truth: Tensor) -> float:
    """Eager's; a NaN of it allows nothing."""
    errors = [budget.difference(e[name], truth) for e in eager]
    return max(0.0 if error != error else error for error in errors)


def denominators(
    x: Tensor, y: Tensor, scale: Tensor, ids: Tensor | None = None, equal_ids: str = "exclude", form: str | None = None
) -> Tensor:
    """self_stats on the whole matrix."""
    logits = (oracle.LOGITS[form] if form else oracle._oracle_logits)(x, y, scale)
    excluded = torch.eye(len(x), dtype=torch.bool)
    if ids is not None:
        equal = ids[:, None] == ids
        excluded = excluded | (equal if equal_ids == "exclude" else ~equal)
    return oracle.logsumexp(logits.masked_fill(excluded, -torch.inf), 1)


@examples(60)
@given(
    backend=BACKENDS, n=st.integers(1, 12), d=st.integers(1, 20), scale=st.sampled_from((0.01, 1.0, 100.0)),
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
    """Of empty rows, -inf: 0 without a gradient."""
    return t.masked_fill(t == -torch.inf, 0)


@examples(60)
@given(
    backend=BACKENDS, m=st.integers(1, 12), n=st.integers(1, 12), d=st.integers(1, 20), ids=st.booleans(),
    scale=st.sampled_from((0.01, 1.0, 100.0)),
    fills=st.tuples(st.sampled_from(list(FINITE)), st.sampled_from(list(FINITE))), seed=SEEDS,
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
            logits = (oracle.LOGITS[form] if form else oracle._oracle_logits)(x, y, scale)
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
    """The budget, for float32 outputs without a mean over them: |weights| to 1.5."""
    truth = evaluate(whole(None), {name: t.double() for name, t in leaves.items()}, {})
    eager = [evaluate(whole(form), leaves, {}) for form in oracle.LOGITS]
    norms = [t.norm(dim=1).max().item() for name, t in leaves.items() if name != "scale"]
    x, y = norms[0], norms[-1]
    count = max(len(t) for name, t in leaves.items() if name != "scale")
    terms = {"dx": 1.5 * scale * y * count, "dy": 1.5 * scale * x * count, "dscale": 1.5 * count**2 * x * y}
    for name, value in ours.items():
        exact = truth[name]
        error = largest_error(eager, name, exact)
        largest = exact.abs().max().item() + terms.get(name, 2 * scale * x * y)
        allowed = 2 * error + 8 * torch.finfo(torch.float32).eps * largest + tiny(torch.float32, scale, x, y)
        assert budget.difference(value, exact) <= allowed, (of, name, value, exact, allowed)


def of_norm_1(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@examples(60)
@given(
    backend=BACKENDS, sizes=st.tuples(*(st.integers(1, 7) for _ in range(4))), d=st.integers(1, 20),
    fills=st.tuples(st.sampled_from(list(FINITE)), st.sampled_from(list(FINITE))), seed=SEEDS,
)  # fmt: skip
def test_max_sim_keeps_the_budget(backend, sizes, d, fills, seed) -> None:  # type: ignore[no-untyped-def]
    """Scores; and gradients but where equal products make them anyone's."""
    torch.manual_seed(seed)
    (m, n, t, p), one = sizes, torch.tensor(1.0)
    leaves = {"x": FINITE[fills[0]](of_norm_1(m, t, d)), "y": FINITE[fills[1]](of_norm_1(n, p, d))}
    ours = evaluate(lambda x, y: fc.max_sim(x, y, direction="both", backend=backend), leaves, {})

    def whole(form: oracle.Logits) -> Callable[..., fc.MaxSimScores]:
        def scores(x: Tensor, y: Tensor) -> fc.MaxSimScores:
            of_x, of_y = textbook._max_sim(form, x, y, one.to(x), None, None)
            return fc.MaxSimScores(of_x * t, of_y * p)

        return scores

    truth = evaluate(whole(oracle._oracle_logits), {name: v.double() for name, v in leaves.items()}, {})
    eager = [evaluate(whole(form), leaves, {}) for form in oracle.LOGITS.values()]
    x, y = (v.norm(dim=-1).max().item() for v in leaves.values())
    terms = {"x": t * x * y, "y": p * x * y, "dx": 1.5 * n * p * y, "dy": 1.5 * m * t * x}
    ties = d == 1 or set(fills) - {"ordinary", "logits to 1e4", "huge"}
    for name, value in ours.items():
        if ties and name.startswith("d"):
            assert value.isfinite().all()
            continue
        error = largest_error(eager, name, truth[name])
        allowed = 2 * error + 8 * torch.finfo(torch.float32).eps * (truth[name].abs().max().item() + terms[name])
        assert budget.difference(value, truth[name]) <= allowed + tiny(torch.float32, d, x, y), (sizes, d, fills, name)


@examples(80)
@given(
    backend=BACKENDS, m=st.integers(1, 12), n=st.integers(1, 40), data=st.data(), seed=SEEDS,
    fills=st.tuples(st.sampled_from([*FINITE, *BEYOND]), st.sampled_from([*FINITE, *BEYOND])),
)  # fmt: skip
def test_rankings(backend, m, n, data, seed, fills) -> None:  # type: ignore[no-untyped-def]
    """D = 1, where a product is rounded one way: the order by definition, and every place in it."""
    torch.manual_seed(seed)
    queries, candidates = ({**FINITE, **BEYOND}[fill](torch.randn(size, 1)) for fill, size in zip(fills, (m, n), strict=True))
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


# Every loss --------------------------------------------------------------------------------------------------------


def of_tokens(case: family.FamilyCase) -> bool:
    return case.loss == "filip" or "tokens" in case.variant


def problem(
    case: family.FamilyCase, fill: str, of_all: bool, fills: dict[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The case's tensors, the features of all sides or of one of them changed."""
    torch.manual_seed(case.seed)
    leaves, options = case.inputs(torch.device("cpu"))
    features = [name for name, t in leaves.items() if t.dim() > 1]
    for name in features if of_all else features[: 1 + case.seed % len(features)][-1:]:
        leaves[name] = fills[fill](leaves[name])
    return leaves, options


DRAWN = {
    "option": st.sampled_from(family.OPTIONS),
    "n": st.integers(1, 12),
    "d": st.integers(1, 20),
    "of_all": st.booleans(),
    "seed": SEEDS,
}


def check_budget(backend: str, option: tuple[str, str], n: int, d: int, fill: str, of_all: bool, scale: float, seed: int,
                 dtype: torch.dtype) -> None:  # fmt: skip
    if option[1] == "regularised" or "decoupled" in option[1]:
        n = max(n, 2)  # of a single sample, NaN (a mean over nothing) or -inf (an empty denominator)
    case = family.FamilyCase(*option, family.Sizes(n, d, dtype, scale), seed)
    leaves, options = problem(case, fill, of_all, FINITE)
    features = [t.double() for t in leaves.values() if t.dim() > 1]
    if not all(t.isfinite().all() for t in features):
        return  # float16 has no such values
    member = family.FAMILY[case.loss]
    ours = evaluate(lambda **a: member.ours(**a, backend=backend), leaves, options)
    truth = evaluate(
        lambda **a: member.textbook(oracle._oracle_logits, **a), {name: t.double() for name, t in leaves.items()}, options
    )
    same = {name: t.to(dtype) for name, t in leaves.items()}
    eager = [evaluate(lambda form=form, **a: member.textbook(form, **a), same, options) for form in oracle.LOGITS.values()]

    # As in budget.largest_terms, of features of any norm; where they are normalised, of norm 1, and their gradient is
    # divided by what it was (F.normalize: at least 1e-12).
    normalised = "plain" in case.option and case.loss == "nt_xent" or case.option in NORMALISED
    norms = torch.cat([t.norm(dim=-1).flatten() for t in features])
    norm = 1.0 if normalised else norms.max().item()
    shrink = norms.clamp_min(1e-12).min().item() if normalised else 1.0
    logit, weight = 2 * scale * norm**2, 1.5 * (case.sizes.n if "tokens" in case.variant else 1)
    rows = sum(t.shape[:-1].numel() for t in features)
    terms = {"loss": logit, "dlogit_scale": weight * rows * norm**2, "dlogit_bias": weight * rows}
    terms["dtemperature"] = weight * rows * scale**2 * norm**2
    if case.variant == "regularised":
        terms["loss"] += norm**4
    for name, value in ours.items():
        exact = truth[name]
        term = terms.get(name, weight * (1.0 if name == "dcol_bias" else scale * norm / shrink))
        if case.variant == "regularised":
            term += norm**3
        error = largest_error(eager, name, exact)
        largest = exact.abs().max().item() + term
        kept = torch.finfo(leaves.get(name[1:], features[0]).dtype).max
        if largest > kept / 64:
            continue  # past what its dtype holds, before or after it cancels
        if of_tokens(case) and name.startswith("d") and fill not in ("ordinary", "logits to 1e4", "huge"):
            assert value.isfinite().all()  # equal products: the gradient is anyone's
            continue
        allowed = 2 * error + 8 * torch.finfo(dtype).eps * largest + tiny(dtype, scale / shrink, norm)
        difference = budget.difference(value, exact)
        assert difference <= allowed, f"{case} {fill} of_all={of_all} {backend} {name}: {difference} > {allowed}"


NORMALISED = {
    "nt_xent plain", "nt_xent decoupled", "nt_xent three views", "nt_xent three views decoupled", "info_nce weight",
    "supcon views",
}  # fmt: skip


@examples(250)
@given(
    backend=BACKENDS, fill=st.sampled_from(list(FINITE)), dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from((0.01, 1.0, 14.3, 100.0)), **DRAWN,
)  # fmt: skip
def test_losses_keep_the_budget(**drawn) -> None:  # type: ignore[no-untyped-def]
    check_budget(**drawn)


@examples(25)
@given(fill=st.sampled_from(list(FINITE)), dtype=st.just(torch.float32), scale=st.just(3.0), **DRAWN)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of Triton's interpreter")
def test_losses_keep_the_budget_triton(backend, **drawn) -> None:  # type: ignore[no-untyped-def]
    check_budget(backend, **{**drawn, "n": min(drawn["n"], 5)})


def check_kinds(backend: str, option: tuple[str, str], n: int, d: int, fill: str, of_all: bool, seed: int) -> None:
    case = family.FamilyCase(*option, family.Sizes(n, d, torch.float32, 3.0), seed)
    leaves, options = problem(case, fill, of_all, BEYOND)
    member = family.FAMILY[case.loss]
    results = {
        name: evaluate(lambda name=name, **a: member.ours(**a, backend=name), leaves, options)
        for name in (backend, "reference")
    }
    for name, value in results[backend].items():
        expected = results["reference"][name]
        place = f"{case} {fill} of_all={of_all} {backend} {name}: {value} and {expected} by the reference"
        if of_tokens(case) and name.startswith("d"):
            # It multiplies what was not the maximum by 0, which makes NaN of inf; the others leave it out.
            assert (value.isfinite() | ~expected.isfinite()).all(), place
        else:
            close = expected.isfinite() & (expected.abs() > 1e36)  # a sum on the way there may be past float32
            assert torch.equal(kinds(value).where(~close, 0), kinds(expected)), place


@examples(250)
@given(fill=st.sampled_from(list(BEYOND)), **DRAWN)
def test_losses_are_nan_and_inf_where_the_reference_is(**drawn) -> None:  # type: ignore[no-untyped-def]
    check_kinds("cpp", **drawn)


@examples(150)
@given(fill=st.sampled_from([f for f in BEYOND if f not in ("largest", "products overflow")]), **DRAWN)
def test_no_loss_is_finite_that_is_not(option, n, d, fill, of_all, seed) -> None:  # type: ignore[no-untyped-def]
    """Of NaN and inf in the features themselves, against the formula in float64."""
    case = family.FamilyCase(*option, family.Sizes(n, d, torch.float32, 3.0), seed)
    leaves, options = problem(case, fill, of_all, BEYOND)
    member = family.FAMILY[case.loss]
    double = {name: t.double() for name, t in leaves.items()}
    truth = member.textbook(oracle._oracle_logits, **double, **options).isfinite()
    for backend in ("reference", "cpp"):
        loss = member.ours(**leaves, **options, backend=backend)
        assert (truth | ~loss.isfinite()).all(), f"{case} {fill} of_all={of_all} {backend}: {loss}"


def test_a_positive_beyond_float32_is_no_loss_of_0(backend: str) -> None:
    """One pair's product overflows, all others are small."""
    x = torch.randn(4, 3).index_fill(0, torch.tensor([1]), 1e25)
    for loss in (
        fc.clip_loss(x, x, 1.0, backend=backend),
        fc.info_nce_loss(x, x, logit_scale=1.0, backend=backend),
        fc.nt_xent_loss(x, x, normalize=False, backend=backend),
        fc.nt_xent_loss(x, x, views=[x], normalize=False, backend=backend),
        fc.supcon_loss(torch.stack((x, x), dim=1), torch.arange(4), backend=backend),
        fc.supcon_loss(torch.stack((x, x), dim=1), torch.arange(4), variant="in", backend=backend),
        fc.filip_loss(x[:, None], x[:, None], 1.0, backend=backend),
    ):
        assert loss.isnan()


# Layouts -----------------------------------------------------------------------------------------------------------


@examples(200)
@given(
    backend=BACKENDS, layouts=st.tuples(*(st.sampled_from(list(LAYOUTS)) for _ in range(4))), **{**DRAWN, "of_all": st.none()}
)  # fmt: skip
def test_layouts_do_not_matter(backend, layouts, option, n, d, of_all, seed) -> None:  # type: ignore[no-untyped-def]
    """The same as of plain copies: bit for bit in C++; a GEMM of strided operands may round otherwise."""
    case = family.FamilyCase(*option, family.Sizes(n, d, torch.float32, 3.0), seed)
    leaves, options = case.inputs(torch.device("cpu"))
    names = [name for name, t in leaves.items() if t.dim() > 1]
    viewed = {**leaves, **{name: LAYOUTS[how](leaves[name]) for name, how in zip(names, layouts, strict=False)}}
    plain = {name: t.resolve_neg().clone(memory_format=torch.contiguous_format) for name, t in viewed.items()}
    member = family.FAMILY[case.loss]
    found, expected = (
        evaluate(lambda **a: member.ours(**a, backend=backend), tensors, options) for tensors in (viewed, plain)
    )
    for name, value in found.items():
        if backend == "cpp" and case.loss in ("info_nce", "siglip") and "own" not in case.variant:
            same = torch.equal(value.nan_to_num(7), expected[name].nan_to_num(7))
        else:
            same = torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert same, f"{case} {layouts} {backend} {name}: {value} and {expected[name]}"


def layouts_of(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name, change in LAYOUTS.items():
        yield name, change(t)


def test_rank_of_every_layout(backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("layouts on the CPU")
    for name, queries in layouts_of(torch.randint(-3, 4, (6, 4)).float()):
        for other, candidates in layouts_of(torch.randint(-3, 4, (9, 4)).float()):
            plain = [t.resolve_neg().clone(memory_format=torch.contiguous_format) for t in (queries, candidates)]
            found, expected = fc.rank(queries, candidates, 5, backend=backend), fc.rank(*plain, 5, backend=backend)
            assert torch.equal(found.scores, expected.scores), (name, other)
            assert torch.equal(found.indices, expected.indices), (name, other)
