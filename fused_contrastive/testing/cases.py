"""Seeded problems: every size, dtype, scale and option on which backends are compared with the oracle.

They are made on the CPU, whatever the default device and dtype, so that a seed means the same numbers everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 1: nothing left after the positive; 7, 257: one off the vector width and the tile; 1000: several tiles and a part.
SIZES = (1, 2, 7, 64, 257, 1000)
DIMS = (1, 3, 64, 513)
SCALES = (0.01, 1.0, 14.3, 100.0, 1000.0)

STATS_OPTIONS = (
    "plain",
    "targets",
    "col_bias",
    "ids",
    "exclude_self",
    "row only",
    "col only",
    "recompute",
    "half kept",
)
CLIP_OPTIONS = ("clip", "clip decoupled", "clip smoothed", "clip decoupled smoothed", "clip sum", "clip none")


@dataclass(frozen=True)
class Case:
    """One problem. ``inputs`` makes it anew on the CPU, the same each time."""

    dtype: torch.dtype
    m: int
    n: int
    d: int
    scale: float
    option: str
    seed: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} M={self.m} N={self.n} D={self.d} scale={self.scale} {self.option!r} seed={self.seed}"

    @property
    def size(self) -> int:
        """Multiplications of its products."""
        return self.m * self.n * self.d

    @property
    def is_clip(self) -> bool:
        return self.option in CLIP_OPTIONS

    def inputs(self) -> Inputs:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return (_clip_inputs if self.is_clip else _stats_inputs)(self, generator)


@dataclass(frozen=True)
class Inputs:
    """Leaves that get gradients, other keyword arguments, and the weights of the scalar objective."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    scale: Tensor  # ()
    col_bias: Tensor | None  # (N,)
    options: dict[str, Any]
    weights: dict[str, Tensor]  # one per output
    memory_budget: int | str

    def to(self, dtype: torch.dtype) -> Inputs:
        """Copies of the leaves in another dtype, for the oracle."""
        bias = None if self.col_bias is None else self.col_bias.to(dtype)
        return replace(self, x=self.x.to(dtype), y=self.y.to(dtype), scale=self.scale.to(dtype), col_bias=bias)

    def on(self, device: torch.device) -> Inputs:
        """All of it on a device."""
        moved = {name: _on(value, device) for name, value in self.__dict__.items()}
        for name in ("options", "weights"):
            moved[name] = {key: _on(value, device) for key, value in moved[name].items()}
        return Inputs(**moved)


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _features(rows: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    features = torch.randn(rows, d, generator=generator, dtype=torch.float64, device="cpu")
    return F.normalize(features, dim=1).to(dtype)  # D = 1: +-1, so many equal columns and exact products


def _stats_inputs(case: Case, generator: torch.Generator) -> Inputs:
    m, n = case.m, case.n
    statistics = torch.float64 if case.dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {}
    col_bias = None
    if case.option == "targets" or m > n:
        options["targets"] = torch.randint(n, (m,), generator=generator, device="cpu")
    if case.option == "col_bias":
        col_bias = torch.randn(n, generator=generator, dtype=torch.float32, device="cpu").to(statistics)
        empty = torch.rand(n, generator=generator, dtype=torch.float32, device="cpu") < 0.2
        own = options.get("targets", torch.arange(m, device="cpu"))
        empty[own] = False  # a positive in an empty slot would be -inf
        col_bias = col_bias.masked_fill(empty, -torch.inf)
    if case.option == "ids":  # few enough ids that some rows have nothing left
        high = max(2, n // 8)
        options["row_ids"] = torch.randint(high, (m,), generator=generator, device="cpu") - high // 2
        options["col_ids"] = torch.randint(high, (n,), generator=generator, device="cpu") - high // 2
    if case.option == "exclude_self":
        options["exclude_self"] = True
    weights = {
        name: torch.rand(size, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
        for name, size in (("pos", m), ("row", m), ("col", n))
    }
    if case.option == "row only":
        del weights["col"]
    if case.option == "col only":
        del weights["row"]
    budget = {"recompute": 0, "half kept": (m // 2) * n * statistics.itemsize}.get(case.option, "auto")
    return Inputs(
        x=_features(m, case.d, case.dtype, generator),
        y=_features(n, case.d, case.dtype, generator),
        scale=torch.tensor(case.scale, dtype=statistics, device="cpu"),
        col_bias=col_bias,
        options=options,
        weights=weights,
        memory_budget=budget,
    )


def _clip_inputs(case: Case, generator: torch.Generator) -> Inputs:
    statistics = torch.float64 if case.dtype == torch.float64 else torch.float32
    reduction = {"clip sum": "sum", "clip none": "none"}.get(case.option, "mean")
    size = (case.n,) if reduction == "none" else ()
    return Inputs(
        x=_features(case.n, case.d, case.dtype, generator),
        y=_features(case.n, case.d, case.dtype, generator),
        scale=torch.tensor(case.scale, dtype=statistics, device="cpu"),
        col_bias=None,
        options={
            "decoupled": "decoupled" in case.option,
            "label_smoothing": 0.1 if "smoothed" in case.option else 0.0,
            "reduction": reduction,
        },
        weights={"loss": torch.rand(size, generator=generator, dtype=torch.float64, device="cpu") + 0.5},
        memory_budget="auto",
    )


def grid(
    dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], dims: tuple[int, ...], scales: tuple[float, ...], seed: int
) -> Iterator[Case]:
    """Every combination of sizes M x N (M = N for CLIP), dtypes, dims, scales and options."""
    seeds = random.Random(seed)
    for m in sizes:
        for n in sizes:
            for d in dims:
                for scale in scales:
                    for dtype in dtypes:
                        for option in (*STATS_OPTIONS, *(CLIP_OPTIONS if m == n else ())):
                            if "decoupled" in option and n == 1:
                                continue  # an empty denominator: the loss is -inf, which a test of its own covers
                            yield Case(dtype, m, n, d, scale, option, seeds.getrandbits(32))


def sample(count: int, seed: int) -> Iterator[Case]:
    """Random cases of the full grid, small sizes more often than large."""
    cases = list(grid(DTYPES, SIZES, DIMS, SCALES, seed))
    cost = [1.0 / (1 + case.m * case.n * case.d / 1e6) for case in cases]
    yield from random.Random(seed).choices(cases, weights=cost, k=count)
