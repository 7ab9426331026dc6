"""One small call of every loss and primitive, for tests of behaviour and not of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import fused_contrastive as fc


def _labels(x: Tensor, each: int = 2) -> Tensor:
    return torch.arange(len(x), device=x.device) % -(-len(x) // each)


def _tokens(x: Tensor) -> Tensor:
    """(N, D) -> (N / 4, 4, D)."""
    return x[: len(x) // 4 * 4].unflatten(0, (-1, 4))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "clip": fc.clip_loss,
    "info_nce": lambda x, y, s: fc.info_nce_loss(x, y, logit_scale=s, negatives=y.flip(0), label_smoothing=0.1),
    "nt_xent": lambda x, y, s: fc.nt_xent_loss(x, y, 1 / s, normalize=True),
    "supcon": lambda x, y, s: fc.supcon_loss(x + y, _labels(x, 100), 1 / s, normalize=True),
    "supcon in": lambda x, y, s: fc.supcon_loss(torch.stack((x, y), dim=1), _labels(x), 1 / s, variant="in"),
    "siglip": lambda x, y, s: fc.siglip_loss(x, y, s, -s),
    "distillation": lambda x, y, s: fc.distillation_loss(x, y, s, y.flip(0), x.flip(0), 3.0, targets_weight=0.3),
    "filip": lambda x, y, s: fc.filip_loss(_tokens(x), _tokens(y), s),
    "x_clip": lambda x, y, s: fc.x_clip_loss(x, y, s, sim_reg_loss_weight=0.1),
    "max_sim": lambda x, y, s: s * fc.max_sim(_tokens(x), _tokens(y), memory_budget=0).sum(),
}


def step(loss: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The loss and its gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = LOSSES[loss](*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def problem(n: int, d: int) -> list[Tensor]:
    return [*(torch.nn.functional.normalize(torch.randn(n, d), dim=1) for _ in range(2)), torch.tensor(5.0)]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether the tensors are equal bit for bit."""
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
