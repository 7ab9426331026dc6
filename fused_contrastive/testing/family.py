"""Every loss with its options, seeded problems and textbook formula: what holds the family to the error budget.

A loss is added here by one entry of ``FAMILY``: how to make its tensors, and the two functions to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.testing import oracle, textbook
from fused_contrastive.testing.budget import Deviation, Expected, difference, with_rounded_weights
from fused_contrastive.testing.cases import DTYPES

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """One problem's size, dtype and scale."""

    n: int
    d: int
    dtype: torch.dtype
    scale: float
    duplicates: bool = False


class Maker:
    """Random tensors of one problem, on the CPU whatever the default device."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.generator = sizes, torch.Generator("cpu").manual_seed(seed)

    def features(self, *shape: int) -> Tensor:
        t = torch.randn(*shape, self.sizes.d, generator=self.generator, dtype=torch.float64, device="cpu")
        if self.sizes.duplicates:
            t = t[self.ids(shape[0], shape[0] // 3)]
        return F.normalize(t, dim=-1).to(self.sizes.dtype)

    def scalar(self, value: float) -> Tensor:
        dtype = torch.float64 if self.sizes.dtype == torch.float64 else torch.float32
        return torch.tensor(value, dtype=dtype, device="cpu")

    def vector(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, dtype=torch.float64, device="cpu").to(self.scalar(0).dtype)

    def ids(self, size: int, high: int) -> Tensor:
        return torch.randint(max(1, high), (size,), generator=self.generator, device="cpu")

    def mask(self, *shape: int) -> Tensor:
        """Some False, the first of each row True."""
        mask = torch.rand(*shape, generator=self.generator, dtype=torch.float32, device="cpu") < 0.7
        mask[..., 0] = True
        return mask


@dataclass(frozen=True)
class Member:
    """One loss. ``make`` gives leaves (with gradients) and other arguments, for one of its options."""

    options: dict[str, dict[str, Any]]
    make: Callable[[Maker, dict[str, Any]], tuple[Leaves, dict[str, Any]]]
    ours: Callable[..., Tensor]
    textbook: Callable[..., Tensor]


def _info_nce(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = make.sizes.n, dict(given)
    m = n if options.get("symmetric") else max(1, n - 3)
    leaves = {"query": make.features(m), "key": make.features(n), "logit_scale": make.scalar(make.sizes.scale)}
    kind, columns = options.pop("negatives", None), n
    if kind == "shared":
        leaves["negatives"], columns = make.features(5), n + 5
    if kind == "own":
        leaves["negatives"] = make.features(m, 4)
    if options.pop("bias", False):
        leaves["col_bias"] = make.vector(columns)
    if options.pop("targets", False):
        options["targets"] = make.ids(m, n)
    if options.pop("ids", False):
        options["row_ids"], options["col_ids"] = make.ids(m, n // 3), make.ids(columns, n // 3)
    if options.pop("weight", False):
        options["weight"] = make.vector(m) + 0.1
    return leaves, options


def _nt_xent(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    options = dict(given)
    count = options.pop("count", 2)
    leaves = {f"z{k + 1}": make.features(make.sizes.n) for k in range(count)}
    return {**leaves, "temperature": make.scalar(1 / make.sizes.scale)}, options


def _ours_nt_xent(z1: Tensor, z2: Tensor, temperature: Tensor, z3: Tensor | None = None, **options: Any) -> Tensor:
    return fc.nt_xent_loss(z1, z2, temperature, views=() if z3 is None else (z3,), **{"normalize": True, **options})


def _textbook_nt_xent(
    logits: oracle.Logits, z1: Tensor, z2: Tensor, temperature: Tensor, z3: Tensor | None = None, **options: Any
) -> Tensor:
    return textbook.nt_xent(logits, z1, z2, *(() if z3 is None else (z3,)), temperature=temperature, **options)


def _supcon(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    options = dict(given)
    n, views = make.sizes.n, options.pop("views", 1)
    features = make.features(n) if views == 1 else make.features(n, views)
    options["labels"] = make.ids(n, n // options.pop("per_label", 3)) * 7 - 11
    return {"features": features, "temperature": make.scalar(1 / make.sizes.scale)}, options


def _siglip(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = make.sizes.n, dict(given)
    scale = make.scalar(make.sizes.scale)
    leaves = {"image_features": make.features(n), "text_features": make.features(n), "logit_scale": scale}
    if options.pop("bias", True):
        leaves["logit_bias"] = make.scalar(-make.sizes.scale / 2)
    if options.pop("ids", False):
        options["row_ids"], options["col_ids"] = make.ids(n, n // 2), make.ids(n, n // 2)
    return leaves, options


def _filip(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = min(make.sizes.n, 20), dict(given)
    leaves = {"image_tokens": make.features(n, 5), "text_tokens": make.features(n, 3)}
    if options.pop("masks", False):
        options["image_mask"], options["text_mask"] = make.mask(n, 5), make.mask(n, 3)
    return {**leaves, "logit_scale": make.scalar(make.sizes.scale)}, options


def _x_clip(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    options = dict(given)
    text_views, image_views = options.pop("views", (1, 1))
    extra, tokens = options.pop("extra", False), options.get("use_all_token_embeds", False)
    n = min(make.sizes.n, 20) if tokens else make.sizes.n
    text_shape = (text_views, n, 3) if tokens else (text_views, n)
    image_shape = (image_views, n, 5) if tokens else (image_views, n)
    leaves = {"text_latents": make.features(*text_shape), "image_latents": make.features(*image_shape)}
    if extra:
        leaves |= {"text_latents_extra": make.features(*text_shape)}
        leaves |= {"image_latents_extra": make.features(*image_shape)}
    if options.pop("mask", False):
        options["text_mask"] = make.mask(*text_shape)
    return {**leaves, "logit_scale": make.scalar(make.sizes.scale)}, options


def _positional(function: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
    """The textbook's function, its tensors given by the names of our arguments."""

    def call(logits: oracle.Logits, **arguments: Any) -> Tensor:
        return function(logits, *(arguments.pop(name, None) for name in names), **arguments)

    return call


