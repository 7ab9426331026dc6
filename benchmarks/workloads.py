"""What is timed: each loss as a function of a few tensors, as training code writes it, and its float64 truth.

InfoNCE, NT-Xent and SupCon take features as the encoder gives them, which the loss normalises, and have a fixed
temperature, as in the libraries' versions; CLIP and SigLIP take unit features and a learned scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.testing import oracle, textbook

Loss = Callable[..., Tensor]  # a function of a workload's tensors
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 14.3  # CLIP's at the start of training
TEMPERATURE = 1 / SCALE
T, P = 32, 49  # tokens of a caption, patches of an image
OWN, OWN_P = 8, 180  # documents of each query, and their tokens, as ColBERT's
PER_LABEL = 4  # samples with one label, for SupCon


@dataclass(frozen=True)
class BenchProblem:
    """One loss at one size. ``n`` is the number of rows of its matrix of similarities, for NT-Xent of both views."""

    loss: str
    n: int
    d: int
    dtype: str = "fp32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.loss} N = {self.n}, D = {self.d}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def problem_of(row: dict[str, Any]) -> BenchProblem:
    """The problem of a report's row."""
    return BenchProblem(**{field.name: row[field.name] for field in fields(BenchProblem)})


@dataclass(frozen=True)
class Workload:
    """One loss, in several implementations, with its inputs."""

    inputs: Callable[[BenchProblem], dict[str, Tensor]]  # the tensors that get gradients, by name
    ours: Loss  # takes the loss's own options too
    eager: Loss
    truth: Loss  # for float64 inputs, written independently of ours and of eager
    unit: Callable[[BenchProblem], tuple[int, int, int]]  # (M, K, N) of the product (M, K) by (K, N) that is its unit u
    slack: float = 0.0  # relative error that a gradient may have beyond the budget


