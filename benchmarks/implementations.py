"""The implementations of each loss, in one registry: ours and PyTorch's here, the libraries' in ``peers.py``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import groups, matryoshka, rules  # they put their workloads beside the others
from benchmarks.workloads import TEMPERATURE, WORKLOADS, BenchProblem, Loss, rows
from fused_contrastive.core.memory import total_memory

Load = Callable[[BenchProblem], Loss]
INTERPRETER = "interpreter"  # Triton's interpreter counts as a device


class CannotRunError(Exception):
    """Raised where an implementation does not run here; its message says why."""


def failure(error: BaseException) -> str:
    """The status of an implementation that raised this: the error's kind and the first line of its message."""
    what = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    lines = str(error).strip().splitlines()
    return f"{what}: {type(error).__name__}: {lines[0] if lines else 'no message'}"


def broken(status: str) -> bool:
    """Whether an implementation with this status ran, and failed or was wrong."""
    return status.startswith(("failed: ", "out of memory: ", "WRONG: "))


@dataclass(frozen=True)
class Implementation:
    """One way to compute one workload's loss. ``load`` imports what it needs, and may raise an ImportError."""

    name: str
    loss: str
    load: Load
    devices: tuple[str, ...] = ("cpu", "cuda")
    largest: int | None = None  # the most rows that it is run with; None: any number
    why_largest: str = "slow, and there to check by"
    matrices: float = 0  # N x N tensors that it holds at once: it is not run where these would not fit in memory
    no_gradient: tuple[str, ...] = ()  # inputs for which it has no gradient
    compiled: bool = False  # whether it is compiled for the shapes of its first call
    ours: bool = False
    computes: str | None = None  # the workload whose results it has, on the same inputs, if not ``loss``


REGISTRY: list[Implementation] = []


def register(name: str, *losses: str, **properties: Any) -> Callable[[Load], Load]:
    """Puts a loader into the registry, for each of these workloads."""

    def add(load: Load) -> Load:
        REGISTRY.extend(Implementation(name, loss, load, **properties) for loss in losses)
        return load

    return add


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU here, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def named(loss: str, name: str) -> Implementation:
    for implementation in REGISTRY:
        if (implementation.loss, implementation.name) == (loss, name):
            return implementation
    known = ", ".join(i.name for i in REGISTRY if i.loss == loss)
    raise ValueError(f"implementation: got {name!r} for {loss!r}, expected one of {known}")


def reason_not_to(implementation: Implementation, problem: BenchProblem) -> str | None:
    """Why an implementation is not tried on a problem, as far as that is known without importing it; None if it is."""
    devices = {problem.device, *([INTERPRETER] if interpreted() else [])}
    if devices.isdisjoint(implementation.devices):
        return f"needs {' or '.join(implementation.devices)}"
    if implementation.largest is not None and problem.n > implementation.largest:
        return f"not run above N = {implementation.largest}: {implementation.why_largest}"
    m, _, n = WORKLOADS[problem.loss].unit(problem)
    need = implementation.matrices * m * n * problem.torch_dtype.itemsize
    have = 0.7 * total_memory(problem.device, None)
    if need > have:
        return f"its N x N tensors would take {need / 2**30:.0f} GiB of {have / 2**30:.0f}"
    return None


def load(implementation: Implementation, problem: BenchProblem) -> Loss:
    """The loss, as a function of the workload's tensors. Raises: CannotRunError."""
    if (why := reason_not_to(implementation, problem)) is not None:
        raise CannotRunError(why)
    try:
        return implementation.load(problem)
    except ImportError as error:
        raise CannotRunError(f"cannot be imported: {error}") from error


def _ours(problem: BenchProblem, **options: Any) -> Loss:
    if interpreted() and problem.device == "cpu":
        options.setdefault("backend", "triton")
    return functools.partial(WORKLOADS[problem.loss].ours, **options)


register("ours", *WORKLOADS, ours=True)(_ours)
register("ours, memory_budget=0", *WORKLOADS, ours=True)(functools.partial(_ours, memory_budget=0))
_by_rule = [rule for rule in rules.RULES if rule != "distillation"]


@register("ours, without the rule", *_by_rule, ours=True, computes="clip")
def _(problem: BenchProblem) -> Loss:
    return _ours(replace(problem, loss="clip"))


@register("ours, metrics=True", "clip", "siglip", *groups.GROUPS, ours=True)
def _(problem: BenchProblem) -> Loss:
    run = _ours(problem, metrics=True)
    return lambda *inputs: run(*inputs)[0]


_tokens = ("max_sim", "max_sim_own")
_matrices = [loss for loss in WORKLOADS if loss not in _tokens]
register("ours, everything kept", *_matrices, ours=True, devices=("cuda", INTERPRETER), matrices=1)(
    functools.partial(_ours, memory_budget=2**50)
)
# The reference is there to be read and to check results by, so it is not timed at sizes that take seconds.
_reference = functools.partial(_ours, backend="reference")
register("ours, backend=reference", *_matrices, ours=True, largest=1024)(_reference)
register("ours, backend=reference", *_tokens, ours=True, largest=64)(_reference)


@register("ours, a call for each group", *groups.GROUPS, ours=True)
def _(_: BenchProblem) -> Loss:
    return groups.loop


@register("ours, loop over prefixes", *matryoshka.LOOPS, ours=True)
def _(problem: BenchProblem) -> Loss:
    return matryoshka.LOOPS[problem.loss]


@register("eager", *WORKLOADS, matrices=5)
def _(problem: BenchProblem) -> Loss:
    return WORKLOADS[problem.loss].eager


@register("torch.compile(eager)", *WORKLOADS, matrices=3, compiled=True)
def _(problem: BenchProblem) -> Loss:
    return torch.compile(WORKLOADS[problem.loss].eager, dynamic=False)


CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, y, targets) -> the loss of the logits x @ y.T


def clip_by(cross_entropy: CrossEntropy) -> Loss:
    """CLIP's loss, by calling a loss of one direction twice."""

    def both(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        a, b = (scale * x).to(x.dtype), (scale * y).to(y.dtype)
        return (cross_entropy(a, y, rows(x)) + cross_entropy(b, x, rows(x))) / 2

    return both


def info_nce_by(cross_entropy: CrossEntropy) -> Loss:
    return lambda x, y: cross_entropy(F.normalize(x, dim=1) / TEMPERATURE, F.normalize(y, dim=1), rows(x))


def _linear_cross_entropy() -> CrossEntropy:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRunError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return F.linear_cross_entropy


@register("2 x F.linear_cross_entropy", "clip")
def _(_: BenchProblem) -> Loss:
    return clip_by(_linear_cross_entropy())


@register("F.linear_cross_entropy", "info_nce")
def _(_: BenchProblem) -> Loss:
    return info_nce_by(_linear_cross_entropy())
