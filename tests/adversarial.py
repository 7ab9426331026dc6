"""Values and memory layouts that training produces only by accident, and functions that compare calls with the float64
formulas.
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

# Beyond this, a log-normaliser (one float64 number, in C++ two float32) cannot tell how many equal logits share the
# softmax: the tests only ask that gradients are finite.
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


# Changes of features of norm 1 that float32 can represent, up to logits of 1e28; in float16 the largest are infinite.
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
# Changes that float32 cannot represent: products overflow, or features are NaN or infinite.
BEYOND: dict[str, Change] = {
    "nan": _one(torch.nan),
    "inf": _one(torch.inf),
    "-inf": _one(-torch.inf),
    "largest": _one(3.4e38),
    "products overflow": lambda t: t.abs() * 1e25,  # with both signs, a sum's order would decide if it is NaN
    "all nan": lambda t: torch.full_like(t, torch.nan),
    "all inf": lambda t: torch.full_like(t, torch.inf),
}


def _sliced(t: Tensor) -> Tensor:
    room = t.new_full((2 * t.shape[0] + 1, *t.shape[1:-1], t.shape[-1] + 5), torch.nan)
    room[1::2, ..., 2:-3] = t
    return room[1::2, ..., 2:-3]


# Views whose memory is not contiguous. The values are those of the argument, except for the last two.
LAYOUTS: dict[str, Change] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice": _sliced,
    "lazily negated": lambda t: torch._neg_view(-t),
    "imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "zero stride": lambda t: t[:1].expand_as(t),
    "rows overlap": lambda t: t.flatten()[: len(t) + t[0].numel() - 1].unfold(0, t[0].numel(), 1).view_as(t),
}


def bits(t: Tensor) -> Tensor:
    """A copy of all bytes of the storage that a tensor views, including those between its elements."""
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
    """Outputs and gradients, in float64. The tensors are passed without a copy, and must not be written to."""
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
    """The error that is allowed because a GEMM may flush subnormals to 0, times the factors that are above 1."""
    lost = 8 * torch.finfo(dtype).tiny
    for factor in factors:
        lost *= max(1.0, factor)
    return lost


def largest_error(eager: list[Results], name: str, truth: Tensor) -> float:
    """The largest error of the eager forms; NaN counts as 0, so that it allows nothing."""
    errors = [difference(e[name], truth) for e in eager]
    return max(0.0 if error != error else error for error in errors)
