"""Before an implementation is timed: are its loss and gradients right? A wrong one is reported as wrong."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_contrastive.bench.implementations import Implementation
from fused_contrastive.bench.workloads import PER_LABEL, WORKLOADS, Loss, Problem
from fused_contrastive.core.budget import allowed

CHECKED = 4096**2  # similarities at most: the float64 truth writes its matrix many times

Results = dict[str, Tensor]  # "loss", and by the name of an input its gradient


def small_enough(problem: Problem) -> Problem:
    """The problem, or one of half as many rows, and so on; whole groups of one label."""
    m, _, n = WORKLOADS[problem.loss].unit(problem)
    if m * n <= CHECKED or problem.n == 1:
        return problem
    return small_enough(replace(problem, n=max(1, problem.n // (2 * PER_LABEL) * PER_LABEL)))


def evaluate(loss: Loss, leaves: dict[str, Tensor]) -> Results:
    value = loss(*leaves.values())
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    return {"loss": value.detach(), **{name: g.detach() for name, g in gradients.items()}}


class Truth:
    """A problem's tensors with the float64 results, and how far eager PyTorch's are from them."""

    def __init__(self, problem: Problem) -> None:
        torch.manual_seed(0)
        work = WORKLOADS[problem.loss]
        self.work, self.leaves = work, work.inputs(problem)
        wide = {name: t.detach().double().requires_grad_() for name, t in self.leaves.items()}
        self.results = evaluate(work.truth, wide)
        eager = self.errors(evaluate(work.eager, self.leaves))
        self.allowed = {
            name: allowed(error, problem.torch_dtype, 1.0, roundings=4) + (0 if name == "loss" else work.slack)
            for name, error in eager.items()
        }

    def errors(self, found: Results) -> dict[str, float]:
        """Of each result the norm of its error, relative to the truth's."""
        return {
            name: float((found[name].double() - truth).norm() / truth.norm().clamp_min(1e-300))
            for name, truth in self.results.items()
            if name in found
        }

    def wrong(self, implementation: Implementation, loss: Loss) -> str | None:
        """What is wrong with an implementation."""
        errors = self.errors(evaluate(loss, self.leaves))
        for name in self.results:
            what = name if name == "loss" else f"the gradient of {name}"
            if name not in errors:
                if name in implementation.no_gradient:
                    continue
                return f"WRONG: gives {what} as None"
            if not errors[name] <= self.allowed[name]:
                return f"WRONG: {what} is off by {errors[name]:.1e}, allowed {self.allowed[name]:.1e}"
        return None


class Checks:
    """What is wrong with each implementation, found once for all problems that are checked at one size."""

    def __init__(self) -> None:
        self.found: dict[tuple[Problem, str], str | None] = {}
        self.truth: tuple[Problem, Truth] | None = None  # of the last problem

    def wrong(self, implementation: Implementation, loss: Loss, problem: Problem) -> str | None:
        smaller = small_enough(problem)
        key = smaller, implementation.name
        if key not in self.found:
            if self.truth is None or self.truth[0] != smaller:
                self.truth = smaller, Truth(smaller)
            self.found[key] = self.truth[1].wrong(implementation, loss)
        return self.found[key]
