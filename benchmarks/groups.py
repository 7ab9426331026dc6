"""Benchmarks of CLIP in groups: B problems of N rows in one call, against ``torch.bmm`` and a call for each group."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from benchmarks.workloads import PRODUCT, SCALE, WORKLOADS, BenchProblem, Workload, features
from fused_contrastive.testing import textbook

SIZES = {49: 256, 196: 64, 1024: 8}  # rows of a group: how many groups the suite takes


def _workload(size: int) -> Workload:
    """Groups of ``size`` rows, as many as the problem's rows make."""

    def inputs(problem: BenchProblem) -> dict[str, Tensor]:
        shape = (max(1, problem.n // size), size)
        scale = torch.tensor(SCALE, device=problem.device, requires_grad=True)
        return {**features(problem, True, x=shape, y=shape), "scale": scale}

    return Workload(inputs, fc.clip_loss, eager, _truth, lambda p: (p.n, p.d, size))


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * torch.bmm(x, y.transpose(1, 2))
    targets = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0])
    losses = [F.cross_entropy(s.flatten(0, 1), targets) for s in (logits, logits.transpose(1, 2))]
    return (losses[0] + losses[1]) / 2


def loop(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """A call for each group."""
    return torch.stack([fc.clip_loss(a, b, scale, **options) for a, b in zip(x, y, strict=True)]).mean()


def _truth(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    parts = [textbook.info_nce(PRODUCT, a, b, scale, symmetric=True) for a, b in zip(x, y, strict=True)]
    return torch.stack(parts).mean()


GROUPS = {f"groups of {size}": _workload(size) for size in SIZES}
WORKLOADS.update(GROUPS)
