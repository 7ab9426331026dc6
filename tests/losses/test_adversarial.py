"""Every loss, on every backend, on values and layouts that training produces only by accident (tests/adversarial.py).

If float32 can represent the result, values and gradients keep the error budget. If not, nothing crashes, all backends
are NaN, inf and finite in the same places, and no loss is finite if the float64 formula is not. Arguments are not
written to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adversarial import (
    BACKENDS,
    BEYOND,
    DTYPES,
    FINITE,
    LAYOUTS,
    SEEDS,
    SHARED,
    evaluate,
    examples,
    kinds,
    largest_error,
    tiny,
)  # fmt: skip
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.core.budget import allowed, difference
from fused_contrastive.testing import oracle
from fused_contrastive.testing.cases import MEMBERS, OPTIONS, Case
from fused_contrastive.testing.maker import Sizes


def of_tokens(case: Case) -> bool:
    return case.loss == "filip" or "tokens" in case.variant


def problem(
    case: Case, fill: str, of_all: bool, fills: dict[str, Callable[[Tensor], Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The case's tensors and options, with the features of all sides, or of one, changed by the fill."""
    torch.manual_seed(case.seed)
    leaves, options = case.inputs()
    features = [name for name, t in leaves.items() if t.dim() > 1]
    for name in features if of_all else features[: 1 + case.seed % len(features)][-1:]:
        leaves[name] = fills[fill](leaves[name])
    return leaves, options


# The others' margins were chosen for the features that are replaced here, which may be equal but for roundings.
LIMITING = {"absolute_margin", "relative_margin", "guide"}
UNLIMITED = [(loss, name) for loss, name in OPTIONS if LIMITING.isdisjoint(MEMBERS[loss].options[name])]
DRAWN = {
    "option": st.sampled_from(UNLIMITED),
    "n": st.integers(1, 12),
    "d": st.integers(1, 20),
    "of_all": st.booleans(),
    "seed": SEEDS,
}


