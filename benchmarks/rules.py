"""Benchmarks of CLIP with each rule that decides which pairs count, against N x N masks; and of distillation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from benchmarks.workloads import PRODUCT, WORKLOADS, BenchProblem, Loss, Workload, rows, square, unit_pair_and_scale
from fused_contrastive.testing import textbook, textbook_related

WIDTH = 128  # of the guide's features
CLASSES = 10
CAPTIONS = 5  # rows with one id
# At these margins, random similarities are not within rounding of a limit.
MARGIN = -0.3
GUIDE_MARGIN = -0.6
TEACHER_SCALE = 20.0


@functools.lru_cache
def _ids(n: int, device: torch.device, count: int) -> Tensor:
    """(n, count) ids; a value is shared by two rows on average."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(max(1, n // 2), (n, count), generator=generator).to(device)


@functools.lru_cache
def _features(n: int, device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(n, width, generator=generator), dim=1).to(device) for _ in range(2))
    return a, b


def _rule(options: Callable[[Tensor], dict[str, Any]], eager: Loss) -> Workload:
    """The workload of clip_loss with the options that belong to a batch x, compared with ``eager``."""

    def ours(x: Tensor, y: Tensor, scale: Tensor, **more: Any) -> Tensor:
        loss: Tensor = fc.clip_loss(x, y, scale, **options(x), **more)
        return loss

    def truth(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        wide: dict[str, Any] = {k: tuple(g.double() for g in v) if k == "guide" else v for k, v in options(x).items()}
        return textbook.clip(PRODUCT, x, y, scale, **wide)

    return Workload(_inputs, ours, eager, truth, square)


def _inputs(problem: BenchProblem) -> dict[str, Tensor]:
    """The guide's and the teacher's features are made here too, before memory is measured."""
    leaves = unit_pair_and_scale(problem)
    for width in (WIDTH, problem.d):
        _features(problem.n, leaves["x"].device, width)
    return leaves


def _same_id(ids: Callable[[Tensor], Tensor]) -> Callable[[Tensor], dict[str, Any]]:
    return lambda x: {"row_ids": ids(x), "col_ids": ids(x)}


def _masked(left_out: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Loss:
    """Eager CLIP without the pairs that ``left_out(x, y)`` marks, in a mask for the rows and one for the columns; the
    diagonal always counts."""

    def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        logits, own = scale * x @ y.T, torch.eye(len(x), dtype=torch.bool, device=x.device)
        both = zip((logits, logits.T), left_out(x, y), strict=True)
        losses = [F.cross_entropy(s.masked_fill(out & ~own, -torch.inf), rows(x)) for s, out in both]
        return (losses[0] + losses[1]) / 2

    return eager


def _with_targets(ids: Callable[[Tensor], Tensor]) -> Loss:
    def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        logits, of = scale * x @ y.T, ids(x)
        target = (of[:, None] == of).to(logits.dtype)
        target = target / target.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return eager


def _sum_eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, of = scale * x @ y.T, _captions(x)
    other = of[:, None] != of
    losses = [(s.logsumexp(1) - s.masked_fill(other, -torch.inf).logsumexp(1)).mean() for s in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2


def _captions(x: Tensor) -> Tensor:
    return rows(x) // CAPTIONS


def _classes(x: Tensor) -> Tensor:
    return rows(x) % CLASSES


def _equal(count: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def left_out(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ids = _ids(len(x), x.device, count)
        equal = (ids[:, None] == ids).any(dim=2)
        return equal, equal.T

    return left_out


def _above(similarity: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    limit = (similarity.diagonal() - margin)[:, None]
    return similarity > limit, limit < similarity.T


def _above_of_ours(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return _above((x @ y.T).detach(), MARGIN)


def _above_of_guide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _features(len(x), x.device, WIDTH)
    return _above(a @ b.T, GUIDE_MARGIN)


def _teacher(x: Tensor) -> tuple[Tensor, Tensor]:
    return _features(len(x), x.device, x.shape[1])


def _distillation_ours(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return fc.distillation_loss(x, y, scale, *_teacher(x), TEACHER_SCALE, **options)


def _distillation_eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    a, b = (t.to(x.dtype) for t in _teacher(x))
    logits, of_teacher = scale * x @ y.T, TEACHER_SCALE * a @ b.T
    rows_loss = F.cross_entropy(logits, of_teacher.softmax(dim=1))
    return (rows_loss + F.cross_entropy(logits.T, of_teacher.T.softmax(dim=1))) / 2


def _distillation_truth(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    a, b = _teacher(x)
    return textbook_related.distillation(PRODUCT, x, y, scale, teacher_x=a, teacher_y=b, teacher_scale=TEACHER_SCALE)


RULES = {
    "ids": _rule(_same_id(lambda x: _ids(len(x), x.device, 1)), _masked(_equal(1))),
    "two ids": _rule(_same_id(lambda x: _ids(len(x), x.device, 2)), _masked(_equal(2))),
    "margin": _rule(lambda x: {"absolute_margin": MARGIN}, _masked(_above_of_ours)),
    "mean": _rule(lambda x: {**_same_id(_captions)(x), "equal_ids": "mean"}, _with_targets(_captions)),
    "sum": _rule(lambda x: {**_same_id(_captions)(x), "equal_ids": "sum"}, _sum_eager),
    "mean, 10 classes": _rule(lambda x: {**_same_id(_classes)(x), "equal_ids": "mean"}, _with_targets(_classes)),
    "guide": _rule(
        lambda x: {"guide": _features(len(x), x.device, WIDTH), "absolute_margin": GUIDE_MARGIN},
        _masked(_above_of_guide),
    ),
    "distillation": Workload(
        _inputs, _distillation_ours, _distillation_eager, _distillation_truth, square
    ),
}  # fmt: skip
WORKLOADS.update(RULES)
