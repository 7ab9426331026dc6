"""The inputs of each loss: a function per loss makes them from a problem's ``Maker`` and a variant's options.

It returns the leaves, which are tensors that get gradients, and the other arguments. An option that only says how to
make the inputs, such as "targets": True, is not an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.testing import textbook_groups, textbook_related
from fused_contrastive.testing.maker import Maker

Leaves = dict[str, Tensor]
Inputs = tuple[Leaves, dict[str, Any]]


def pair(*names: str) -> Callable[[Maker, dict[str, Any]], Inputs]:
    """Two sets of N features and a scale, by these names; the options are arguments as they are."""

    def make(make: Maker, given: dict[str, Any]) -> Inputs:
        sizes = make.sizes
        tensors = make.features(sizes.n), make.features(sizes.n), make.scalar(sizes.scale)
        return dict(zip(names, tensors, strict=True)), dict(given)

    return make


def contrastive_stats(make: Maker, given: dict[str, Any]) -> Inputs:
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


def info_nce(make: Maker, given: dict[str, Any]) -> Inputs:
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


def clip(make: Maker, given: dict[str, Any]) -> Inputs:
    n, options = make.sizes.n, dict(given)
    m = max(1, n // 2) if options.pop("unequal", False) else n
    make.set_lengths(options)
    make.set_dims(options)
    leaves = {
        "image_features": make.features(m), "text_features": make.features(n),
        "logit_scale": make.scalar(make.sizes.scale),
    }  # fmt: skip
    if count := options.pop("ids", 0):
        high = 4 * n if options.get("decoupled") else n // 3 * count  # with few ids, all pairs of a row may be related
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


def nt_xent(make: Maker, given: dict[str, Any]) -> Inputs:
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


def supcon(make: Maker, given: dict[str, Any]) -> Inputs:
    options = dict(given)
    make.set_lengths(options)
    n, views = make.sizes.n, options.pop("views", 1)
    features = make.features(n) if views == 1 else make.features(n, views)
    options["labels"] = make.ids(n, n // options.pop("per_label", 3)) * 7 - 11
    return {"features": features, "temperature": make.scalar(1 / make.sizes.scale)}, options


def siglip(make: Maker, given: dict[str, Any]) -> Inputs:
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


def distillation(make: Maker, given: dict[str, Any]) -> Inputs:
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


def filip(make: Maker, given: dict[str, Any]) -> Inputs:
    n, options = min(make.sizes.n, 20), dict(given)
    leaves = {"image_tokens": make.features(n, 5), "text_tokens": make.features(n, 3)}
    if options.pop("masks", False):
        options["image_mask"], options["text_mask"] = make.mask(n, 5), make.mask(n, 3)
    return {**leaves, "logit_scale": make.scalar(make.sizes.scale)}, options


def x_clip(make: Maker, given: dict[str, Any]) -> Inputs:
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
