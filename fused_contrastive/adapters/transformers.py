"""transformers' CLIP-like models (transformers 5): the loss of ``return_loss=True`` from the embeddings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import can_return_tuple

from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core import checks
from fused_contrastive.losses.clip import clip_loss
from fused_contrastive.losses.siglip import siglip_loss

# Models whose logits are scale * text_embeds @ image_embeds.T: by the name of the model's module, its class. What is
# normalised is what get_image_features and get_text_features give.
MODELS = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "altclip": "AltCLIPModel",
    "chinese_clip": "ChineseCLIPModel",
    "clipseg": "CLIPSegModel",
    "blip": "BlipModel",
    "vision_text_dual_encoder": "VisionTextDualEncoderModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
}
# Whose forward returns the towers' outputs as they are, where get_*_features puts the projection in their place.
TOWERS_UNCHANGED = ("altclip", "blip", "vision_text_dual_encoder")
NOT_COVERED = {
    "groupvit": "its segmentation logits need the matrix",
    "owlvit": "it is a detector, whose loss is not trained by itself",
    "owlv2": "it is a detector, whose loss is not trained by itself",
    "x_clip": "each video makes its own text embeddings, so there is no product to fuse",
    "clvp": "it embeds speech",
    "tipsv2": "either input may be missing",
}


def patch_transformers(models: str | Sequence[str] = tuple(MODELS), *, output_logits: bool = False) -> Patch:
    """Makes CLIP, SigLIP and their relatives compute ``return_loss=True`` without the logits.

    The output's ``loss``, ``text_embeds``, ``image_embeds`` and the towers' outputs are as before. In training,
    ``logits_per_image`` and ``logits_per_text`` are None, unless ``output_logits=True`` here or in the call asks for
    them; without gradients, as in evaluation, and with ``return_dict=False`` they are there as before. Calls without
    ``return_loss`` are the library's own. The class is patched, so existing models are too, but for those whose own
    ``forward`` something has wrapped: patch before ``accelerator.prepare``. Trainer and DDP need nothing else.

    Args:
        models: a model type or several, as in ``config.model_type``: keys of ``MODELS``.
        output_logits: the default of the call's ``output_logits``.

    Returns:
        A ``Patch``, which ``undo()`` or leaving a ``with`` block takes back.

    Raises:
        NotImplementedError, ValueError: a model type that is not covered, or unknown.
    """
    patch = Patch()
    models = [name.replace("-", "_") for name in ([models] if isinstance(models, str) else models)]
    for name in models:
        if name in NOT_COVERED:
            raise NotImplementedError(f"models: got {name!r}, which is not covered: {NOT_COVERED[name]}")
        if name not in MODELS:
            raise ValueError(f"models: got {name!r}, expected one of {', '.join(map(repr, MODELS))}")
    for name in models:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        model_class = getattr(module, MODELS[name])
        patch.replace(model_class, "forward", _forward(name, model_class, output_logits))
    return patch


def _forward(name: str, model_class: Any, default_output_logits: bool) -> Any:
    original = model_class.forward
    signature = inspect.signature(original)
    towers = {
        tower: set(inspect.signature(getattr(model_class, f"get_{tower}_features")).parameters)
        for tower in ("image", "text")
    }
    embed = _embed_by_towers if name in TOWERS_UNCHANGED else _embed_by_features
    output_class = _output_class(model_class)

    @can_return_tuple
    def fused(self: Any, output_logits: bool, arguments: dict[str, Any], **shared: Any) -> Any:
        (images, image_output), (texts, text_output) = (  # in the library's order: dropout draws
            embed(self, tower, {k: v for k, v in arguments.items() if k in towers[tower]} | shared)
            for tower in ("image", "text")
        )
        texts = texts / texts.norm(p=2, dim=-1, keepdim=True)
        images = (images / images.norm(p=2, dim=-1, keepdim=True)).to(device=texts.device, dtype=texts.dtype)
        scale = checks.beside("logit_scale", self.logit_scale.exp(), texts)
        bias = checks.beside("logit_bias", self.logit_bias, texts) if hasattr(self, "logit_bias") else None
        result = {
            "loss": _loss(texts, images, scale, bias),
            "text_embeds": texts,
            "image_embeds": images,
            "text_model_output": text_output,
            "vision_model_output": image_output,
        }
        if output_logits:
            logits = texts @ images.t() * scale
            logits = logits if bias is None else logits + bias
            result |= {"logits_per_text": logits, "logits_per_image": logits.t()}
        return output_class(**result)

    @wraps(original)
    def forward(self: Any, *args: Any, output_logits: bool = default_output_logits, **options: Any) -> Any:
        bound = signature.bind(self, *args, **options).arguments
        if not bound.get("return_loss"):
            return original(self, *args, **options)
        known = {k: v for k, v in bound.items() if k not in ("self", "return_loss", "kwargs")}
        shared = dict(bound.get("kwargs", {}))
        for name in ("return_dict", "output_attentions", "output_hidden_states"):
            if name in known:
                shared[name] = known.pop(name)
        as_tuple = shared.get("return_dict") is False or not getattr(self.config, "return_dict", True)
        with_logits = output_logits or as_tuple or not torch.is_grad_enabled()
        return fused(self, with_logits, known, **shared)

    return forward


def _embed_by_features(model: Any, tower: str, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Embeddings (N, D), not normalised, and the tower's output."""
    output = getattr(model, f"get_{tower}_features")(**inputs, return_dict=True)
    return output.pooler_output, output


def _embed_by_towers(model: Any, tower: str, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    encoder, projection = (
        (model.text_model, model.text_projection) if tower == "text" else (model.vision_model, model.visual_projection)
    )
    output = encoder(**inputs, return_dict=True)
    return projection(output[1]), output  # the pooled output


def _loss(texts: Tensor, images: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(N, D) normalised embeddings. SigLIP's scale and bias are (1,)."""
    if bias is None:
        return clip_loss(texts, images, scale.reshape(()))
    return siglip_loss(texts, images, scale.reshape(()), bias.reshape(()))


def _output_class(model_class: Any) -> Any:
    """The output class that the model's module uses: CLIPOutput and its like."""
    module = inspect.getmodule(model_class)
    name = model_class.__name__.removesuffix("Model") + "Output"
    return getattr(module, name, None) or getattr(module, "CLIPOutput")  # noqa: B009
