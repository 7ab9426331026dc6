"""The kernels of nested prefixes (Matryoshka), against the reference in float64; how many products they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fused_contrastive.core.prefixes import Prefixes, PrefixNeeds, inverse_norms
from fused_contrastive.core.spec import Forward, StatsSpec, Upstream
from fused_contrastive.ops.dispatch import BACKENDS

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("triton_kernels")

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def unchanged(x: Tensor, y: Tensor) -> None:
    pass


def with_zeros(x: Tensor, y: Tensor) -> None:
    x[3], x[5, :4], y[7, :4], y[9] = 0, 0, 0, 0


def short_beginnings(x: Tensor, y: Tensor) -> None:
    x[::3, :4] *= 1e-3
    y[::2, :4] *= 1e-2


def small(x: Tensor, y: Tensor) -> None:
    x *= 1e-3
    y *= 1e-3


def infinite_at_the_end(x: Tensor, y: Tensor) -> None:
    x[3, 33:], y[4, 33:] = torch.nan, torch.inf


class Problem(NamedTuple):
    m: int = 70
    n: int = 90
    dims: tuple[int, ...] = (4, 20, 33)
    normalize: bool = True
    targets: bool = False
    ids: int = 0
    scale: float = 7.0
    want_col: bool = True
    arriving: tuple[bool, bool, bool] = (True, True, True)
    edit: Callable[[Tensor, Tensor], None] = unchanged


PROBLEMS = {
    "plain": Problem(normalize=False),
    "several blocks, targets": Problem(m=280, n=130, dims=(10, 33, 40), targets=True),
    "targets, plain": Problem(m=130, n=9, normalize=False, targets=True),
    "ids": Problem(ids=1),
    "3 ids": Problem(ids=3, normalize=False),
    "one prefix": Problem(dims=(17,)),
    "8 prefixes": Problem(dims=(4, 5, 6, 7, 30, 31, 32, 40)),
    "no padding": Problem(dims=(32,)),
    "no columns": Problem(want_col=False),
    "rows alone": Problem(arriving=(True, True, False)),
    "columns alone": Problem(arriving=(True, False, True), normalize=False),
    "positives alone": Problem(arriving=(True, False, False)),
    "zeros": Problem(edit=with_zeros),
    "short beginnings": Problem(edit=short_beginnings),
    "small": Problem(edit=small),
    "infinite at the end": Problem(edit=infinite_at_the_end),
    "negative scale": Problem(scale=-50.0),
    "sums are lost": Problem(scale=1e4),
    "one pair": Problem(m=1, n=1),
}


def run(backend: str, problem: Problem, leaves: list[Tensor], spec: StatsSpec) -> tuple[Tensor | None, ...]:
    """pos, row, col and the gradients of x, y and scale."""
    x, y = leaves
    factors = [inverse_norms(t, problem.dims) if problem.normalize else None for t in leaves]
    of = Prefixes(problem.dims, *factors)
    found = BACKENDS[backend].prefixes_forward(spec, of, x, y)
    generator = torch.Generator("cpu").manual_seed(0)
    g = [torch.rand(t.shape, generator=generator, device="cpu", dtype=torch.float64).to(WHERE) for t in found[:3]]
    there = (*problem.arriving[:2], problem.arriving[2] and problem.want_col)
    upstream = Upstream(*(t / len(x) if asked else None for t, asked in zip(g, there, strict=True)))
    saved = Forward(torch.full_like(found.pos, torch.nan), *found[1:])
    gradients = BACKENDS[backend].prefixes_backward(spec, of, x, y, saved, upstream, PrefixNeeds(True, True, True))
    return *found[:3], *gradients


# These run in every dtype, because their arithmetic depends on it; the other problems run in bfloat16.
FEW = ("several blocks, targets", "short beginnings", "zeros", "sums are lost")
CASES = [(name, dtype) for name in PROBLEMS for dtype in TOLERANCE if name in FEW or dtype == torch.bfloat16]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_same_as_the_reference(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    x, y = (F.normalize(torch.randn(size, 40, device=WHERE), dim=1) for size in (problem.m, problem.n))
    problem.edit(x, y)
    leaves = [t.to(dtype) for t in (x, y)]
    tensors: dict[str, Any] = {}
    if problem.targets:
        tensors["targets"] = torch.randint(problem.n, (problem.m,), device=WHERE)
    if problem.ids:
        shape = (problem.ids,) if problem.ids > 1 else ()
        for side, size in (("row_ids", problem.m), ("col_ids", problem.n)):
            tensors[side] = torch.randint(20 * problem.ids, (size, *shape), device=WHERE)
    scale = torch.tensor(problem.scale, device=WHERE)
    spec = StatsSpec(scale, **tensors, want_col=problem.want_col)
    found = run("triton", problem, leaves, spec)
    exact = run("reference", problem, [t.double() for t in leaves], spec._replace(scale=scale.double()))
    names = ("pos", "row", "col", "x", "y", "scale")
    for which, ours, truth in zip(names, found, exact, strict=True):
        assert ours is not None
        assert truth is not None
        assert ours.isnan().equal(truth.isnan()), which
        infinite = truth.isinf()
        assert ours[infinite].equal(truth[infinite].to(ours.dtype)), which
        off, size = ((t.double()[~infinite]).norm() for t in (ours - truth, truth))
        rounding = 1e-7 * abs(problem.scale)  # of a logit: its exponential's relative error
        assert off <= (1e-6 if which in ("pos", "row", "col") else TOLERANCE[dtype] + rounding) * size, which


def test_the_products_are_those_of_one_loss() -> None:
    """In float32 the vendor GEMM makes them: S forward, S again backward, dx and dy, each over all columns once."""
    problem = Problem(m=300, n=260)
    leaves = [torch.randn(size, 40, device=WHERE) for size in (problem.m, problem.n)]
    spec = StatsSpec(torch.tensor(1.0, device=WHERE), targets=torch.zeros(300, dtype=torch.int64, device=WHERE))
    with FlopCounterMode(display=False) as counter:
        run("triton", problem, leaves, spec)
    assert counter.get_total_flops() == 4 * 2 * problem.m * problem.n * problem.dims[-1]
