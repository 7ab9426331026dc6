"""The registry of ``benchmarks`` under pytest-benchmark, for its statistics, storage and histograms.

    pytest benchmarks --benchmark-group-by=param:problem --benchmark-sort=min
    pytest benchmarks -k "clip and ours" --benchmark-autosave ; pytest benchmarks --benchmark-compare

It times one implementation after the other, in milliseconds, while ``python -m benchmarks`` interleaves them and counts
in u, the time of the vendor's product of all similarities. Each is checked against float64 first.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks import peers  # noqa: F401  puts the libraries into the registry
from benchmarks.check import small_enough, wrong
from benchmarks.implementations import REGISTRY, CannotRunError, Implementation, load
from benchmarks.timing import step
from benchmarks.workloads import WORKLOADS, BenchProblem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (128, 1024) if DEVICE == "cpu" else (1024, 8192)
LOSSES = ("clip", "info_nce", "nt_xent", "siglip", "supcon")
PROBLEMS = [BenchProblem(loss, n, 512, device=DEVICE) for loss in LOSSES for n in SIZES]
PROBLEMS.append(BenchProblem("max_sim", 64, 128, device=DEVICE))
CASES = [(problem, i) for problem in PROBLEMS for i in REGISTRY if i.loss == problem.loss]


@pytest.mark.parametrize(
    ("problem", "implementation"), CASES, ids=[f"{problem}: {i.name}" for problem, i in CASES]
)  # fmt: skip
def test_loss(benchmark: Any, problem: BenchProblem, implementation: Implementation) -> None:
    torch._dynamo.reset()
    try:
        loss = load(implementation, problem)
    except CannotRunError as error:
        pytest.skip(str(error))
    assert wrong(implementation, small_enough(problem)) is None
    benchmark.extra_info.update(asdict(problem), implementation=implementation.name)
    leaves = WORKLOADS[problem.loss].inputs(problem)
    benchmark.pedantic(step(loss, leaves, problem.device), rounds=10, warmup_rounds=2)
