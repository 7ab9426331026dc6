"""What the benchmarks share: seeded features, the eager formula, interleaved timing, provenance."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive

SCALE = 14.3  # CLIP's at the start of training


def features(
    n: int, d: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Two (n, d) sets of unit features and a logit scale, all with gradients."""
    x, y = (F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype).requires_grad_() for _ in range(2))
    return x, y, torch.tensor(SCALE, device=device, requires_grad=True)


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The loss as training code writes it."""
    logits = scale * x @ y.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def interleaved(runs: dict[str, Callable[[], object]], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns so that all meet the same noise; one round of warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < least:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def provenance() -> str:
    """Versions, machine and commit, for the head of every table."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return (
        f"fused_contrastive {fused_contrastive.__version__} ({commit.stdout.strip() or 'no git'}), "
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}"
    )
