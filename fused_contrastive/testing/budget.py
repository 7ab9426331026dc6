"""The error budget: our error against eager's, both against float64.

    |ours - fp64| <= 2 |eager - fp64| + 8 eps(dtype) (max |fp64| + the largest term before cancellation)

in the maximum norm, for every value and gradient. It comes from data, not from taste: where eager PyTorch itself is
far off (scale 1000 in bfloat16), so may we be, twice; where it is exact, we get a few roundings. One evaluation can be
exact by luck, so eager's error is the largest over the equal ways to write the logits (oracle.LOGITS).

The largest term of a feature gradient is scale * weight (1/N for a mean) * max |feature|, times the rows per column
where they are more than one; that of the scale's gradient is the positives' part, M * weight * max |x||y|, which the
negatives' part cancels. A logit is held in the precision it is computed in, float32 for half-precision features, and
its rounding is a relative error of the weight that is its exponential: eps / 2 * max |logit| of the largest term is
allowed in a gradient. Without it eager's luck decides where one weight dominates (2 rows at scale 1000). For float64
the oracle is no more exact than what it measures: 8 eps * max |logit| is allowed, and sqrt(N) eps in a sum over N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_contrastive.core.spec import BackendName, compute_dtype
from fused_contrastive.losses.clip import clip_loss
from fused_contrastive.ops.stats import contrastive_stats
from fused_contrastive.testing import oracle
from fused_contrastive.testing.cases import Case, Inputs

Outputs = dict[str, Tensor]
LEAVES = ("x", "y", "scale", "col_bias")


@dataclass(frozen=True)
class Deviation:
    """One value or gradient against the formula in float64.

    Attributes:
        quantity: its name, "loss" or "dx" for example.
        error: the largest error of ours.
        eager_error: that of the same formula in plain PyTorch and the dtype of ours.
        allowed: what the error budget allows ours.
    """

    quantity: str
    error: float
    eager_error: float
    allowed: float

    @property
    def share(self) -> float:
        """The part of the budget used; above 1 is a breach. NaN where it should not be counts as infinite, and inf
        unless eager has it too, as past what float16 holds."""
        if not math.isfinite(self.error):
            return 0.0 if self.error == self.eager_error else math.inf
        return self.error / self.allowed if self.allowed else float(self.error > 0)


def evaluate(function: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
    """Outputs, and the gradients of ``sum(weights * outputs)`` over finite outputs, as float64."""
    leaves = {name: t.clone().requires_grad_() for name in LEAVES if (t := getattr(inputs, name)) is not None}
    outputs = function(Inputs(**{**inputs.__dict__, **leaves}))
    objective = torch.zeros((), dtype=torch.float64, device=inputs.x.device)
    for name, weight in inputs.weights.items():
        finite = torch.where(outputs[name].detach().isfinite(), outputs[name].double(), 0)
        objective = objective + (weight * finite).sum()
    gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    results = {name: outputs[name].detach().double() for name in inputs.weights}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"d{name}"] = (torch.zeros_like(leaf) if gradient is None else gradient).double()
    return results


def ours(case: Case, backend: BackendName) -> Callable[[Inputs], Outputs]:
    """The public function under test."""

    def clip(inputs: Inputs) -> Outputs:
        return {"loss": clip_loss(inputs.x, inputs.y, inputs.scale, backend=backend, **inputs.options)}

    def stats(inputs: Inputs) -> Outputs:
        result = contrastive_stats(
            inputs.x,
            inputs.y,
            inputs.scale,
            col_bias=inputs.col_bias,
            directions=[name for name in ("row", "col") if name in inputs.weights],
            memory_budget=inputs.memory_budget,  # type: ignore[arg-type]
            backend=backend,
            **inputs.options,
        )
        return {name: value for name, value in result._asdict().items() if value is not None}

    return clip if case.is_clip else stats


def textbook(case: Case, form: str | None) -> Callable[[Inputs], Outputs]:
    """Eager PyTorch with the logits written in one form of ``oracle.LOGITS``; None: the oracle's stable form."""

    def clip(inputs: Inputs) -> Outputs:
        arguments = (inputs.x, inputs.y, inputs.scale.to(inputs.x.dtype))
        if form is None:
            return {"loss": oracle.clip_stable(*arguments, **inputs.options)}
        return {"loss": oracle.clip_eager(*arguments, **inputs.options, form=form)}

    def stats(inputs: Inputs) -> Outputs:
        dtype = inputs.x.dtype
        bias = None if inputs.col_bias is None else inputs.col_bias.to(dtype)
        values = oracle.stats(inputs.x, inputs.y, inputs.scale.to(dtype), col_bias=bias, form=form, **inputs.options)
        return dict(zip(("pos", "row", "col"), values, strict=True))

    return clip if case.is_clip else stats


