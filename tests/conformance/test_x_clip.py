"""``x_clip_loss`` against x-clip itself, values and gradients, where it can be imported (it needs torchvision)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fused_contrastive import x_clip_loss

try:
    from x_clip import CLIP
except ImportError as error:
    pytest.skip(f"x-clip cannot be imported: {error}", allow_module_level=True)

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decoupled": {"decoupled_contrastive_learning": True},
    "extra projections": {"extra_latent_projection": True},
    "tokens": {"use_all_token_embeds": True},
    "tokens, extra projections": {"use_all_token_embeds": True, "extra_latent_projection": True},
    "regularised": {"sim_reg_loss_weight": 0.5, "extra_latent_projection": True},  # x-clip raises without the latter
    "views": {"multiview_loss_weight": 0.3},
    "tokens, views": {"use_all_token_embeds": True, "multiview_loss_weight": 0.3},
}
N, T, P, DIM = 6, 4, 5, 16


@pytest.mark.parametrize("name", SWITCHES)
def test_x_clip_itself(name: str) -> None:
    switches = SWITCHES[name]
    tokens = switches.get("use_all_token_embeds", False)  # without, x-clip takes each item's first token
    clip = CLIP(
        image_encoder=nn.Identity(), text_encoder=nn.Embedding(50, DIM), dim_image=DIM, dim_text=DIM, dim_latent=8,
        text_encode_without_mask=True, text_has_cls_token=not tokens, visual_has_cls_token=not tokens, **switches,
    )  # fmt: skip
    for projection in (clip.to_text_latent_extra, clip.to_visual_latent_extra):
        nn.init.normal_(projection.weight)
    views = 2 if "views" in name else 1
    text = torch.randint(1, 50, (views, N, T))
    text[..., 3] *= torch.rand(views, N) < 0.5  # some padding
    image = torch.randn(views, N, P, DIM)
    more = {"aug_text": list(text[1:]), "aug_image": list(image[1:])} if views > 1 else {}
    theirs = clip(text[0], image[0], return_loss=True, **more)
    latents = clip(text[0], image[0], return_loss=True, return_latents=True, **more)
    split = [t.unflatten(0, (views, N)) for t in latents]
    ours = x_clip_loss(
        split[0], split[1], clip.temperature.exp(), text_mask=text != 0 if tokens else None,
        text_latents_extra=split[2] if len(split) > 2 else None,
        image_latents_extra=split[3] if len(split) > 2 else None,
        **{key: value for key, value in switches.items() if key != "extra_latent_projection"},
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    held = [p for p in clip.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(loss, held, allow_unused=True) for loss in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