FAMILY: dict[str, Member] = {
    "info_nce": Member(
        {
            "plain": {},
            "targets": {"targets": True},
            "shared negatives": {"negatives": "shared"},
            "own negatives smoothed": {"negatives": "own", "label_smoothing": 0.1},
            "symmetric": {"symmetric": True, "label_smoothing": 0.2, "negatives": "shared", "bias": True},
            "decoupled": {"decoupled": True, "margin": 0.25},
            "margin smoothed": {"margin": 0.5, "label_smoothing": 0.1},
            "bias ids": {"bias": True, "ids": True},
            "weight": {"weight": True, "normalize": True},
            "weight none": {"weight": True, "reduction": "none"},
            "sum": {"reduction": "sum"},
        },
        _info_nce,
        fc.info_nce_loss,
        _positional(textbook.info_nce, "query", "key", "logit_scale"),
    ),
    "nt_xent": Member(
        {
            "plain": {},
            "decoupled": {"decoupled": True},
            "three views": {"count": 3},
            "three views decoupled": {"count": 3, "decoupled": True},
            "not normalised none": {"normalize": False, "reduction": "none"},
        },
        _nt_xent,
        _ours_nt_xent,
        _textbook_nt_xent,
    ),
    "supcon": Member(
        {
            "out": {},
            "in": {"variant": "in"},
            "views": {"views": 2, "normalize": True},
            "lonely skip": {"per_label": 1},
            "lonely zero in": {"per_label": 1, "no_positive": "zero", "variant": "in"},
            "sum": {"reduction": "sum"},
        },
        _supcon,
        fc.supcon_loss,
        _positional(textbook.supcon, "features", "temperature"),
    ),
    "siglip": Member(
        {"plain": {}, "no bias": {"bias": False}, "ids": {"ids": True}, "none": {"reduction": "none"}},
        _siglip,
        fc.siglip_loss,
        _positional(textbook.siglip, "image_features", "text_features", "logit_scale", "logit_bias"),
    ),
    "filip": Member(
        {"plain": {}, "masks": {"masks": True}, "x_clip": {"masks": True, "compat": "x_clip", "decoupled": True}},
        _filip,
        fc.filip_loss,
        _positional(textbook.filip, "image_tokens", "text_tokens", "logit_scale"),
    ),
    "x_clip": Member(
        {
            "plain": {},
            "extra decoupled": {"extra": True, "decoupled_contrastive_learning": True},
            "views": {"views": (2, 3), "multiview_loss_weight": 0.3},
            "regularised": {"sim_reg_loss_weight": 0.5, "extra": True},
            "tokens views": {"use_all_token_embeds": True, "mask": True, "views": (2, 1)},
            "tokens extra": {"use_all_token_embeds": True, "mask": True, "extra": True},
        },
        _x_clip,
        fc.x_clip_loss,
        _positional(
            textbook.x_clip, "text_latents", "image_latents", "logit_scale", "text_latents_extra", "image_latents_extra"
        ),
    ),
}
OPTIONS = [(name, option) for name, member in FAMILY.items() for option in member.options]


