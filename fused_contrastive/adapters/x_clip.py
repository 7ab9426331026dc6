"""lucidrains' x-clip (x-clip 0.14)."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from x_clip.x_clip import CLIP

from fused_contrastive.adapters.patching import Patch
from fused_contrastive.losses.x_clip import x_clip_loss


def patch_x_clip() -> Patch:
    """Makes ``x_clip.CLIP(...)(text, image, return_loss=True)`` compute its loss by ``x_clip_loss``.

    All switches of x-clip's constructor and forward stay as they are, its self-supervised losses included; calls
    without ``return_loss`` are x-clip's own. The loss is computed stably, where x-clip's exp overflows. Returns a
    ``Patch``, which ``undo()`` or leaving a ``with`` block takes back.

    Raises:
        NotImplementedError (in forward): several processes (x-clip's own forward raises NameError there).
    """
    original = CLIP.forward

    @wraps(original)
    def forward(self: Any, text: Tensor, image: Tensor, return_loss: bool = False, *args: Any, **options: Any) -> Any:
        early = options.get("return_encodings") or options.get("return_latents") or any(args[:2])
        if not return_loss or early:
            return original(self, text, image, return_loss, *args, **options)
        if self.requires_all_gather:
            raise NotImplementedError(
                "x_clip.CLIP: got a process group of several processes, which is not covered: gather the latents of "
                "return_latents=True and call fused_contrastive.x_clip_loss"
            )
        # x-clip computes its self-supervised losses, then returns the latents early.
        supervised: dict[str, Any] = {}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, out, name=name: supervised.update({name: out}))
            for name, module, used in (
                ("text", getattr(self, "mlm", None), self.use_mlm),
                ("image", getattr(self, "visual_ssl", None), self.use_visual_ssl),
            )
            if used and module is not None
        ]
        try:
            latents = original(self, text, image, True, False, True, *args[2:], **options)
        finally:
            for hook in hooks:
                hook.remove()
        return _loss(self, latents, (text, options.get("aug_text")), (image, options.get("aug_image")), supervised)

    patch = Patch()
    patch.replace(CLIP, "forward", forward)
    return patch


def _loss(clip: Any, latents: tuple[Tensor, ...], texts: Any, images: Any, supervised: dict[str, Any]) -> Tensor:
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
    for name, weight in (("text", clip.text_ssl_loss_weight), ("image", clip.image_ssl_loss_weight)):
        loss = loss + supervised.get(name, 0) * weight
    return loss


def _views(first: Tensor, augmented: Any) -> list[Tensor]:
    if augmented is None:
        return [first]
    return [first, *(augmented if isinstance(augmented, (tuple, list)) else (augmented,))]