def check_budget(
    backend: str, option: tuple[str, str], n: int, d: int, fill: str, of_all: bool, scale: float, seed: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if option[1] == "regularised" or "decoupled" in option[1]:
        n = max(n, 2)  # a single sample gives NaN (an empty mean) or -inf (an empty denominator)
    if "debias" in option[1]:
        d = max(d, 2)  # in one dimension, opposite features lie exactly where the estimate's floor begins
    case = Case(*option, Sizes(n, d, dtype, scale), seed)
    leaves, options = problem(case, fill, of_all, FINITE)
    sides = {f"d{name}": t.double() for name, t in leaves.items() if t.dim() > 1}
    features = list(sides.values())
    if not all(t.isfinite().all() for t in features):
        return  # float16 has no such values
    member = case.member
    ours = evaluate(lambda **a: member.ours(**a, backend=backend), leaves, options)
    truth = evaluate(
        lambda **a: (member.stable or member.textbook)(oracle.exact, **a),
        {name: t.double() for name, t in leaves.items()},
        options,
    )
    same = {name: t.to(dtype) for name, t in leaves.items()}
    eager = [
        evaluate(lambda form=form, **a: member.textbook(form, **a), same, options) for form in oracle.LOGITS.values()
    ]

    # The largest terms, as in the harness, but for features of any norm. Normalised features have norm 1, and their
    # gradient is divided by the norm that they had (by at least 1e-12, as in F.normalize).
    normalised = options.get("normalize", case.loss == "nt_xent")
    prefixes = options.get("dims", [None]) if normalised else [None]  # each is normalised by itself
    norms = torch.cat([t[..., :dim].norm(dim=-1).flatten() for t in features for dim in prefixes])
    norm = 1.0 if normalised else norms.max().item()
    shrink = norms.clamp_min(1e-12).min().item() if normalised else 1.0
    logit, weight = 2 * scale * norm**2, 1.5 * (case.sizes.n if "tokens" in case.variant else 1)
    rows = sum(t.shape[:-1].numel() for t in features)
    terms = {
        "loss": logit + options.get("margin", 0.0),
        "dlogit_scale": weight * rows * norm**2,
        "dlogit_bias": weight * rows,
    }
    terms["dtemperature"] = weight * rows * scale**2 * norm**2
    if case.variant == "regularised":
        terms["loss"] += norm**4
    for name, value in ours.items():
        exact = truth[name]
        term = terms.get(name, weight * (1.0 if name == "dcol_bias" else scale * norm / shrink))
        if case.variant == "regularised":
            term += norm**3
        # The rounding of logits this large shows in the gradient of one side by chance: take eager's worst side.
        alike = sides if fill == "logits to 1e4" and of_all and name in sides else [name]
        error = max(largest_error(eager, side, truth[side]) for side in alike)
        largest = exact.abs().max().item() + term
        kept = torch.finfo(leaves.get(name[1:], features[0]).dtype).max
        if largest > kept / 64:
            continue  # overflows its dtype, before or after it cancels
        equal_products = of_tokens(case) and fill not in ("ordinary", "logits to 1e4")  # ties: any may get the gradient
        if name.startswith("d") and (equal_products or logit > SHARED):
            assert value.isfinite().all(), f"{case} {fill} of_all={of_all} {backend} {name}: {value}"
            continue
        most = allowed(error, dtype, largest) + tiny(dtype, scale / shrink, norm)
        off_by = difference(value, exact)
        assert off_by <= most, f"{case} {fill} of_all={of_all} {backend} {name}: {off_by} > {most}"


@examples(250)
@given(
    backend=BACKENDS, fill=st.sampled_from(list(FINITE)), dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from((0.01, 1.0, 14.3, 100.0)), **DRAWN,
)  # fmt: skip
def test_losses_keep_the_budget(**drawn) -> None:  # type: ignore[no-untyped-def]
    check_budget(**drawn)


@examples(15)
@given(fill=st.sampled_from(list(FINITE)), dtype=st.just(torch.float32), scale=st.just(3.0), **DRAWN)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is for Triton's interpreter, and there is a GPU")
def test_losses_keep_the_budget_triton(backend, **drawn) -> None:  # type: ignore[no-untyped-def]
    check_budget(backend, **{**drawn, "n": min(drawn["n"], 5)})


def has_empty_row(z: Tensor, scale: float) -> bool:
    """Whether there is a feature whose logits with all others are -inf."""
    logits = (scale * (z @ z.T)).fill_diagonal_(-torch.inf)
    return len(logits) > 1 and bool((logits == -torch.inf).all(dim=1).any())


def check_kinds(backend: str, option: tuple[str, str], n: int, d: int, fill: str, of_all: bool, seed: int) -> None:
    case = Case(*option, Sizes(n, d, torch.float32, 3.0), seed)
    leaves, options = problem(case, fill, of_all, BEYOND)
    member = case.member
    results = {
        name: evaluate(lambda name=name, **a: member.ours(**a, backend=name), leaves, options)
        for name in (backend, "reference")
    }
    for name, value in results[backend].items():
        expected = results["reference"][name]
        place = f"{case} {fill} of_all={of_all} {backend} {name}: {value} and {expected} by the reference"
        if of_tokens(case) and name.startswith("d"):
            # The reference multiplies what was not the maximum by 0, which turns inf into NaN. With NaN, another token
            # may be the maximum.
            if results[backend]["loss"].isfinite():
                assert (value.isfinite() | ~expected.isfinite()).all(), place
        else:
            close = expected.isfinite() & (expected.abs() > 1e36)  # an intermediate sum may overflow float32
            if fill == "largest" and name != "loss":
                # Sums of terms that each overflow float32: inf in float64 may be inf - inf in float32, or 0 * inf.
                assert (value.isfinite() | ~expected.isfinite() | close).all(), place
            else:
                assert torch.equal(kinds(value).where(~close, 0), kinds(expected)), place
    # These losses are linear in the logits, so that their gradients may be finite although the loss is NaN.
    linear = any(("decoupled" in name or name == "label_smoothing") and value for name, value in options.items())
    linear |= case.loss == "distillation"
    # All logits of a row may overflow to -inf, like excluded ones: SupCon's loss is then -inf - -inf.
    z = leaves.get("features")
    emptied = z is not None and z.dim() == 2 and has_empty_row(z, case.sizes.scale)
    if results[backend]["loss"].isnan().any() and not linear and not emptied:
        assert not all(t.isfinite().all() for name, t in results[backend].items() if name != "loss"), f"{case} {fill}"


@examples(250)
@given(fill=st.sampled_from(list(BEYOND)), **DRAWN)
@example(fill="largest", option=("supcon", "lonely skip"), n=2, d=1, of_all=False, seed=0)  # a class mean overflows
def test_losses_are_nan_and_inf_in_the_same_places(**drawn) -> None:  # type: ignore[no-untyped-def]
    check_kinds("cpp", **drawn)


@examples(150)
@given(fill=st.sampled_from([f for f in BEYOND if f not in ("largest", "products overflow")]), **DRAWN)
def test_no_loss_is_finite_that_is_not(option, n, d, fill, of_all, seed) -> None:  # type: ignore[no-untyped-def]
    """With NaN or inf in the features, no loss is finite if the float64 formula is not."""
    case = Case(*option, Sizes(n, d, torch.float32, 3.0), seed)
    leaves, options = problem(case, fill, of_all, BEYOND)
    member = case.member
    double = {name: t.double() for name, t in leaves.items()}
    truth = member.textbook(oracle.exact, **double, **options).isfinite()
    for backend in ("reference", "cpp"):
        loss = member.ours(**leaves, **options, backend=backend)
        assert (truth | ~loss.isfinite()).all(), f"{case} {fill} of_all={of_all} {backend}: {loss}"


def test_a_positive_beyond_float32_is_no_loss_of_0(backend: str) -> None:
    """The product of one pair overflows, and all others are small."""
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


@examples(200)
@given(
    backend=BACKENDS, layouts=st.tuples(*(st.sampled_from(list(LAYOUTS)) for _ in range(4))), 
    **{**DRAWN, "of_all": st.none()},
)  # fmt: skip
def test_layouts_do_not_matter(backend, layouts, option, n, d, of_all, seed) -> None:  # type: ignore[no-untyped-def]
    """Results are those of contiguous copies, in C++ bit for bit; a GEMM of strided operands may round differently."""
    case = Case(*option, Sizes(n, d, torch.float32, 3.0), seed)
    leaves, options = case.inputs()
    names = [name for name, t in leaves.items() if t.dim() > 1]
    viewed = {**leaves, **{name: LAYOUTS[how](leaves[name]) for name, how in zip(names, layouts, strict=False)}}
    plain = {name: t.resolve_neg().clone(memory_format=torch.contiguous_format) for name, t in viewed.items()}
    member = case.member
    found, expected = (
        evaluate(lambda **a: member.ours(**a, backend=backend), tensors, options) for tensors in (viewed, plain)
    )
    for name, value in found.items():
        if backend == "cpp" and case.option in (
            "info_nce plain",
            "info_nce targets",
            "info_nce bias ids",
            "siglip plain",
        ):
            same = torch.equal(value.nan_to_num(7), expected[name].nan_to_num(7))
        else:
            same = torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert same, f"{case} {layouts} {backend} {name}: {value} and {expected[name]}"


def test_rank_of_every_layout(backend: str) -> None:
    queries, candidates = torch.randint(-3, 4, (6, 4)).float(), torch.randint(-3, 4, (9, 4)).float()
    for how, other in itertools.product(LAYOUTS, LAYOUTS):
        views = LAYOUTS[how](queries), LAYOUTS[other](candidates)
        plain = [t.resolve_neg().clone(memory_format=torch.contiguous_format) for t in views]
        found, expected = fc.rank(*views, 5, backend=backend), fc.rank(*plain, 5, backend=backend)
        assert torch.equal(found.scores, expected.scores), (how, other)
        assert torch.equal(found.indices, expected.indices), (how, other)