@dataclass(frozen=True)
class FamilyCase:
    """One problem of one loss. The tensors are made anew, the same each time."""

    loss: str
    variant: str
    sizes: Sizes
    seed: int

    def __post_init__(self) -> None:
        if "tokens" in self.option or self.loss == "filip":  # at small D maxima tie, and their gradient is anyone's
            object.__setattr__(self, "sizes", replace(self.sizes, d=max(self.sizes.d, 16)))

    @property
    def option(self) -> str:
        return f"{self.loss} {self.variant}"

    @property
    def dtype(self) -> torch.dtype:
        return self.sizes.dtype

    @property
    def size(self) -> int:
        """Multiplications of its products, more or less."""
        return self.sizes.n**2 * self.sizes.d

    def __str__(self) -> str:
        return f"{self.option!r} {self.sizes} seed={self.seed}"

    def inputs(self, device: torch.device) -> tuple[Leaves, dict[str, Any]]:
        member = FAMILY[self.loss]
        leaves, options = member.make(Maker(self.sizes, self.seed), member.options[self.variant])
        moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in options.items()}
        return {name: t.to(device) for name, t in leaves.items()}, moved


def evaluate(function: Callable[..., Tensor], leaves: Leaves, options: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and its gradients, in float64; of more than one loss, those of a fixed weighted sum."""
    held = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    loss = function(**held, **options)
    weights = torch.linspace(0.5, 1.5, max(1, loss.numel()), dtype=torch.float64, device=loss.device)
    objective = (loss.double().reshape(-1) * weights).sum()
    gradients = torch.autograd.grad(objective, list(held.values()), allow_unused=True)
    results = {"loss": loss.detach().double()}
    for (name, leaf), gradient in zip(held.items(), gradients, strict=True):
        results[f"d{name}"] = (torch.zeros_like(leaf) if gradient is None else gradient).double()
    return results


def ours(case: FamilyCase, backend: str, device: torch.device) -> dict[str, Tensor]:
    """The loss and every gradient of one backend."""
    leaves, options = case.inputs(device)
    return evaluate(lambda **a: FAMILY[case.loss].ours(**a, backend=backend), leaves, options)


def expected(case: FamilyCase, device: torch.device) -> Expected:
    """The textbook's results in float64, and its largest errors in the case's dtype."""
    member = FAMILY[case.loss]
    leaves, options = case.inputs(device)
    double = {name: t.double() for name, t in leaves.items()}
    truth = evaluate(lambda **a: member.textbook(oracle._oracle_logits, **a), double, options)
    errors = dict.fromkeys(truth, 0.0)
    same = {name: t.to(case.dtype) for name, t in leaves.items()}
    for form in oracle.LOGITS.values():
        found = evaluate(lambda form=form, **a: member.textbook(form, **a), same, options)
        errors = {name: max(error, difference(found[name], truth[name])) for name, error in errors.items()}
    return Expected(truth, errors)


def deviations(
    case: FamilyCase,
    backend: str,
    device: torch.device,
    results: dict[str, Tensor] | None = None,
    expectation: Expected | None = None,
) -> list[Deviation]:
    """The loss and every gradient of one backend, or those given, against the budget."""
    if results is None:
        results = ours(case, backend, device)
    truth, eager = (found := expectation or expected(case, device)).truth, found.eager_error
    terms = _largest_terms(case, truth)
    deviations = []
    for name, value in results.items():
        largest = truth[name].abs().max().item()
        allowed = 2 * eager[name] + 8 * torch.finfo(case.dtype).eps * (largest + terms[name])
        deviations.append(Deviation(name, difference(value, truth[name]), eager[name], allowed))
    return deviations


def _largest_terms(case: FamilyCase, truth: dict[str, Tensor]) -> dict[str, float]:
    """As in ``budget``, for features of norm 1: a logit, scale * weight, M * weight; by temperature, scale^2 more."""
    scale, n = case.sizes.scale, case.sizes.n
    mean = truth["loss"].dim() == 0 and "sum" not in case.variant
    weight = 1.5 / n if mean else 1.5
    logit = 2.0 * scale
    # The regulariser's gradient is a mean over pairs of differences of similarities, whatever the scale.
    regularised = weight if case.variant == "regularised" else 0.0
    terms = dict.fromkeys(truth, weight * scale + regularised)  # feature gradients, and those of a bias
    terms |= {
        "loss": logit + FAMILY[case.loss].options[case.variant].get("margin", 0.0),
        "dlogit_scale": weight * n,
        "dlogit_bias": weight * n,
        "dtemperature": weight * n * scale**2,
    }
    rounded = with_rounded_weights(case.dtype, logit, n)
    return {name: term * rounded if name != "loss" else term for name, term in terms.items()}


def sample(count: int, seed: int) -> Iterator[FamilyCase]:
    """Every option in turn, at random sizes, dtypes and scales."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def drawn(below: int) -> int:
        return int(torch.randint(below, (), generator=generator, device="cpu"))

    def one_of(values: Any) -> Any:
        return values[drawn(len(values))]

    for k in range(count):
        loss, variant = OPTIONS[k % len(OPTIONS)]
        sizes = Sizes(one_of((2, 5, 17, 64, 130)), one_of((1, 3, 16, 65)), one_of(DTYPES), one_of((0.5, 14.3, 100.0)))
        yield FamilyCase(loss, variant, sizes, drawn(2**31))
