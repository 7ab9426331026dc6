"""Checks an implementation before it is timed: loss and gradients against float64. A wrong one is reported as wrong."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.implementations import Implementation
from benchmarks.workloads import PER_LABEL, WORKLOADS, BenchProblem, Loss
from fused_contrastive.core.budget import allowed

CHECKED = 4096**2  # similarities of the largest problem that is checked: its float64 truth writes the matrix many times

Results = dict[str, Tensor]  # "loss", and for each input's name its gradient


def small_enough(problem: BenchProblem) -> BenchProblem:
    """The problem, or one with its rows halved until it is small enough to check; groups of one label stay whole."""
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

    def __init__(self, problem: BenchProblem) -> None:
        torch.manual_seed(0)
        work = WORKLOADS[problem.loss]
        self.leaves = work.inputs(problem)
        wide = {name: t.detach().double().requires_grad_() for name, t in self.leaves.items()}
        self.results = evaluate(work.truth, wide)
        eager = self.errors(evaluate(work.eager, self.leaves))
        self.allowed = {
            name: allowed(error, problem.torch_dtype, 1.0, roundings=4) + (0 if name == "loss" else work.slack)
            for name, error in eager.items()
        }

    def errors(self, found: Results) -> dict[str, float]:
        """The norm of each result's error, relative to the truth's."""
        return {
            name: float((found[name].double() - truth).norm() / truth.norm().clamp_min(1e-300))
            for name, truth in self.results.items()
            if name in found
        }

    def wrong(self, found: Results, no_gradient: tuple[str, ...] = ()) -> str | None:
        """Says what is wrong with these results. The inputs in ``no_gradient`` need no gradient."""
        errors = self.errors(found)
        for name in self.results:
            what = name if name == "loss" else f"the gradient of {name}"
            if name not in errors:
                if name in no_gradient:
                    continue
                return f"WRONG: gives {what} as None"
            if not errors[name] <= self.allowed[name]:
                return f"WRONG: {what} is off by {errors[name]:.1e}, allowed {self.allowed[name]:.1e}"
        return None


last_truths = functools.lru_cache(maxsize=2)(Truth)  # implementations of one problem are checked one after another


@functools.cache
def wrong(implementation: Implementation, problem: BenchProblem) -> str | None:
    """Says what is wrong with an implementation, once for all problems that are checked at one size."""
    truth = last_truths(dataclasses.replace(problem, loss=implementation.computes or problem.loss))
    return truth.wrong(evaluate(implementation.load(problem), truth.leaves), implementation.no_gradient)
