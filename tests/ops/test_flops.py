"""torch.utils.flop_counter.FlopCounterMode counts the matrix products of every operator, forward and backward."""

from __future__ import annotations

import processes
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_contrastive as fc
from fused_contrastive.ops.flops import FORMULAS

M, N, D = 6, 9, 8
T, P = 2, 3  # tokens


def counted(run, *leaves):  # type: ignore[no-untyped-def]
    """Flops of the forward and of the backward, in multiply-adds."""
    with FlopCounterMode(display=False) as forward:
        value = run(*leaves)
    with FlopCounterMode(display=False) as backward:
        value.backward()
    return forward.get_total_flops() / 2, backward.get_total_flops() / 2


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("budget", "again"), [(0, 1), (10**9, 0)])
def test_statistics(budget: int, again: int, backend: str) -> None:
    options = {"memory_budget": budget, "backend": backend}
    x, y = leaves((M, D), (N, D))
    whole = M * N * D
    for run in (
        lambda x, y: fc.contrastive_stats(x, y, 2.0, **options).row.sum(),
        lambda x, y: fc.sigmoid_stats(x, y, 2.0, **options).row.sum(),
        lambda x, y: fc.info_nce_loss(x, y, **options),
    ):
        assert counted(run, x, y) == (whole, (2 + again) * whole)
        assert counted(run, x.detach(), y) == (whole, (1 + again) * whole)
    triangle = M * (M - 1) // 2 * D
    assert counted(lambda x: fc.self_stats(x, 2.0, **options).sum(), x) == (triangle, (2 + again) * triangle)


def test_rows_that_are_kept_are_not_counted_again() -> None:
    x, y = leaves((M, D), (N, D))
    kept = 2
    _, backward = counted(lambda x, y: fc.clip_loss(x, y[:M], 2.0, memory_budget=kept * M * 4, backend="cpp"), x, y)
    assert backward == (2 * M + M - kept) * M * D
    _, backward = counted(lambda x: fc.self_stats(x, 2.0, memory_budget=kept * M * 4, backend="cpp").sum(), x)
    pairs = M * (M - 1) // 2
    assert backward == (3 * pairs - (M - 1) - (M - 2)) * D


@pytest.mark.parametrize(("budget", "again"), [(0, 1), (10**6, 0)])
@pytest.mark.parametrize("direction", ["x", "y", "both"])
def test_max_sim(budget: int, again: int, direction: str, backend: str) -> None:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = fc.max_sim(x, y, direction=direction, memory_budget=budget, backend=backend)
        return sum(t.sum() for t in scores) if direction == "both" else scores.sum()

    m, n = 2, 3
    forward, backward = counted(run, *leaves((m, T, D), (n, P, D)))
    maxima = {"x": T, "y": P, "both": T + P}[direction]
    assert forward == m * n * T * P * D
    assert backward == again * forward + 2 * m * n * maxima * D


def test_rankings(backend: str) -> None:
    x, y, targets = torch.randn(M, D), torch.randn(N, D), torch.arange(M)
    for run in (
        lambda: fc.rank(x, y, 3, backend=backend),
        lambda: fc.target_ranks(x, y, targets=targets, backend=backend),
        lambda: fc.sample_negatives(x, y, 2.0, directions=("col",), backend=backend),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 2 * M * N * D


def test_every_operator_has_a_formula() -> None:
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "fused_contr" in name}
    assert set(FORMULAS) == registered


@pytest.mark.parametrize("first", ["fused_contrastive", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    code = f"""
import {first}, torch, fused_contrastive, importlib.util
importlib.util.find_spec("torch.utils.flop_counter")  # whoever only asks where it is
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(4, 3)
with FlopCounterMode(display=False) as counter:
    fused_contrastive.clip_loss(x, x, 2.0, backend="reference")
assert counter.get_total_flops() == 2 * 4 * 4 * 3, counter.get_total_flops()
"""
    result = processes.run(code)
    assert result.returncode == 0, result.stderr
