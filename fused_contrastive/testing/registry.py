"""Every loss that is held to the error budget, with its options, seeded tensors and textbook formula.

A loss is added by one entry of ``LOSSES``: how to make its tensors, and the two functions to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.losses.clip import clip_loss
from fused_contrastive.losses.distillation import distillation_loss
from fused_contrastive.losses.filip import filip_loss
from fused_contrastive.losses.info_nce import info_nce_loss
from fused_contrastive.losses.nt_xent import nt_xent_loss
from fused_contrastive.losses.siglip import siglip_loss
from fused_contrastive.losses.supcon import supcon_loss
from fused_contrastive.losses.x_clip import x_clip_loss
from fused_contrastive.ops.stats import contrastive_stats
from fused_contrastive.testing import oracle, textbook, textbook_groups, textbook_related, textbook_tokens
from fused_contrastive.testing.maker import Maker
from fused_contrastive.testing.textbook_groups import by_groups, with_positives
from fused_contrastive.testing.textbook_matryoshka import by_prefixes

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    """One loss or primitive.

    Attributes:
        options: the variants of its arguments that are tried, by name.
        make: makes, for one variant, the leaves, which get gradients, and the other arguments.
        ours: the function under test.
        textbook: its formula, whose first argument is a way to write the logits.
        stable: the formula for the float64 oracle, if the textbook's cancels.
        as_they_are: the loss multiplies its first two leaves and the third, a scale, whatever the features' norms; the
            largest terms of its sums are computed from these leaves.
    """

    options: dict[str, dict[str, Any]]
    make: Callable[[Maker, dict[str, Any]], tuple[Leaves, dict[str, Any]]]
    ours: Callable[..., Any]
    textbook: Callable[..., Any]
    stable: Callable[..., Any] | None = None
    as_they_are: bool = False


def pair(*names: str) -> Callable[[Maker, dict[str, Any]], tuple[Leaves, dict[str, Any]]]:
    """Two sets of N features and a scale, by these names; the options are arguments as they are."""

    def make(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
        sizes = make.sizes
        tensors = make.features(sizes.n), make.features(sizes.n), make.scalar(sizes.scale)
        return dict(zip(names, tensors, strict=True)), dict(given)

    return make


def _contrastive_stats(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = make.sizes.n, dict(given)
    m = n if "lengths" in options else make.sizes.m or n
    make.set_lengths(options)
    leaves = {"x": make.features(m), "y": make.features(n), "scale": make.scalar(make.sizes.scale)}
    if options.pop("targets", False) or m > n:
        options["targets"] = make.targets(m, n, options)
    if options.pop("bias", False):
        empty = make.vector(n) < 0.2
        empty[textbook_groups.columns(options, m)] = False  # a positive in an empty slot would be -inf
        leaves["col_bias"] = (4 * make.vector(n) - 2).masked_fill(empty, -torch.inf)
    if count := options.pop("ids", 0):  # so few ids that some rows have no negatives left
        high = max(2, n // 8)
        options["row_ids"], options["col_ids"] = (make.ids(size, high, count) - high // 2 for size in (m, n))
    if options.pop("limits", False):
        options["row_limit"], options["col_limit"] = (
            make.sizes.scale * (make.vector(size) - 0.5).round(decimals=3) for size in (m, n)
        )
    if options.get("memory_budget") == "half":
        options["memory_budget"] = (m // 2) * n * leaves["scale"].itemsize
    return leaves, options


def _info_nce(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = make.sizes.n, dict(given)
    m = n if options.get("symmetric") or "lengths" in options else max(1, n - 3)
    make.set_lengths(options)
    make.set_dims(options)
    leaves = {"query": make.features(m), "key": make.features(n), "logit_scale": make.scalar(make.sizes.scale)}
    kind, columns = options.pop("negatives", None), n
    if kind == "shared":
        leaves["negatives"], columns = make.features(5), n + 5
    if kind == "own":
        leaves["negatives"] = make.features(m, 4)
    if options.pop("bias", False):
        leaves["col_bias"] = make.vector(columns)
    if options.pop("targets", False):
        options["targets"] = make.targets(m, n, options)
    if count := options.pop("ids", 0):
        options["row_ids"], options["col_ids"] = (make.ids(size, n // 3 * count, count) for size in (m, columns))
    if options.pop("weight", False):
        options["weight"] = make.vector(m) + 0.1
    if options.get("debias"):
        queries, scale = leaves["query"], make.sizes.scale
        own = (queries[:, None] * leaves["negatives"]).sum(dim=2)
        make.set_debias(options, scale * torch.cat((queries @ leaves["key"].T, own), dim=1))
    if options.get("margin") == "rows":
        leaves["margin"], _ = make.vector(m), options.pop("margin")
    make.set_margins(leaves["query"], torch.cat((leaves["key"], *_shared(leaves))), options)
    return leaves, options


def _shared(leaves: Leaves) -> list[Tensor]:
    return [leaves["negatives"]] if "negatives" in leaves and leaves["negatives"].dim() == 2 else []


def _clip(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = make.sizes.n, dict(given)
    m = max(1, n // 2) if options.pop("unequal", False) else n
    make.set_lengths(options)
    make.set_dims(options)
    leaves = {
        "image_features": make.features(m), "text_features": make.features(n),
        "logit_scale": make.scalar(make.sizes.scale),
    }  # fmt: skip
    if count := options.pop("ids", 0):
        high = 4 * n if options.get("decoupled") else n // 3 * count  # of few, all pairs of a row may be related
        options["row_ids"], options["col_ids"] = (make.ids(size, high, count) for size in (m, n))
    if options.pop("weight", False):
        options["weight"] = make.vector(m) + 0.1
    if options.get("debias"):
        s = make.sizes.scale * leaves["image_features"] @ leaves["text_features"].T
        if count:
            s = s.masked_fill(textbook_related.related(options["row_ids"], options["col_ids"]), -torch.inf)
            s.diagonal().copy_(make.sizes.scale * (leaves["image_features"] * leaves["text_features"]).sum(dim=1))
        make.set_debias(options, s, s.T)
    make.set_margins(leaves["image_features"], leaves["text_features"], options)
    return leaves, options


def _nt_xent(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    options = dict(given)
    make.set_lengths(options)
    count = options.pop("count", 2)
    leaves = {f"z{k + 1}": make.features(make.sizes.n) for k in range(count)}
    if options.get("debias"):
        views = list(leaves.values())
        of_views = [make.sizes.scale * a @ torch.cat((b, a)).T for a, b in (views, views[::-1])]
        for s in of_views:
            s.diagonal(make.sizes.n).fill_(-torch.inf)  # a row with itself
        make.set_debias(options, *of_views)
    return {**leaves, "temperature": make.scalar(1 / make.sizes.scale)}, options


def _ours_nt_xent(z1: Tensor, z2: Tensor, temperature: Tensor, z3: Tensor | None = None, **options: Any) -> Tensor:
    options = {"normalize": True, **options}
    loss: Tensor = nt_xent_loss(z1, z2, temperature, views=() if z3 is None else (z3,), **options)
    return loss


def _textbook_nt_xent(
    logits: oracle.Logits, z1: Tensor, z2: Tensor, temperature: Tensor, z3: Tensor | None = None, **options: Any
) -> Tensor:
    return textbook.nt_xent(logits, z1, z2, *(() if z3 is None else (z3,)), temperature=temperature, **options)


def _supcon(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    options = dict(given)
    make.set_lengths(options)
    n, views = make.sizes.n, options.pop("views", 1)
    features = make.features(n) if views == 1 else make.features(n, views)
    options["labels"] = make.ids(n, n // options.pop("per_label", 3)) * 7 - 11
    return {"features": features, "temperature": make.scalar(1 / make.sizes.scale)}, options


def _siglip(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = make.sizes.n, dict(given)
    make.set_lengths(options)
    scale = make.scalar(make.sizes.scale)
    m = max(1, n // 2) if options.pop("unequal", False) else n
    leaves = {"image_features": make.features(m), "text_features": make.features(n), "logit_scale": scale}
    if options.pop("bias", True):
        leaves["logit_bias"] = make.scalar(-make.sizes.scale / 2)
    if count := options.pop("ids", 0):
        options["row_ids"], options["col_ids"] = (make.ids(size, n // 2 * count, count) for size in (m, n))
    if options.pop("weight", False):
        options["weight"] = make.vector(m) + 0.1
    return leaves, options


def _distillation(make: Maker, given: dict[str, Any]) -> tuple[Leaves, dict[str, Any]]:
    n, options = make.sizes.n, dict(given)
    columns = n + 5 if options.pop("queue", False) else n
    options["teacher_x"], options["teacher_y"] = (
        F.normalize(torch.rand(size, 3, generator=make.generator, dtype=torch.float32, device="cpu") - 0.5, dim=1)
        for size in (n, columns)
    )
    if options.pop("weight", False):
        options["weight"] = make.vector(n) + 0.1
    leaves = {"x": make.features(n), "y": make.features(columns), "logit_scale": make.scalar(make.sizes.scale)}
    return leaves, {"teacher_scale": 7.5, **options}


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


def positional(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The textbook's function, with its positional tensors taken from arguments of these names."""

    def call(logits: oracle.Logits, **arguments: Any) -> Any:
        arguments.pop("memory_budget", None)  # it changes no result
        return function(logits, *(arguments.pop(name, None) for name in names), **arguments)

    return call