def features(problem: BenchProblem, normalize: bool, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Leaves of these shapes, with D as their last size."""
    leaves = {name: torch.randn(*shape, problem.d, device=problem.device) for name, shape in shapes.items()}
    units = {name: F.normalize(x, dim=-1) if normalize else x for name, x in leaves.items()}
    return {name: x.to(problem.torch_dtype).requires_grad_() for name, x in units.items()}


def _pair(problem: BenchProblem) -> dict[str, Tensor]:
    return features(problem, False, x=(problem.n,), y=(problem.n,))


def unit_pair_and_scale(problem: BenchProblem) -> dict[str, Tensor]:
    scale = torch.tensor(SCALE, device=problem.device, requires_grad=True)
    return {**features(problem, True, x=(problem.n,), y=(problem.n,)), "scale": scale}


def _two_views(problem: BenchProblem) -> dict[str, Tensor]:
    return features(problem, False, x=(problem.n // 2,), y=(problem.n // 2,))


def _one_set(problem: BenchProblem) -> dict[str, Tensor]:
    return features(problem, False, x=(problem.n,))


def _tokens(problem: BenchProblem) -> dict[str, Tensor]:
    return features(problem, True, x=(problem.n, T), y=(problem.n, P))


def square(problem: BenchProblem) -> tuple[int, int, int]:
    return problem.n, problem.d, problem.n


def rows(x: Tensor) -> Tensor:
    """0, 1, ..., M - 1: the targets."""
    return torch.arange(len(x), device=x.device)


def labels(x: Tensor) -> Tensor:
    return rows(x) // PER_LABEL


def clip_eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * x @ y.T
    return (F.cross_entropy(logits, rows(x)) + F.cross_entropy(logits.T, rows(x))) / 2


def _siglip_ours(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    loss: Tensor = fc.siglip_loss(x, y, scale, -scale / 2, **options)
    return loss


def siglip_eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(x), device=x.device) - 1
    return -F.logsigmoid(signs * (scale * x @ y.T - scale / 2)).sum() / len(x)


def _info_nce_ours(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    loss: Tensor = fc.info_nce_loss(x, y, logit_scale=SCALE, normalize=True, **options)
    return loss


def info_nce_eager(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / TEMPERATURE, rows(x))


def _nt_xent_ours(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    loss: Tensor = fc.nt_xent_loss(x, y, TEMPERATURE, normalize=True, **options)
    return loss


def nt_xent_eager(x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(torch.cat((x, y)), dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / TEMPERATURE).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, rows(z).roll(len(x)))


def _supcon_ours(x: Tensor, **options: Any) -> Tensor:
    return fc.supcon_loss(x, labels(x), TEMPERATURE, normalize=True, **options)


def supcon_eager(x: Tensor) -> Tensor:
    z = F.normalize(x, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels(x)[:, None] == labels(x)) & ~own
    log_prob = F.log_softmax((z @ z.T / TEMPERATURE).masked_fill(own, -torch.inf), dim=1)
    return -(log_prob.masked_fill(~positives, 0).sum(dim=1) / positives.sum(dim=1)).mean()


def scores_loss(scores: Tensor) -> Tensor:
    """The loss that a late-interaction model trains on."""
    return F.cross_entropy(scores, rows(scores))


def _max_sim_ours(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return scores_loss(fc.max_sim(x, y, **options))


def max_sim_eager(x: Tensor, y: Tensor) -> Tensor:
    return scores_loss(torch.einsum("mtd,npd->mntp", x, y).amax(dim=3).sum(dim=2))


def _max_sim_truth(x: Tensor, y: Tensor) -> Tensor:
    """The same for a few items of x at a time, to save memory."""
    scores = [torch.einsum("mtd,npd->mntp", part, y).amax(dim=3).sum(dim=2) for part in x.split(8)]
    return scores_loss(torch.cat(scores))


def _own_tokens(problem: BenchProblem) -> dict[str, Tensor]:
    return features(problem, True, x=(problem.n, T), y=(problem.n, OWN, OWN_P))


def first_of_own(scores: Tensor) -> Tensor:
    """The cross-entropy of (M, K) scores of each query's own documents, the first of which is the positive."""
    return F.cross_entropy(scores, torch.zeros_like(rows(scores)))


def _max_sim_own_ours(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return first_of_own(fc.max_sim(x, y, **options))


def max_sim_own_eager(x: Tensor, y: Tensor) -> Tensor:
    return first_of_own(torch.einsum("mtd,mkpd->mktp", x, y).amax(dim=3).sum(dim=2))


def _max_sim_own_truth(x: Tensor, y: Tensor) -> Tensor:
    """The same query by query, by torch.matmul."""
    scores = [torch.stack([(a @ b.T).max(dim=1).values.sum() for b in own]) for a, own in zip(x, y, strict=True)]
    return first_of_own(torch.stack(scores))


PRODUCT = oracle.LOGITS["product"]
_FIXED = torch.tensor(TEMPERATURE, dtype=torch.float64)

WORKLOADS = {
    "clip": Workload(
        unit_pair_and_scale, fc.clip_loss, clip_eager,
        lambda x, y, scale: textbook.info_nce(PRODUCT, x, y, scale, symmetric=True), square,
    ),
    "info_nce": Workload(
        _pair, _info_nce_ours, info_nce_eager,
        lambda x, y: textbook.info_nce(PRODUCT, x, y, 1 / _FIXED, normalize=True), square,
    ),
    "nt_xent": Workload(
        _two_views, _nt_xent_ours, nt_xent_eager,
        lambda x, y: textbook.nt_xent(PRODUCT, x, y, temperature=_FIXED), square,
    ),
    "siglip": Workload(
        unit_pair_and_scale, _siglip_ours, siglip_eager,
        lambda x, y, scale: textbook.siglip(PRODUCT, x, y, scale, -scale / 2), square,
    ),
    "supcon": Workload(
        _one_set, _supcon_ours, supcon_eager,
        lambda x: textbook.supcon(PRODUCT, x, _FIXED, labels=labels(x), normalize=True), square,
    ),
    # Among millions of products some tie within float32's rounding, and the gradient goes to the other token.
    "max_sim": Workload(
        _tokens, _max_sim_ours, max_sim_eager, _max_sim_truth, lambda p: (p.n * T, p.d, p.n * P), slack=1e-2
    ),
    "max_sim_own": Workload(
        _own_tokens, _max_sim_own_ours, max_sim_own_eager, _max_sim_own_truth,
        lambda p: (p.n * T, p.d, OWN * OWN_P), slack=1e-2,
    ),
}  # fmt: skip
