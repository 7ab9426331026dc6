"""Seeded problems: every loss, option, size, dtype and scale on which backends are compared with the oracle.

They are made on the CPU, whatever the default device and dtype, so that a seed means the same numbers everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.testing.inputs import Leaves
from fused_contrastive.testing.maker import Maker, Sizes
from fused_contrastive.testing.registry import LOSSES, PRIMITIVES, Member

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 1: no negatives; 7, 257: one off the vector width and the tile; 1000: several tiles and a part of one.
SIZES = (1, 2, 7, 64, 257, 1000)
DIMS = (1, 3, 64, 513)
SCALES = (0.01, 1.0, 14.3, 100.0, 1000.0)

MEMBERS = {**LOSSES, **PRIMITIVES}
OPTIONS = [(name, option) for name, member in LOSSES.items() for option in member.options]


@dataclass(frozen=True)
class Case:
    """One problem of one loss or primitive. Each use makes the same tensors again.

    ``features``, if given, take the place of the first two tensors.
    """

    loss: str
    variant: str
    sizes: Sizes
    seed: int
    features: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if "tokens" in self.option or self.loss == "filip":  # at small D maxima tie, and their gradients may differ
            object.__setattr__(self, "sizes", replace(self.sizes, d=max(self.sizes.d, 16)))

    @property
    def member(self) -> Member:
        return MEMBERS[self.loss]

    @property
    def option(self) -> str:
        return f"{self.loss} {self.variant}"

    @property
    def dtype(self) -> torch.dtype:
        return self.sizes.dtype

    @property
    def size(self) -> int:
        """Roughly how many multiplications its products take."""
        return (self.sizes.m or self.sizes.n) * self.sizes.n * self.sizes.d

    def __str__(self) -> str:
        return f"{self.option!r} {self.sizes} seed={self.seed}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Leaves, dict[str, Any]]:
        """Leaves, which get gradients, and the other arguments."""
        leaves, options = self.member.make(Maker(self.sizes, self.seed), self.member.options[self.variant])
        if self.features is not None:
            leaves |= dict(zip(leaves, self.features, strict=False))

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(moved(each) for each in value)
            return value.to(device) if isinstance(value, Tensor) else value

        return {name: t.to(device) for name, t in leaves.items()}, {name: moved(t) for name, t in options.items()}


def grid(
    dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], dims: tuple[int, ...], scales: tuple[float, ...], seed: int
) -> Iterator[Case]:
    """Every combination of sizes M x N (M = N for CLIP), dtypes, dims, scales and options of the primitive and CLIP."""
    seeds = random.Random(seed)
    options = [(name, option) for name in ("contrastive_stats", "clip") for option in MEMBERS[name].options]
    for m in sizes:
        for n in sizes:
            for d in dims:
                for scale in scales:
                    for dtype in dtypes:
                        for name, option in options:
                            if name == "clip" and (m != n or ("decoupled" in option and n == 1)):
                                continue  # an empty denominator: the loss is -inf, which a test of its own covers
                            made = Sizes(n, d, dtype, scale, m=None if name == "clip" else m)
                            yield Case(name, option, made, seeds.getrandbits(32))


def sample_of_grid(count: int, seed: int) -> Iterator[Case]:
    """Random cases of the full grid, small sizes more often than large."""
    cases = list(grid(DTYPES, SIZES, DIMS, SCALES, seed))
    yield from random.Random(seed).choices(cases, weights=[1.0 / (1 + case.size / 1e6) for case in cases], k=count)


def sample(count: int, seed: int) -> Iterator[Case]:
    """Every loss and option in turn, at random sizes, dtypes and scales."""
    rng = random.Random(seed)
    for k in range(count):
        d, scale = rng.choice((1, 3, 16, 65)), rng.choice((0.5, 14.3, 100.0))
        sizes = Sizes(rng.choice((2, 5, 17, 64, 130)), d, rng.choice(DTYPES), scale)
        yield Case(*OPTIONS[k % len(OPTIONS)], sizes, rng.getrandbits(31))
