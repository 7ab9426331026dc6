"""Every loss that is held to the error budget, with its options, seeded tensors and textbook formula.

A loss is added by one entry of ``LOSSES``: how to make its tensors, and the two functions to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from fused_contrastive.testing import inputs, oracle, textbook, textbook_related, textbook_tokens
from fused_contrastive.testing.inputs import Inputs
from fused_contrastive.testing.maker import Maker
from fused_contrastive.testing.textbook_groups import by_groups, with_positives
from fused_contrastive.testing.textbook_matryoshka import by_prefixes


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
    make: Callable[[Maker, dict[str, Any]], Inputs]
    ours: Callable[..., Any]
    textbook: Callable[..., Any]
    stable: Callable[..., Any] | None = None
    as_they_are: bool = False


def _ours_nt_xent(z1: Tensor, z2: Tensor, temperature: Tensor, z3: Tensor | None = None, **options: Any) -> Tensor:
    options = {"normalize": True, **options}
    loss: Tensor = nt_xent_loss(z1, z2, temperature, views=() if z3 is None else (z3,), **options)
    return loss


def _textbook_nt_xent(
    logits: oracle.Logits, z1: Tensor, z2: Tensor, temperature: Tensor, z3: Tensor | None = None, **options: Any
) -> Tensor:
    return textbook.nt_xent(logits, z1, z2, *(() if z3 is None else (z3,)), temperature=temperature, **options)


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
        inputs.contrastive_stats,
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
        inputs.clip,
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
        inputs.info_nce,
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
        inputs.nt_xent,
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
        inputs.supcon,
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
        inputs.siglip,
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
        inputs.distillation,
        distillation_loss,
        positional(textbook_related.distillation, "x", "y", "logit_scale"),
    ),
    "filip": Member(
        {"plain": {}, "masks": {"masks": True}, "x_clip": {"masks": True, "compat": "x_clip", "decoupled": True}},
        inputs.filip,
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
        inputs.x_clip,
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
