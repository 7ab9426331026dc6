"""The loss that x-clip's CLIP computes from its latents, with all of its switches."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import checks
from fused_contrastive.core.observing import observed
from fused_contrastive.core.spec import BackendName
from fused_contrastive.distributed.agreement import Group, call_of, collective
from fused_contrastive.distributed.shape import Shape
from fused_contrastive.losses import terms
from fused_contrastive.losses.filip import loss_of_tokens
from fused_contrastive.ops import dispatch
from fused_contrastive.ops.problem import Problem, autocast
from fused_contrastive.ops.row_loss import row_loss


class _Latents(NamedTuple):
    """One text view and one image view for the loss of text to image, and their extra latents for image to text."""

    text: Tensor
    image: Tensor
    text_extra: Tensor
    image_extra: Tensor


@observed
@collective
def x_clip_loss(
    text_latents: Tensor,
    image_latents: Tensor,
    logit_scale: float | Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    text_mask: Tensor | None = None,
    text_latents_extra: Tensor | None = None,
    image_latents_extra: Tensor | None = None,
    use_all_token_embeds: bool = False,
    decoupled_contrastive_learning: bool = False,
    multiview_loss_weight: float = 0.1,
    sim_reg_loss_weight: float = 0.0,
    ssl_loss_weight: float = 0.0,
    memory_budget: int | Literal["auto"] = "auto",
    backend: BackendName = "auto",
    group: Group = None,
) -> Tensor:
    """The loss of x-clip 0.14 from the latents of its forward, computed stably: its own exp overflows at logits of 89.

    The CLIP loss (Radford et al. 2021, arXiv:2103.00020) of the first text view against the first image view. If there
    are several views, that is weighted ``1 - multiview_loss_weight``, and the mean loss of all other pairs of a text
    and an image view ``multiview_loss_weight``. Then ``sim_reg_loss_weight`` times the mean squared difference between
    the texts' similarities to each other and the images' is added, without the diagonal (arXiv:2309.08773), in closed
    form from D x D products.

    Args:
        text_latents: L2-normalised, (N, D) or, with V views, (V, N, D); (N, T, D) or (V, N, T, D) with
            ``use_all_token_embeds``. float32, float64, bfloat16 or float16.
        image_latents: likewise, with its own number of views and tokens.
        logit_scale: x-clip's ``temperature.exp()``; a number or a 0-d tensor, which gets a gradient.
        temperature: divides the similarities, instead: 1 / logit_scale. It is not x-clip's parameter of that name.
        text_mask: (N, T) or (V, N, T) bool (or numbers 0 and 1); only with ``use_all_token_embeds``.
        text_latents_extra, image_latents_extra: like the others, from the second pair of projections, CLOOB's, for
            image to text (``extra_latent_projection``). Both or neither.
        use_all_token_embeds: FILIP's token-level similarity in x-clip's variant (``filip_loss(compat="x_clip")``).
        decoupled_contrastive_learning: the positives stay out of the denominators (Yeh et al. 2022).
        multiview_loss_weight: counts only where there are several views.
        sim_reg_loss_weight: counts only for single views without tokens, where x-clip can compute it.
        ssl_loss_weight: the sum of the weights of x-clip's self-supervised losses, by which the first pair's weight is
            reduced. The caller adds those losses.
        memory_budget, backend, group: see ``contrastive_stats``. Over a group, it is the loss of the whole batch.

    Returns:
        A scalar; float32 (float64 for float64 latents).

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    call = call_of(group)
    for name, flag in (
        ("use_all_token_embeds", use_all_token_embeds),
        ("decoupled_contrastive_learning", decoupled_contrastive_learning),
    ):
        checks.boolean(name, flag)
    for name, weight in (
        ("multiview_loss_weight", multiview_loss_weight),
        ("sim_reg_loss_weight", sim_reg_loss_weight),
        ("ssl_loss_weight", ssl_loss_weight),
    ):
        checks.non_negative(name, weight)
    if (text_latents_extra is None) != (image_latents_extra is None):
        raise ValueError("text_latents_extra, image_latents_extra: got only one of them, expected both or neither")
    texts = _views("text_latents", text_latents, use_all_token_embeds, empty=call.spread)
    images = _views("image_latents", image_latents, use_all_token_embeds, empty=call.spread)
    extra = text_latents_extra is not None and image_latents_extra is not None
    logit_scale = terms.scale_of(temperature, logit_scale, None, texts)
    texts_extra = (
        _views("text_latents_extra", text_latents_extra, use_all_token_embeds, texts, call.spread) if extra else texts
    )
    images_extra = (
        _views("image_latents_extra", image_latents_extra, use_all_token_embeds, images, call.spread)
        if extra
        else images
    )
    pair_of = checks.token_pair if use_all_token_embeds else checks.feature_pair
    for suffix, a, b in (("", texts, images), ("_extra", texts_extra, images_extra)):
        names = f"text_latents{suffix}", f"image_latents{suffix}"
        pair_of(names[0], autocast(a[0]), names[1], autocast(b[0]), call.spread)
        checks.same_rows(names[0], a[0], names[1], b[0])
    masks = _masks(text_mask, texts, use_all_token_embeds)
    if sim_reg_loss_weight and (use_all_token_embeds or len(texts) * len(images) > 1):
        raise ValueError(
            f"sim_reg_loss_weight: got {sim_reg_loss_weight} with tokens or several views, expected 0 there"
        )
    checks.memory_budget(memory_budget)
    backend = dispatch.resolve(backend, texts.device, autocast(texts[0]).dtype)
    options = {
        "views": (len(texts), len(images)),
        "extra": (texts_extra.shape[-1], str(autocast(texts_extra[0]).dtype)) if extra else None,
        "use_all_token_embeds": use_all_token_embeds,
        "decoupled_contrastive_learning": decoupled_contrastive_learning,
        "weights": (multiview_loss_weight, sim_reg_loss_weight, ssl_loss_weight),
    }
    shape = call.agree(
        "x_clip_loss", autocast(images[0]), autocast(texts[0]), options, logit_scale, texts_extra, images_extra, *masks
    )
    kernel: dict[str, Any] = {"memory_budget": memory_budget, "backend": backend}
    pair = functools.partial(
        _pair_loss, shape, logit_scale, decoupled_contrastive_learning, use_all_token_embeds, extra, kernel
    )
    losses = [
        pair(_Latents(*map(autocast, (texts[m], images[n], texts_extra[m], images_extra[n]))), masks[m])
        for m in range(len(texts))
        for n in range(len(images))
    ]
    others = torch.stack(losses[1:]).mean() if len(losses) > 1 else None
    loss = losses[0] * (1 - ssl_loss_weight - (multiview_loss_weight if others is not None else 0))
    if others is not None:
        loss = loss + multiview_loss_weight * others
    if sim_reg_loss_weight:
        pairs = ((texts[0], images[0]), (texts_extra[0], images_extra[0]))
        regularisation = (_similarity_difference(*pairs[0], shape) + _similarity_difference(*pairs[1], shape)) / 2
        loss = loss + sim_reg_loss_weight * regularisation.to(loss.dtype)
    return loss


