"""Random problems of late interaction, its definition on the whole tensor of products, and a check of ``max_sim``."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_contrastive import max_sim
from fused_contrastive.core.budget import allowed

NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """A problem, its masks, and the weights of the scores in the sum that is differentiated."""

    x: Tensor
    y: Tensor
    x_mask: Tensor | None
    y_mask: Tensor | None
    weights: tuple[Tensor, ...]

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        return self.x_mask, self.y_mask


def einsum(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, reduction: str, direction: str,
    smooth: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The definition, on the whole (M, N, T, P) or (M, K, T, P) tensor."""
    x_mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if x_mask is None else x_mask
    y_mask = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device) if y_mask is None else y_mask
    form = "mtd,mkpd->mktp" if y.dim() == 4 else "mtd,npd->mntp"
    products = torch.einsum(form, x.masked_fill(~x_mask[..., None], 0), y.masked_fill(~y_mask[..., None], 0))
    y_mask = y_mask if y.dim() == 4 else y_mask[None]  # (M or 1, C, P)
    x_real, y_real = x_mask[:, None, :, None], y_mask[:, :, None, :]

    def best(masked: Tensor, dim: int) -> Tensor:
        if smooth is None:
            return masked.max(dim=dim).values  # of equal ones the first
        least = masked.masked_fill((masked == -INF).all(dim=dim, keepdim=True), 0)  # no NaN in the gradient
        return smooth * (least / smooth).logsumexp(dim=dim)

    best_y = best(products.masked_fill(~y_real, -INF), 3)  # (M, C, T)
    best_x = best(products.masked_fill(~x_real, -INF), 2)  # (M, C, P)
    scores = []
    if direction != "y":
        score = best_y.masked_fill(~(x_real[..., 0] & y_real.any(dim=3)), 0).sum(dim=2)
        scores.append(score / x_mask.sum(dim=1).clamp_min(1)[:, None] if reduction == "mean" else score)
    if direction != "x":
        score = best_x.masked_fill(~(y_real[:, :, 0] & x_real.any(dim=2)), 0).sum(dim=2)
        scores.append(score / y_mask.sum(dim=2).clamp_min(1) if reduction == "mean" else score)
    return tuple(scores)


def ours(
    case: Case, reduction: str, direction: str, backend: str, budget: object = "auto", smooth: float | None = None
) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"memory_budget": budget, "backend": backend, "smooth": smooth}
    scores = max_sim(case.x, case.y, *case.masks, reduction=reduction, direction=direction, **options)
    return tuple(scores) if direction == "both" else (scores,)


def with_gradients(scores: tuple[Tensor, ...], case: Case) -> list[Tensor]:
    total = sum((w.to(s.dtype) * s).sum() for w, s in zip(case.weights, scores, strict=False))
    return [*(s.detach() for s in scores), *torch.autograd.grad(total, (case.x, case.y))]


def some_mask(items: int, tokens: int) -> Tensor:
    """A random mask with holes and padding, and often an item without tokens."""
    mask = torch.rand(items, tokens, device="cpu") < random.choice([0.4, 0.8])
    if random.random() < 0.3:
        mask = mask.sort(dim=1, descending=True).values  # padding alone
    if random.random() < 0.5:
        mask[random.randrange(items)] = False
    return mask


def random_case(
    m: int, n: int, t: int, p: int, d: int, dtype: torch.dtype, masked: bool, repeated: bool, own: bool = False
) -> Case:
    """``own``: each item of x has n items of y of its own."""
    items = m * n if own else n
    x, y = torch.randn(m, t, d, device="cpu"), torch.randn(items, p, d, device="cpu")
    if repeated:  # ties: equal tokens in an item. Multiples of 1/4 have exact products and sums
        x, y = (4 * x).round() / 4, (4 * y).round() / 4
        x, y = x[:, torch.randint(t, (t,), device="cpu")], y[:, torch.randint(p, (p,), device="cpu")]
    x_mask, y_mask = (some_mask(m, t), some_mask(items, p)) if masked else (None, None)
    if x_mask is not None and y_mask is not None:  # padding may hold anything
        x, y = x.masked_fill(~x_mask[..., None], NAN), y.masked_fill(~y_mask[..., None], NAN)
    if own:
        y, y_mask = y.view(m, n, p, d), None if y_mask is None else y_mask.view(m, n, p)
    weights = tuple(torch.randn(m, n, dtype=torch.float64, device="cpu") for _ in range(2))
    return Case(x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), x_mask, y_mask, weights)


def on_device(case: Case) -> Case:
    """The case on the default device, which the triton backend's fixture sets to the GPU if there is one."""
    device = torch.get_default_device()
    x, y = (t.detach().to(device).requires_grad_() for t in (case.x, case.y))
    masks = (None if t is None else t.to(device) for t in case.masks)
    return Case(x, y, *masks, tuple(w.to(device) for w in case.weights))


def check(
    case: Case, reduction: str, direction: str, backend: str, budget: object, smooth: float | None = None
) -> None:
    """Asserts |ours - fp64| <= 2 |eager - fp64| + 8 eps (max |fp64| + the largest term) of scores and gradients."""
    dtype = case.x.dtype
    wide = case._replace(x=case.x.detach().double().requires_grad_(), y=case.y.detach().double().requires_grad_())
    truth = with_gradients(einsum(*wide[:4], reduction, direction, smooth), wide)
    # In half precision eager may round another product to be the maximum, which moves the gradient. Ours accumulates
    # in float32, and so does this eager form.
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    widened = case._replace(
        x=case.x.detach().to(accumulated).requires_grad_(), y=case.y.detach().to(accumulated).requires_grad_()
    )
    eager = with_gradients(einsum(*widened[:4], reduction, direction, smooth), widened)
    placed = on_device(case)
    results = with_gradients(ours(placed, reduction, direction, backend, budget, smooth), placed)
    x, y = (t.detach().double().nan_to_num(0).abs().max().item() for t in (case.x, case.y))
    weight = max(w.abs().max().item() for w in case.weights)
    t, p, d = case.x.shape[-2], *case.y.shape[-2:]
    largest = d**0.5 * x * y + (smooth or 0) * max(t, p)
    # A rounding of a product changes a smooth maximum's weights by as much, over tau.
    sensitive = 1 + (d**0.5 * x * y / smooth if smooth else 0)
    terms = [largest * max(t, p) ** 0.5] * (len(truth) - 2) + [weight * y * p * sensitive, weight * x * t * sensitive]
    for result, exact, other, term in zip(results, truth, eager, terms, strict=True):
        assert result.shape == exact.shape
        error = (result.cpu().double() - exact).abs().max().item()
        off_by = (other.double() - exact).abs().max().item()
        most = allowed(off_by, result.dtype, exact.abs().max().item() + term)
        assert error <= most, (tuple(case.x.shape), tuple(case.y.shape), reduction, direction, error, most)
