"""lucidrains' x-clip (tested with 0.14.4)."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.adapters.common import importing
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core import checks
from fused_contrastive.losses.x_clip import x_clip_loss

with importing("x-clip", tested="0.14.4"):
    from x_clip.x_clip import CLIP


def patch_x_clip() -> Patch:
    """Makes ``x_clip.CLIP(...)(text, image, return_loss=True)`` compute its loss by ``x_clip_loss``.

    All switches of x-clip's constructor and forward stay as they are, its self-supervised losses included; calls
    without ``return_loss`` are x-clip's own. The loss does not overflow where x-clip's exp does. ``undo()`` of the
    returned ``Patch``, or leaving its ``with`` block, takes the change back.

    Raises:
        NotImplementedError (in forward): several processes (x-clip's own forward raises NameError there).
    """
    original = CLIP.forward
    signature = inspect.signature(original)

    @wraps(original)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        bound = signature.bind(self, *args, **options)
        call = bound.arguments
        if not call.get("return_loss") or call.get("return_encodings") or call.get("return_latents"):
            return original(*bound.args, **bound.kwargs)
        if self.requires_all_gather:
            raise NotImplementedError(
                "x_clip.CLIP: got a process group of several processes, which is not covered: call "
                "fused_contrastive.x_clip_loss with group= on the latents of return_latents=True"
            )
        checks.same_rows("text", call["text"], "image", call["image"])
        call["return_latents"] = True  # these are returned after the self-supervised losses, which _Kept keeps
        with _Kept(self) as kept:
            latents = original(*bound.args, **bound.kwargs)
        return _loss(self, latents, (call["text"], call.get("aug_text")), (call["image"], call.get("aug_image")), kept)

    patch = Patch()
    patch.replace(CLIP, "forward", forward)
    return patch


class _Kept:
    """Keeps what a model's self-supervised losses return, while in the ``with`` block."""

    def __init__(self, clip: Any) -> None:
        self.clip, self.losses = clip, dict[str, Any]()

    def __enter__(self) -> _Kept:
        self.own = {name: vars(self.clip).get(name) for name in ("mlm", "visual_ssl")}
        for name, used in (("mlm", self.clip.use_mlm), ("visual_ssl", self.clip.use_visual_ssl)):
            if used:
                self._wrap(name, getattr(self.clip, name))
        return self

    def _wrap(self, name: str, loss: Any) -> None:
        def call(*args: Any, **options: Any) -> Any:
            result = self.losses[name] = loss(*args, **options)
            return result

        vars(self.clip)[name] = call  # found before the module of that name

    def __exit__(self, *_: object) -> None:
        for name, own in self.own.items():
            if own is None:
                vars(self.clip).pop(name, None)
            else:
                vars(self.clip)[name] = own


def _loss(clip: Any, latents: tuple[Tensor, ...], texts: Any, images: Any, kept: _Kept) -> Tensor:
    every_text, image_views = _views(*texts), len(_views(*images))
    text_views = len(every_text)
    split = [t.unflatten(0, (text_views if k % 2 == 0 else image_views, len(texts[0]))) for k, t in enumerate(latents)]
    extra = {}
    if clip.extra_latent_projection:
        extra = {"text_latents_extra": split[2], "image_latents_extra": split[3]}
    mask = torch.stack(every_text) != clip.text_pad_id if clip.use_all_token_embeds else None
    loss = x_clip_loss(
        split[0], split[1], clip.temperature.exp(), text_mask=mask, **extra,
        use_all_token_embeds=clip.use_all_token_embeds,
        decoupled_contrastive_learning=clip.decoupled_contrastive_learning,
        multiview_loss_weight=clip.multiview_loss_weight,
        sim_reg_loss_weight=clip.sim_reg_loss_weight,
        ssl_loss_weight=clip.text_ssl_loss_weight + clip.image_ssl_loss_weight,
    )  # fmt: skip
    for name, weight in (("mlm", clip.text_ssl_loss_weight), ("visual_ssl", clip.image_ssl_loss_weight)):
        loss = loss + kept.losses.get(name, 0) * weight
    return loss


def _views(first: Tensor, augmented: Any) -> list[Tensor]:
    if augmented is None:
        return [first]
    return [first, *(augmented if isinstance(augmented, (tuple, list)) else (augmented,))]