def _views(name: str, latents: object, tokens: bool, like: Tensor | None = None, empty: bool = False) -> Tensor:
    """(V, N, D) or (V, N, T, D)."""
    expected = "(N, T, D) or (V, N, T, D)" if tokens else "(N, D) or (V, N, D)"
    if not isinstance(latents, Tensor):
        raise TypeError(f"{name}: got {type(latents).__name__}, expected a torch.Tensor of shape {expected}")
    dims = 3 if tokens else 2
    if latents.dim() not in (dims, dims + 1) or (0 in latents.shape and not empty):
        raise ValueError(f"{name}: got shape {tuple(latents.shape)}, expected {expected}, no size 0")
    views = latents if latents.dim() == dims + 1 else latents[None]
    if like is not None and views.shape[:-1] != like.shape[:-1]:
        raise ValueError(f"{name}: got shape {tuple(latents.shape)}, expected the shape of the latents but for D")
    return views


def _masks(text_mask: Tensor | None, texts: Tensor, tokens: bool) -> list[Tensor | None]:
    if text_mask is None:
        return [None] * len(texts)
    if not tokens:
        raise ValueError("text_mask: got a tensor with use_all_token_embeds=False, expected None")
    of_one = len(texts) == 1 and isinstance(text_mask, Tensor) and text_mask.dim() == 2
    mask = checks.mask("text_mask", text_mask, texts.shape[1 if of_one else 0 : 3], "text_latents", texts)
    return [mask] if of_one else list(mask)


def _pair_loss(
    shape: Shape, scale: float | Tensor, decoupled: bool, tokens: bool, extra: bool, kernel: dict[str, Any],
    latents: _Latents, text_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss of one text view and one image view; with ``extra``, image to text uses the extra latents."""
    text, image, text_extra, image_extra = latents
    if tokens:
        options = {"decoupled": decoupled, "compat": "x_clip", **kernel}
        if not extra:
            return loss_of_tokens(shape, image, text, scale, None, text_mask, **options)
        to_image = loss_of_tokens(shape, image, text, scale, None, text_mask, direction="text", **options)
        to_text = loss_of_tokens(shape, image_extra, text_extra, scale, None, text_mask, direction="image", **options)
        return (to_image + to_text) / 2
    if not extra:
        return row_loss(Problem(image, text, scale, **kernel), shape, "mean", decoupled=decoupled, want_col=True)
    to_image = row_loss(Problem(text, image, scale, **kernel), shape, "mean", decoupled=decoupled)
    to_text = row_loss(Problem(image_extra, text_extra, scale, **kernel), shape, "mean", decoupled=decoupled)
    return (to_image + to_text) / 2


def _similarity_difference(a: Tensor, b: Tensor, shape: Shape) -> Tensor:
    """Mean over i != j of (a_i . a_j - b_i . b_j)^2, from D x D products: |A A^T - B B^T|^2 = |A^T A|^2 - 2 |A^T B|^2
    + |B^T B|^2, minus the diagonal. In float64, because these terms nearly cancel. 0 for a single row.
    """
    a, b = a.double(), b.double()
    aa, ab, bb = (shape.sum(t) for t in (a.T @ a, a.T @ b, b.T @ b))
    diagonal = shape.sum((a.square().sum(dim=1) - b.square().sum(dim=1)).square().sum())
    whole = aa.square().sum() - 2 * ab.square().sum() + bb.square().sum()
    return shape.counted((whole - diagonal) / max(1, shape.all_rows * (shape.all_rows - 1)))
