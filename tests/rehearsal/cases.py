"""The cases: every loss and primitive with its options, forward and backward, at a few shapes.

Nothing computes, so that results hold whatever was in memory: a case only shows that its calls succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.testing.cases import OPTIONS
from fused_contrastive.testing.cases import Case as Inputs
from fused_contrastive.testing.maker import Sizes
from fused_contrastive.testing.registry import PRIMITIVES


class Kind(NamedTuple):
    """A dtype, and torch's precision of float32 products."""

    name: str
    dtype: torch.dtype
    precision: str = "highest"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("bf16", torch.bfloat16),
        Kind("fp16", torch.float16),
        Kind("fp32", torch.float32),
        Kind("tf32", torch.float32, "high"),
    )
}
KEPT = ("everything", "half", "nothing")
# Feature rows of a multiple of 32 bytes, of 16, of neither; M and N that are multiples of a tile, and not; one row.
SHAPES = ((600, 1100, 64), (512, 1024, 513), (1, 700, 64), (300, 301, 1))
SMALL = (320, 600, 64)


def budget(kept: str, m: int, n: int, each: int) -> int:
    """The memory budget for M x N products of ``each`` bytes."""
    return {"everything": 1 << 32, "half": m * n * each // 2, "nothing": 0}[kept]


def step(outputs: Any, leaves: list[Tensor]) -> None:
    """Computes the gradients of the sum of all outputs."""
    held = [t for t in ([outputs] if isinstance(outputs, Tensor) else outputs) if t is not None]
    total = torch.stack([t.double().sum() for t in held]).sum()
    torch.autograd.grad(total, leaves, allow_unused=True)


def leaf(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


Call = Callable[[Kind, str], None]  # arguments: the kind of features, and what is kept for the backward


def of_case(
    name: str, option: str, shape: tuple[int, int, int] = (600, 600, 64), function: Callable[..., Any] | None = None
) -> Call:
    """A call of a loss or primitive, or of another function that takes the same arguments."""
    m, n, d = shape

    def run(kind: Kind, kept: str) -> None:
        case = Inputs(name, option, Sizes(n, d, kind.dtype, 14.3, m=m), seed=0)
        leaves, options = case.inputs()
        held = {key: t.requires_grad_() for key, t in leaves.items()}
        options |= {"memory_budget": budget(kept, m, n, kind.dtype.itemsize), "backend": "triton"}
        step((function or case.member.ours)(**held, **options), list(held.values()))

    return run


def every_option(kind: Kind, kept: str) -> None:
    """All options at once, without gradients of y and the scale."""
    m, n, d = SMALL
    x, y, bias = leaf((m, d), kind.dtype), torch.randn(n, d).to(kind.dtype), leaf((n,))
    found = fc.contrastive_stats(
        x, y, 5.0, targets=torch.randint(n, (m,)), col_bias=bias, row_ids=torch.randint(50, (m,)),
        col_ids=torch.randint(50, (n,)), exclude_self=True,
        memory_budget=budget(kept, m, n, kind.dtype.itemsize), backend="triton",
    )  # fmt: skip
    step(found, [x, bias])


def self_stats(**options: Any) -> Call:
    def run(kind: Kind, kept: str) -> None:
        n = 1100
        x, scale = leaf((n, 64), kind.dtype), leaf(())
        ids = {"ids": torch.randint(100, (n,)), **options} if options else {}
        kept_bytes = budget(kept, n, n, kind.dtype.itemsize)
        step(fc.self_stats(x, scale, **ids, memory_budget=kept_bytes, backend="triton"), [x, scale])

    return run


def max_sim(t: int, p: int, d: int, direction: str, masked: bool, own: int = 0, smooth: float | None = None) -> Call:
    """A call of ``max_sim`` on items of t and of p tokens; ``own``: so many items of y for each of x."""

    def run(kind: Kind, kept: str) -> None:
        items = (9, own) if own else (11,)
        x, y = leaf((9, t, d), kind.dtype), leaf((*items, p, d), kind.dtype)
        masks = [torch.rand(9, t) < 0.7, torch.rand(*items, p) < 0.7] if masked else []
        found = fc.max_sim(
            x, y, *masks, reduction="mean" if masked else "sum", direction=direction, smooth=smooth,
            memory_budget=budget(kept, 9, items[-1] * max(t, p), 1), backend="triton",
        )  # fmt: skip
        step(found, [x, y])

    return run


def ranking(kind: Kind, kept: str) -> None:
    x, y, targets = torch.randn(300, 64).to(kind.dtype), torch.randn(700, 64).to(kind.dtype), torch.randint(700, (300,))
    fc.rank(x, y, 5, backend="triton")
    fc.rank(x, y, 5, targets=targets, max_score=3.0, relative_margin=0.05, backend="triton")
    fc.sample_negatives(x, y, 2.0, targets=targets, backend="triton")
    fc.target_ranks(x, y, targets=targets, backend="triton")
    fc.recall_at_k(x, y, targets=targets[:, None], backend="triton")
    fc.median_rank(x, y, targets=targets, backend="triton")


def ranks_of_groups(name: str, **more: Any) -> Call:
    """A loss of groups that also returns its metrics."""

    def run(kind: Kind, kept: str) -> None:
        x, y, scale = leaf((200, 64), kind.dtype), leaf((200, 64), kind.dtype), leaf(())
        options = {"lengths": torch.tensor([70, 0, 129, 1]), "metrics": True, "backend": "triton", **more}
        loss, _ = getattr(fc, name)(x, y, logit_scale=scale, **options)
        step(loss, [x, y, scale])

    return run


CALLS: dict[str, Call] = {
    **{f"{name} {option!r}": of_case(name, option) for name, option in OPTIONS},
    **{
        f"contrastive_stats {option!r}": of_case("contrastive_stats", option, SMALL)
        for option in list(PRIMITIVES["contrastive_stats"].options)[:-2]
    },
    "contrastive_stats, every option": every_option,
    **{
        f"sigmoid_stats {option!r}": of_case("contrastive_stats", option, SMALL, fc.sigmoid_stats)
        for option in ("plain", "targets", "col_bias", "ids")
    },
    **{f"contrastive_stats {m} x {n} x {d}": of_case("contrastive_stats", "plain", (m, n, d)) for m, n, d in SHAPES},
    "self_stats": self_stats(),
    "self_stats, ids": self_stats(equal_ids="exclude"),
    "self_stats, equal ids only": self_stats(equal_ids="only"),
    "max_sim": max_sim(20, 30, 64, "x", False),
    "max_sim, y, masks": max_sim(20, 30, 64, "y", True),
    "max_sim, both, masks": max_sim(20, 30, 64, "both", True),
    "max_sim, both, one token": max_sim(1, 300, 64, "both", False),
    "max_sim, both, long items": max_sim(300, 17, 513, "both", False),
    "max_sim, own": max_sim(20, 30, 64, "x", False, own=3),
    "max_sim, own, masks, smooth": max_sim(20, 30, 64, "both", True, own=3, smooth=0.1),
    "ranking": ranking,
    "clip_loss, groups, ranks": ranks_of_groups("clip_loss"),
    "nt_xent_loss, groups, ranks": ranks_of_groups("nt_xent_loss", normalize=True),
    "siglip_loss, groups, ids, ranks": ranks_of_groups(
        "siglip_loss", row_ids=torch.arange(200) // 3, col_ids=torch.arange(200) // 3
    ),
}


class Case(NamedTuple):
    """One call, and its name."""

    name: str
    kind: Kind
    kept: str
    call: Call

    def __str__(self) -> str:
        return f"{self.name}, {self.kind.name}, {self.kept} kept"

    def run(self) -> None:
        torch.set_float32_matmul_precision(self.kind.precision)
        torch.manual_seed(0)
        self.call(self.kind, self.kept)


def every(arch: str, kinds: Sequence[str]) -> Iterator[Case]:
    """Each call with each kind and each choice of what is kept: 660 kernels for an architecture."""
    for kind in kinds:
        for name, call in CALLS.items():
            for kept in KEPT:
                yield Case(name, KINDS[kind], kept, call)


def some(arch: str, kinds: Sequence[str]) -> Iterator[Case]:
    """On sm_90 each call in bf16, and half of them in another kind; a third of them on sm_80, another third on sm_100.

    Kinds, and what is kept, alternate from call to call.
    """
    for i, (name, call) in enumerate(CALLS.items()):
        if arch == "sm_90":
            of_this = {"bf16", list(KINDS)[1 + i // 2 % 3]} if i % 2 else {"bf16"}
        else:
            of_this = {list(KINDS)[i // 3 % len(KINDS)]} if i % 3 == (arch == "sm_100") else set()
        for k, kind in enumerate(KINDS):
            if kind in of_this and kind in kinds:
                yield Case(name, KINDS[kind], KEPT[(i // 3 + k) % len(KEPT)], call)


QUICK = {
    *(f"contrastive_stats 600 x 1100 x 64, {kind}, {kept} kept" for kind in ("bf16", "fp32") for kept in KEPT),
    "siglip 'plain', bf16, nothing kept",
    "max_sim, bf16, everything kept",
    "ranking, fp32, nothing kept",
}


def quick(arch: str, kinds: Sequence[str]) -> Iterator[Case]:
    return (case for case in every(arch, kinds) if str(case) in QUICK)