def largest_terms(inputs: Inputs, results: Outputs) -> dict[str, float]:
    """Per quantity, the largest single term of the sums that make it, before they cancel."""
    x, y, scale = inputs.x.abs().max().item(), inputs.y.abs().max().item(), inputs.scale.abs().item()
    bias = 0.0 if inputs.col_bias is None else inputs.col_bias[inputs.col_bias.isfinite()].abs().max().item()
    weight = max(w.abs().max().item() for w in inputs.weights.values())
    m, n = len(inputs.x), len(inputs.y)
    if "loss" in results and inputs.options["reduction"] == "mean":
        weight /= m
    logit = scale * x * y + bias
    terms = {
        "dx": weight * scale * y * max(1.0, n / m),
        "dy": weight * scale * x * max(1.0, m / n),
        "dscale": weight * m * x * y * max(1.0, n / m),
        "dcol_bias": weight * max(1.0, m / n),
    }
    largest_logit = (scale * (inputs.x.double() @ inputs.y.double().T)).abs().max().item() + bias
    rounded = with_rounded_weights(inputs.x.dtype, largest_logit, max(m, n))
    return {name: terms[name] * rounded if name in terms else logit for name in results}


def with_rounded_weights(dtype: torch.dtype, logit: float, count: int) -> float:
    """What a gradient's largest term is multiplied by, for the rounding of the logits in its weights."""
    if dtype == torch.float64:
        return max(1.0, logit, math.sqrt(count))
    held, given = torch.finfo(compute_dtype(dtype)).eps, torch.finfo(dtype).eps
    return 1.0 + logit * held / 2 / (8 * given)


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b|; equal infinities agree, NaN stays NaN."""
    return torch.where(a == b, 0, (a - b).abs()).max().item()


def farthest(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Where two tensors differ most, NaN before all: what each has there."""
    at = torch.where(a == b, 0, (a - b).abs()).flatten().argmax()
    return a.flatten()[at].item(), b.flatten()[at].item()


@dataclass(frozen=True)
class Expected:
    """The oracle's results and eager's largest errors, shared by all backends."""

    truth: Outputs
    eager_error: dict[str, float]


def expected(case: Case, inputs: Inputs) -> Expected:
    truth = evaluate(textbook(case, None), inputs.to(torch.float64))
    errors: dict[str, float] = dict.fromkeys(truth, 0.0)
    for form in oracle.LOGITS:
        for name, value in evaluate(textbook(case, form), inputs).items():
            errors[name] = max(errors[name], difference(value, truth[name]))  # a NaN of eager's allows us nothing
    return Expected(truth, errors)


def deviations(
    case: Case, backend: BackendName, inputs: Inputs, expectation: Expected, results: Outputs | None = None
) -> list[Deviation]:
    """Every value and gradient of one backend, or those given, against the budget."""
    if results is None:
        results = evaluate(ours(case, backend), inputs)
    terms = largest_terms(inputs, results)
    found = []
    for name, value in results.items():
        truth, eager_error = expectation.truth[name], expectation.eager_error[name]
        finite = truth[truth.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        allowed = 2 * eager_error + 8 * torch.finfo(case.dtype).eps * (largest + terms[name])
        found.append(Deviation(name, difference(value, truth), eager_error, allowed))
    return found