PRIMITIVES: dict[str, Member] = {
    "contrastive_stats": Member(
        {
            "plain": {},
            "targets": {"targets": True},
            "col_bias": {"bias": True},
            "ids": {"ids": 1},
            "three ids": {"ids": 3},
            "limits": {"limits": True, "bias": True},
            "exclude_self": {"exclude_self": True},
            "row only": {"directions": ["row"]},
            "col only": {"directions": ["col"]},
            "groups": {"lengths": True, "targets": True, "bias": True},
            "recompute": {"memory_budget": 0},
            "half kept": {"memory_budget": "half"},
        },
        _contrastive_stats,
        contrastive_stats,
        by_groups(positional(textbook.contrastive_stats, "x", "y", "scale"), reduces=False),
        as_they_are=True,
    ),
}
LOSSES: dict[str, Member] = {
    "clip": Member(
        {
            "plain": {},
            "decoupled": {"decoupled": True},
            "smoothed": {"label_smoothing": 0.1},
            "decoupled smoothed": {"decoupled": True, "label_smoothing": 0.1},
            "sum": {"reduction": "sum"},
            "none": {"reduction": "none"},
            "ids weight": {"ids": 2, "weight": True, "normalize": True},
            "several mean": {"ids": 1, "equal_ids": "mean", "unequal": True},
            "several sum": {"ids": 2, "equal_ids": "sum"},
            "several decoupled": {"ids": 1, "equal_ids": "mean", "decoupled": True, "reduction": "sum"},
            "absolute margin": {"absolute_margin": True},
            "relative margin": {"relative_margin": True, "ids": 1, "normalize": True},
            "guide": {"relative_margin": True, "guide": True},
            "debias": {"debias": True, "weight": True},
            "debias hardness": {"debias": True, "hardness": 0.5, "ids": 1},
            "groups": {"lengths": True},
            "groups ids": {"lengths": True, "ids": 2, "weight": True, "normalize": True},
            "dims": {"dims": True},
            "dims normalized": {"dims": True, "normalize": True, "weight": True, "memory_budget": 0},
        },
        _clip,
        clip_loss,
        by_prefixes(by_groups(positional(textbook.clip, "image_features", "text_features", "logit_scale"))),
        by_prefixes(by_groups(positional(textbook.clip_stable, "image_features", "text_features", "logit_scale"))),
        as_they_are=True,
    ),
    "info_nce": Member(
        {
            "plain": {},
            "targets": {"targets": True},
            "shared negatives": {"negatives": "shared"},
            "own negatives smoothed": {"negatives": "own", "label_smoothing": 0.1},
            "symmetric": {"symmetric": True, "label_smoothing": 0.2, "negatives": "shared", "bias": True},
            "decoupled": {"decoupled": True, "margin": 0.25},
            "margin smoothed": {"margin": 0.5, "label_smoothing": 0.1},
            "bias ids": {"bias": True, "ids": 1},
            "several mean": {"ids": 2, "equal_ids": "mean", "targets": True, "negatives": "shared", "bias": True},
            "several sum": {"ids": 1, "equal_ids": "sum", "negatives": "own", "margin": 0.25, "weight": True},
            "several symmetric": {"ids": 4, "equal_ids": "mean", "symmetric": True, "margin": 0.5},
            "absolute margin": {"absolute_margin": True, "negatives": "own", "margin": "rows"},
            "relative margin": {"relative_margin": True, "symmetric": True, "negatives": "shared", "bias": True},
            "guide": {"absolute_margin": True, "guide": True, "targets": True, "bias": True},
            "debias": {"debias": True, "negatives": "own"},
            "hardness": {"hardness": 1.0, "negatives": "shared", "symmetric": False, "ids": 2, "margin": 0.2},
            "weight": {"weight": True, "normalize": True},
            "weight none": {"weight": True, "reduction": "none"},
            "sum": {"reduction": "sum"},
            "groups": {"lengths": True},
            "groups targets": {"lengths": True, "targets": True, "bias": True, "margin": 0.25},
            "groups margin": {"lengths": True, "relative_margin": 0.05, "symmetric": True, "reduction": "none"},
            "dims": {"dims": True, "targets": True, "negatives": "shared", "margin": 0.25},
            "dims symmetric": {"dims": True, "normalize": True, "symmetric": True, "negatives": "shared", "ids": 2},
        },
        _info_nce,
        info_nce_loss,
        by_prefixes(by_groups(positional(textbook.info_nce, "query", "key", "logit_scale"))),
    ),
    "nt_xent": Member(
        {
            "plain": {},
            "decoupled": {"decoupled": True},
            "debias": {"debias": True},
            "hardness": {"hardness": 0.7},
            "three views": {"count": 3},
            "three views decoupled": {"count": 3, "decoupled": True},
            "not normalised none": {"normalize": False, "reduction": "none"},
            "groups": {"lengths": True},
            "groups three views": {"lengths": True, "count": 3, "reduction": "none"},
        },
        _nt_xent,
        _ours_nt_xent,
        by_groups(_textbook_nt_xent),
    ),
    "supcon": Member(
        {
            "out": {},
            "in": {"variant": "in"},
            "views": {"views": 2, "normalize": True},
            "lonely skip": {"per_label": 1},
            "lonely zero in": {"per_label": 1, "no_positive": "zero", "variant": "in"},
            "sum": {"reduction": "sum"},
            "groups": {"lengths": True},
            "groups in": {"lengths": True, "variant": "in", "views": 2},
        },
        _supcon,
        supcon_loss,
        by_groups(positional(textbook.supcon, "features", "temperature"), with_positives),
    ),
    "siglip": Member(
        {
            "plain": {},
            "no bias": {"bias": False},
            "ids": {"ids": 1},
            "none": {"reduction": "none"},
            "several mean": {"ids": 2, "positive_weight": "mean", "weight": True},
            "unequal": {"ids": 1, "unequal": True},
            "groups": {"lengths": True},
            "groups ids": {"lengths": True, "ids": 1},
        },
        _siglip,
        siglip_loss,
        by_groups(positional(textbook.siglip, "image_features", "text_features", "logit_scale", "logit_bias")),
    ),
    "distillation": Member(
        {
            "plain": {},
            "targets": {"targets_weight": 0.4, "weight": True},
            "queue": {"symmetric": False, "queue": True, "targets_weight": 0.4, "reduction": "none"},
            "normalize": {"normalize": True, "teacher_scale": 100.0, "reduction": "sum"},
        },
        _distillation,
        distillation_loss,
        positional(textbook_related.distillation, "x", "y", "logit_scale"),
    ),
    "filip": Member(
        {"plain": {}, "masks": {"masks": True}, "x_clip": {"masks": True, "compat": "x_clip", "decoupled": True}},
        _filip,
        filip_loss,
        positional(textbook_tokens.filip, "image_tokens", "text_tokens", "logit_scale"),
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
        x_clip_loss,
        positional(
            textbook_tokens.x_clip,
            "text_latents",
            "image_latents",
            "logit_scale",
            "text_latents_extra",
            "image_latents_extra",
        ),
    ),
}
