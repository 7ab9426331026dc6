"""Compares a case's results with the oracle's, within the error budget of ``core/budget.py``.

One evaluation can be exact by luck, so eager's error is the largest over the equal ways to write the logits
(oracle.LOGITS).

The budget needs the largest term before cancellation. In a feature's gradient it is scale * weight (1/N for a mean) *
max |feature|, times the rows per column if they are more than one. In the scale's gradient it is the positives' part,
M * weight * max |x||y|, which the negatives' part cancels.

A logit is held in the precision it is computed in, float32 for half-precision features, and its rounding is a relative
error of the weight that is its exponential. So eps / 2 * max |logit| of the largest term is allowed in a gradient;
without it eager's luck decides where one weight dominates (2 rows at scale 1000). For float64 the oracle is no more
exact than what it measures: 8 eps * max |logit| is allowed, and sqrt(N) eps in a sum over N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.core.budget import Deviation, allowed, difference, largest_finite
from fused_contrastive.core.spec import compute_dtype
from fused_contrastive.core.unit import LEAST_NORM
from fused_contrastive.testing import oracle
from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.inputs import Leaves

Results = dict[str, Tensor]  # outputs and, as "d" and the leaf's name, gradients; in float64
Device = torch.device | str


def weights(place: int, count: int, device: Device) -> Tensor:
    """(count,) factors of an output in the objective: 0.5 to 1.5, and with either sign unless ``place`` is 0."""
    size = torch.linspace(0.5, 1.5, count, dtype=torch.float64, device=device)
    return size * torch.arange(place, place + count, device=device).double().cos() if place else size


def evaluate(function: Callable[..., Any], leaves: Leaves, options: dict[str, Any]) -> Results:
    """The function's outputs, a tensor or a tuple or dict of them, and the gradients of a weighted sum of them.

    Elements that are not finite are left out of the sum.
    """
    held = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    found = function(**held, **options)
    if isinstance(found, Tensor):
        found = {"loss": found}
    outputs = {name: t for name, t in (found if isinstance(found, dict) else found._asdict()).items() if t is not None}
    objective = torch.zeros((), dtype=torch.float64, device=next(iter(held.values())).device)
    for place, t in enumerate(outputs.values()):
        finite = torch.where(t.detach().isfinite(), t.double(), 0).reshape(-1)
        objective = objective + (finite * weights(place, len(finite), t.device)).sum()
    gradients = torch.autograd.grad(objective, list(held.values()), allow_unused=True)
    results = {name: t.detach().double() for name, t in outputs.items()}
    for (name, leaf), gradient in zip(held.items(), gradients, strict=True):
        results[f"d{name}"] = (torch.zeros_like(leaf) if gradient is None else gradient).double()
    return results


def ours(case: Case, backend: str, device: Device = "cpu") -> Results:
    """The values and every gradient of one backend."""
    leaves, options = case.inputs(device)
    return evaluate(case.member.ours, leaves, {**options, "backend": backend})


@dataclass(frozen=True)
class Expected:
    """The formula's results in float64, its largest errors in the case's dtype, and the errors that are allowed."""

    truth: Results
    eager_error: dict[str, float]
    allowed: dict[str, float]

    def deviations(self, results: Results) -> list[Deviation]:
        return [
            Deviation(name, difference(value, self.truth[name]), self.eager_error[name], self.allowed[name])
            for name, value in results.items()
        ]


def expected(case: Case, device: Device = "cpu") -> Expected:
    leaves, options = case.inputs(device)
    member = case.member

    def by(formula: Callable[..., Any], logits: oracle.Logits, dtype: torch.dtype) -> Results:
        given = {name: t.to(dtype) for name, t in leaves.items()}
        return evaluate(lambda **arguments: formula(logits, **arguments), given, options)

    truth = by(member.stable or member.textbook, oracle.exact, torch.float64)
    errors = dict.fromkeys(truth, 0.0)
    for form in oracle.LOGITS.values():
        for name, value in by(member.textbook, form, case.dtype).items():
            errors[name] = max(errors[name], difference(value, truth[name]))  # max drops NaN, which allows nothing
    terms = (_terms_of_features if member.as_they_are else _terms_of_norm_1)(case, leaves, options, truth)
    for name, factor in _of_short_prefixes(leaves, options).items():
        terms[f"d{name}"] *= factor
    most = {
        name: allowed(errors[name], case.dtype, largest_finite(value) + terms[name]) for name, value in truth.items()
    }
    return Expected(truth, errors, most)


def deviations(case: Case, backend: str, device: Device = "cpu", results: Results | None = None) -> list[Deviation]:
    """Every value and gradient of one backend, or those given, against the budget."""
    return expected(case, device).deviations(ours(case, backend, device) if results is None else results)


def _terms_of_features(case: Case, leaves: Leaves, options: dict[str, Any], truth: Results) -> dict[str, float]:
    """For each result, the largest single term of the sums that make it, before they cancel."""
    (of_x, x), (of_y, y), (of_scale, scale), *_ = leaves.items()
    m, n = len(x), len(y)
    largest_x, largest_y, factor = x.abs().max().item(), y.abs().max().item(), scale.abs().item()
    bias = largest_finite(leaves["col_bias"]) if "col_bias" in leaves else 0.0
    weight = 1.5
    if "loss" in truth and truth["loss"].dim() == 0:
        weight = 0.5 / m if options.get("reduction", "mean") == "mean" else 0.5
    across, down = max(1.0, n / m), max(1.0, m / n)
    terms = {
        f"d{of_x}": weight * factor * largest_y * across,
        f"d{of_y}": weight * factor * largest_x * down,
        f"d{of_scale}": weight * m * largest_x * largest_y * across,
        "dcol_bias": weight * down,
    }
    largest_logit = (scale * (x.double() @ y.double().T)).abs().max().item() + bias
    rounded = _with_rounded_weights(case.dtype, largest_logit, max(m, n))
    logit = factor * largest_x * largest_y + bias
    return {name: terms[name] * rounded if name in terms else logit for name in truth}


def _terms_of_norm_1(case: Case, leaves: Leaves, options: dict[str, Any], truth: Results) -> dict[str, float]:
    """The same for features of norm 1: the logit for the loss, scale * weight for features, N * weight for the scale.

    For a temperature it is scale^2 times the scale's.
    """
    scale, n = case.sizes.scale, case.sizes.n
    weight = 1.5 / n if options.get("reduction", "mean") == "mean" else 1.5
    logit = 2.0 * scale
    # The regulariser's gradient is a mean over pairs of differences of similarities, whatever the scale.
    regularised = weight if options.get("sim_reg_loss_weight") else 0.0
    terms = dict.fromkeys(truth, weight * scale + regularised)  # gradients of features and of a bias
    terms |= dict.fromkeys(("dlogit_scale", "dlogit_bias"), weight * n) | {"dtemperature": weight * n * scale**2}
    # Hardness makes the weights by two passes, of (1 + hardness) and of hardness times the logits.
    rounded = _with_rounded_weights(case.dtype, (1 + 2 * options.get("hardness", 0.0)) * logit, n)
    return {name: term * rounded for name, term in terms.items()} | {"loss": logit + options.get("margin", 0.0)}


def _of_short_prefixes(leaves: Leaves, options: dict[str, Any]) -> dict[str, float]:
    """How many times larger the terms of the features' gradients are with normalised prefixes: one over the shortest.

    Of what they cancel, one column's gradient is all: it is the sign of a number that is divided by its size.
    """
    if not (options.get("dims") and options.get("normalize")):
        return {}
    features = {name: t.double() for name, t in leaves.items() if t.dim() == 2}
    norms = {name: min(t[:, :dim].norm(dim=1).min().item() for dim in options["dims"]) for name, t in features.items()}
    return {name: max(1.0, 1 / max(norm, LEAST_NORM)) for name, norm in norms.items()}


def _with_rounded_weights(dtype: torch.dtype, logit: float, count: int) -> float:
    """The factor of a gradient's largest term that allows for the rounding of the logits in its weights."""
    if dtype == torch.float64:
        return max(1.0, logit, math.sqrt(count))
    held, given = torch.finfo(compute_dtype(dtype)).eps, torch.finfo(dtype).eps
    return 1.0 + logit * held / 2 / (8 * given)


def farthest(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Both tensors' elements at the place where they differ most, or where one is NaN."""
    at = torch.where(a == b, 0, (a - b).abs()).flatten().argmax()
    return a.flatten()[at].item(), b.flatten()[at].item()
