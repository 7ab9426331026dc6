"""x-clip itself, trained a step with and without the patch, over its switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

x_clip = pytest.importorskip("x_clip", reason="x_clip is not installed: make conformance")

from fused_contrastive.adapters.x_clip import patch_x_clip  # noqa: E402


class ImageLoss(torch.nn.Module):
    """A self-supervised loss of images with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (self.weight * image).square().mean()


SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "decoupled": ({"decoupled_contrastive_learning": True}, {}),
    "tokens": ({"use_all_token_embeds": True}, {}),
    "extra": ({"extra_latent_projection": True, "decoupled_contrastive_learning": True}, {}),
    "tokens extra": ({"extra_latent_projection": True, "use_all_token_embeds": True}, {}),
    "regularised": ({"sim_reg_loss_weight": 0.3, "extra_latent_projection": True}, {}),  # x-clip fails without
    "views": ({"multiview_loss_weight": 0.2}, {"aug_text": 2, "aug_image": 1}),
    "tokens views": ({"use_all_token_embeds": True, "multiview_loss_weight": 0.2}, {"aug_text": 1, "aug_image": 2}),
    "mlm": ({"use_mlm": True, "text_ssl_loss_weight": 0.1}, {}),
    "image ssl": ({"use_visual_ssl": True, "visual_ssl": ImageLoss, "image_ssl_loss_weight": 0.3}, {}),
    "both ssl": (
        {
            "use_mlm": True,
            "text_ssl_loss_weight": 0.1,
            "use_visual_ssl": True,
            "visual_ssl": ImageLoss,
            "image_ssl_loss_weight": 0.4,
            "multiview_loss_weight": 0.2,
        },
        {"aug_text": 1, "aug_image": 1},
    ),
    "frozen": ({}, {"freeze_image_encoder": True}),
}


def clip_of(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    if "visual_ssl" in options and isinstance(options["visual_ssl"], type):
        options["visual_ssl"] = options["visual_ssl"]()
    return x_clip.CLIP(
        dim_text=16, dim_image=16, dim_latent=32, num_text_tokens=60, text_enc_depth=1, text_seq_len=6, text_heads=2,
        visual_enc_depth=1, visual_image_size=16, visual_patch_size=8, visual_heads=2, text_dim_head=8,
        visual_dim_head=8, visual_patch_dropout=0.0, **options,
    ).double()  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_step(switch: str) -> None:
    options, call = SWITCHES[switch]
    n, found = 7, []
    text, image = torch.randint(1, 59, (n, 6)), torch.randn(n, 3, 16, 16, dtype=torch.float64)
    text[:3, 4:] = 0  # padding
    call = dict(call)
    if "aug_text" in call:
        call["aug_text"] = tuple(torch.randint(1, 59, (n, 6)) for _ in range(call["aug_text"]))
        call["aug_image"] = tuple(torch.randn(n, 3, 16, 16, dtype=torch.float64) for _ in range(call["aug_image"]))
    for patched in (False, True):
        clip = clip_of(**options)
        patch = patch_x_clip() if patched else None
        torch.manual_seed(1)  # masks of the language model
        loss = clip(text, image, return_loss=True, **call)
        loss.backward()
        if patch is not None:
            patch.undo()
        found.append((loss.detach(), {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-10)
    assert found[1][1].keys() == found[0][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_other_calls_are_x_clips_own() -> None:
    clip = clip_of()
    text, image = torch.randint(1, 59, (4, 6)), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    before = clip(text, image), clip(text, image, return_latents=True), clip(text, image, return_encodings=True)
    with patch_x_clip():
        after = clip(text, image), clip(text, image, return_latents=True), clip(text, image, return_encodings=True)
        with pytest.raises(AssertionError, match="loss cannot be used if not training"):
            clip.eval()(text, image, return_loss=True)
    torch.testing.assert_close(after, before)


def test_large_scales_do_not_overflow() -> None:
    clip = clip_of().float()
    clip.temperature.data.fill_(9.0)  # exp(9) = 8103
    text = torch.randint(1, 59, (8, 6))
    image = torch.randn(8, 3, 16, 16)
    assert not clip(text, image, return_loss=True).isfinite()
    with patch_x_clip():
        assert clip(text, image, return_loss=True).isfinite()


@pytest.mark.parametrize("positional", [False, True])
def test_forms_of_the_call(positional: bool) -> None:
    """Flags given explicitly, views by position and as a tensor, a self-supervised loss that is a plain function."""
    clip = clip_of(use_visual_ssl=True, visual_ssl=lambda image: image.square().mean(), image_ssl_loss_weight=0.2)
    text, image = torch.randint(1, 59, (5, 6)), torch.randn(5, 3, 16, 16, dtype=torch.float64)
    more = torch.randint(1, 59, (5, 6)), torch.randn(5, 3, 16, 16, dtype=torch.float64)
    flags = {"return_encodings": False, "return_latents": False, "freeze_image_encoder": False}

    def call() -> torch.Tensor:
        if positional:
            return clip(text, image, True, False, False, False, False, True, *more)
        return clip(text, image, return_loss=True, aug_text=more[0], aug_image=more[1], **flags)

    before = call()
    with patch_x_clip():
        torch.testing.assert_close(call(), before, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(call(), before)


def test_what_does_not_pair_up_is_named_as_it_was_passed() -> None:
    text, image = torch.randint(1, 59, (7, 6)), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with patch_x_clip(), pytest.raises(ValueError, match="image: got 3 rows, expected 7, as many as text"):
        clip_of()(text, image, return_loss=True)
