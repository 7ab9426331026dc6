"""The formulas of losses on tokens, and of x-clip's, on materialised matrices, in the manner of ``textbook``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive.testing.oracle import Logits
from fused_contrastive.testing.textbook import reduce, softmax_loss


def _max_sim(
    logits: Logits, image: Tensor, text: Tensor, scale: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scores of images against texts and of texts against images, both as (images, texts)."""
    (n, p, d), t = image.shape, text.shape[1]
    s = logits(image.reshape(-1, d), text.reshape(-1, d), scale).reshape(n, p, len(text), t)
    real_p = image.new_ones(n, p) if image_mask is None else image_mask.to(s.dtype)
    real_t = text.new_ones(len(text), t) if text_mask is None else text_mask.to(s.dtype)
    of_image = s.masked_fill(real_t[None, None] == 0, -torch.inf).amax(dim=3)  # (n, p, texts)
    of_text = s.masked_fill(real_p[:, :, None, None] == 0, -torch.inf).amax(dim=1)  # (n, texts, t)
    image_score = torch.where(real_p[:, :, None] > 0, of_image, 0).sum(dim=1) / real_p.sum(dim=1)[:, None]
    text_score = torch.where(real_t[None] > 0, of_text, 0).sum(dim=2) / real_t.sum(dim=1)
    return image_score, text_score


def filip(
    logits: Logits,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    decoupled: bool = False,
    compat: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    image_score, text_score = _max_sim(logits, image, text, logit_scale, image_mask, text_mask)
    t = torch.arange(len(image), device=image.device)
    nothing = torch.zeros(len(t), len(t), dtype=torch.bool, device=image.device)
    rows = image_score.T if compat == "x_clip" else image_score
    losses = [softmax_loss(s, t, nothing, decoupled, 0.0) for s in (rows, text_score.T)]
    return reduce((losses[0] + losses[1]) / 2, reduction)


def x_clip(
    logits: Logits,
    text: Tensor,
    image: Tensor,
    logit_scale: Tensor,
    text_extra: Tensor | None = None,
    image_extra: Tensor | None = None,
    *,
    text_mask: Tensor | None = None,
    use_all_token_embeds: bool = False,
    decoupled_contrastive_learning: bool = False,
    multiview_loss_weight: float = 0.1,
    sim_reg_loss_weight: float = 0.0,
) -> Tensor:
    """x-clip's forward from the latents on, view by view."""
    dims = 4 if use_all_token_embeds else 3
    views = [t if t is None or t.dim() == dims else t[None] for t in (text, image, text_extra, image_extra)]
    texts, images = views[0], views[1]
    assert texts is not None
    assert images is not None
    texts_extra = texts if views[2] is None else views[2]
    images_extra = images if views[3] is None else views[3]
    masks = None if text_mask is None else text_mask if text_mask.dim() == 3 else text_mask[None]
    losses = []
    for m in range(len(texts)):
        for n in range(len(images)):
            mask = None if masks is None else masks[m]
            if use_all_token_embeds:  # both matrices get texts as rows
                _, to_image = _max_sim(logits, images[n], texts[m], logit_scale, None, mask)
                to_text, _ = _max_sim(logits, images_extra[n], texts_extra[m], logit_scale, None, mask)
                pair = (to_image.T, to_text.T)
            else:
                pair = (logits(texts[m], images[n], logit_scale), logits(images_extra[n], texts_extra[m], logit_scale))
            i = torch.arange(len(pair[0]), device=text.device)
            nothing = torch.zeros(len(i), len(i), dtype=torch.bool, device=text.device)
            parts = [softmax_loss(s, i, nothing, decoupled_contrastive_learning, 0.0).mean() for s in pair]
            losses.append((parts[0] + parts[1]) / 2)
    weight = multiview_loss_weight if len(losses) > 1 else 0.0
    loss = losses[0] * (1 - weight)
    if len(losses) > 1:
        loss = loss + weight * torch.stack(losses[1:]).mean()
    if sim_reg_loss_weight:
        off = ~torch.eye(len(texts[0]), dtype=torch.bool, device=text.device)
        regularisation = [
            F.mse_loss((a[0] @ a[0].T)[off], (b[0] @ b[0].T)[off])
            for a, b in ((texts, images), (texts_extra, images_extra))
        ]
        loss = loss + sim_reg_loss_weight * (regularisation[0] + regularisation[1]) / 2
    return loss
