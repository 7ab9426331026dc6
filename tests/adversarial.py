"""Tensors that training never means to make and now and then does: values and layouts, and how calls with them are held
to the float64 formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from seeds import SEED
from torch import Tensor

from fused_contrastive.core.budget import difference

Results = dict[str, Tensor]
BACKENDS = st.sampled_from(["reference", "cpp"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 2**31)

# Of logits beyond this, a log-normaliser in float64, in C++ two of float32, does not hold how many equal ones share the
# softmax: gradients are finite, and no more is asked of them.
SHARED = 1e7

Change = Callable[[Tensor], Tensor]


def _one(value: float) -> Change:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[torch.randint(t.numel(), ())] = value
        return t

    return change


def _some_zero(t: Tensor) -> Tensor:
    return t.masked_fill(torch.rand(t.shape[:1]).reshape(-1, *(1,) * (t.dim() - 1)) < 0.4, 0)


# Of features of norm 1. What float32 holds, to logits of 1e28; in float16 the largest of them are infinite.
FINITE: dict[str, Change] = {
    "ordinary": lambda t: t,
    "subnormal": lambda t: t * 1e-40,
    "tiny": lambda t: t * 1e-20,
    "logits to 1e4": lambda t: t * 100,
    "huge": lambda t: t * 1e12,
    "equal": lambda t: t[:1].expand_as(t).clone(),
    "some rows zero": _some_zero,
    "zero": torch.zeros_like,
    "norms from 1e-6 to 1e6": lambda t: (
        t * 10 ** torch.linspace(-6, 6, len(t)).reshape(-1, *(1,) * (t.dim() - 1)).to(t)
    ),
}
# What it does not: products overflow, or there is nothing to multiply.
BEYOND: dict[str, Change] = {
    "nan": _one(torch.nan),
    "inf": _one(torch.inf),
    "-inf": _one(-torch.inf),
    "largest": _one(3.4e38),
    "products overflow": lambda t: t.abs() * 1e25,  # of both signs, their sum is inf, -inf or NaN by its order
    "all nan": lambda t: torch.full_like(t, torch.nan),
    "all inf": lambda t: torch.full_like(t, torch.inf),
}


def _sliced(t: Tensor) -> Tensor:
    room = t.new_full((2 * t.shape[0] + 1, *t.shape[1:-1], t.shape[-1] + 5), torch.nan)
    room[1::2, ..., 2:-3] = t
    return room[1::2, ..., 2:-3]


# Every one views memory that is not (rows, D) in a row, with the values of its argument or, the last two, others.
LAYOUTS: dict[str, Change] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice": _sliced,
    "lazily negated": lambda t: torch._neg_view(-t),
    "imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "zero stride": lambda t: t[:1].expand_as(t),
    "rows overlap": lambda t: t.flatten()[: len(t) + t[0].numel() - 1].unfold(0, t[0].numel(), 1).view_as(t),
}


def bits(t: Tensor) -> Tensor:
    """A copy of all bytes of the memory that a tensor views, what lies between its elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def kinds(t: Tensor) -> Tensor:
    """0 where finite, 1 and -1 at the infinities, 2 at NaN."""
    return torch.where(t.isnan(), 2, torch.where(t.isinf(), t.nan_to_num(0, 1, -1), 0)).to(torch.int8)


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
    outputs = (
        {"loss": found} if isinstance(found, Tensor) else {k: v for k, v in found._asdict().items() if v is not None}
    )
    total = sum((t.double() * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in outputs.values())
    gradients = torch.autograd.grad(total, list(held.values()), allow_unused=True)
    results = {name: t.detach().double() for name, t in outputs.items()}
    for (name, leaf), g in zip(held.items(), gradients, strict=True):
        results[f"d{name}"] = (torch.zeros_like(leaf) if g is None else g).double()
    for name, t in held.items():
        assert torch.equal(bits(t), before[name]), f"{name} was written to"
    return results


def tiny(dtype: torch.dtype, *factors: float) -> float:
    """What is lost below the smallest normal number, where a GEMM may count a subnormal as 0, times what follows."""
    lost = 8 * torch.finfo(dtype).tiny
    for factor in factors:
        lost *= max(1.0, factor)
    return lost


def largest_error(eager: list[Results], name: str, truth: Tensor) -> float:
    """Eager's; a NaN of it allows nothing."""
    errors = [difference(e[name], truth) for e in eager]
    return max(0.0 if error != error else error for error in errors)
