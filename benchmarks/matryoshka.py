"""Benchmarks of the losses of nested prefixes, in one call and in a call for each prefix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from benchmarks.workloads import PRODUCT, SCALE, WORKLOADS, BenchProblem, Workload, features, rows, square
from fused_contrastive.testing import textbook

SHARES = (8, 4, 2, 1)  # a prefix has one part in so many of the columns: (64, 128, 256, 512) of 512


def _dims(x: Tensor) -> tuple[int, ...]:
    return tuple(max(1, x.shape[1] // share) for share in SHARES)


def _inputs(problem: BenchProblem) -> dict[str, Tensor]:
    scale = torch.tensor(SCALE, device=problem.device, requires_grad=True)
    return {**features(problem, False, x=(problem.n,), y=(problem.n,)), "scale": scale}


def _clip(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    loss: Tensor = fc.clip_loss(x, y, scale, dims=_dims(x), normalize=True, **options)
    return loss


def _info_nce(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    loss: Tensor = fc.info_nce_loss(x, y, logit_scale=scale, dims=_dims(x), normalize=True, **options)
    return loss


def _total(of_prefix: Any, x: Tensor, y: Tensor, *rest: Any, **options: Any) -> Tensor:
    return torch.stack([of_prefix(x[:, :dim], y[:, :dim], *rest, **options) for dim in _dims(x)]).sum()


def clip_loop(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """A call for each prefix."""
    return _total(fc.clip_loss, x, y, scale, normalize=True, **options)


def info_nce_loop(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return _total(fc.info_nce_loss, x, y, logit_scale=scale, normalize=True, **options)


def _eager_of(both: bool) -> Any:
    def of_prefix(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        logits = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
        loss = F.cross_entropy(logits, rows(x))
        return (loss + F.cross_entropy(logits.T, rows(x))) / 2 if both else loss

    return lambda x, y, scale: _total(of_prefix, x, y, scale)


def _truth_of(both: bool) -> Any:
    def of_prefix(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return textbook.info_nce(PRODUCT, x, y, scale, symmetric=both, normalize=True)

    return lambda x, y, scale: _total(of_prefix, x, y, scale)


MATRYOSHKA = {
    "clip of prefixes": Workload(_inputs, _clip, _eager_of(True), _truth_of(True), square),
    "info_nce of prefixes": Workload(_inputs, _info_nce, _eager_of(False), _truth_of(False), square),
}
LOOPS = {"clip of prefixes": clip_loop, "info_nce of prefixes": info_nce_loop}
WORKLOADS.update(MATRYOSHKA)
