"""transformers' CLIP-like models (tested with 4.57.6 and 5.24.0): ``return_loss=True`` from the embeddings."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_contrastive.adapters.common import importing
from fused_contrastive.adapters.patching import Patch
from fused_contrastive.core import checks
from fused_contrastive.losses.clip import clip_loss
from fused_contrastive.losses.siglip import siglip_loss

with importing("transformers", tested="4.57.6 and 5.24.0", least="4.57"):
    import transformers
    from transformers.utils.generic import can_return_tuple

# Models whose logits are scale * text_embeds @ image_embeds.T, with the class for each module's name. Their embeddings
# are what get_image_features and get_text_features give, normalised.
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
# Models whose forward returns the towers' outputs unchanged, though their get_*_features replaces pooler_output by the
# projection. Before transformers 5 all models did, and get_*_features gives the projection alone.
BEFORE_5 = transformers.__version__.startswith("4.")
TOWERS_UNCHANGED = tuple(MODELS) if BEFORE_5 else ("altclip", "blip", "vision_text_dual_encoder")
_OTHER_INPUTS = "it embeds sound or video, and is not tested here: call {} on its embeddings"
_CLIP = _OTHER_INPUTS.format("fused_contrastive.clip_loss")
_SIGLIP = _OTHER_INPUTS.format("fused_contrastive.siglip_loss")
_DETECTOR = "it is a detector, whose loss is not trained by itself"
_SEVERAL = "its loss is a sum of several, most of them over other embeddings"
NOT_COVERED = {
    "aimv2": "it has no loss: call fused_contrastive.clip_loss on its embeddings",
    "align": "its temperature divides, and its labels are smoothed: call fused_contrastive.clip_loss on its "
    "embeddings, with logit_scale=1 / model.temperature and label_smoothing=0.1",
    "blip_2": "it has no contrastive loss",
    "bridgetower": _SEVERAL,
    "clap": "its two directions have a scale each: call fused_contrastive.info_nce_loss for each on its embeddings",
    "clvp": _CLIP,
    "flava": _SEVERAL,
    "groupvit": "its segmentation logits need the matrix",
    "owlvit": _DETECTOR,
    "owlv2": _DETECTOR,
    "pe_audio": _SIGLIP,
    "pe_audio_video": _SEVERAL,
    "pe_video": _SIGLIP,
    "tipsv2": "either input may be missing",
    "videoprism": "its loss is over logits that have been normalised by their sums",
    "x_clip": "each video makes its own text embeddings, so there is no product to fuse",
}


def patch_transformers(models: str | Sequence[str] = tuple(MODELS), *, output_logits: bool = False) -> Patch:
    """Makes CLIP, SigLIP and their relatives compute ``return_loss=True`` without the logits.

    The output's ``loss``, ``text_embeds``, ``image_embeds`` and the towers' outputs are as before. In training,
    ``logits_per_image`` and ``logits_per_text`` are None, unless ``output_logits=True`` here or in the call asks for
    them; ``output[1]`` and ``output[2]`` are then None as well, so that later elements keep their positions. Without
    gradients, as in evaluation, and with ``return_dict=False`` the logits are there as before. Calls without
    ``return_loss`` are the library's own. The class is patched, and with it existing models, except those whose own
    ``forward`` has been wrapped: patch before ``accelerator.prepare``. Trainer and DDP need nothing else.

    Args:
        models: a model type or several, as in ``config.model_type``: keys of ``MODELS``.
        output_logits: the default of the call's ``output_logits``.

    Returns:
        A ``Patch``, which ``undo()`` or leaving a ``with`` block takes back.

    Raises:
        NotImplementedError: a model type that is not covered, with the reason.
        TypeError: output_logits that is not True or False, here or in the call.
        ValueError: an unknown model type; in a patched forward, other numbers of texts and of images.
    """
    checks.boolean("output_logits", output_logits)
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
    decorated = not {"return_dict", "kwargs"} & set(signature.parameters)  # by can_return_tuple; it takes return_dict
    towers = {
        tower: set(inspect.signature(getattr(model_class, f"get_{tower}_features")).parameters)
        for tower in ("image", "text")
    }
    embed = _embed_by_towers if name in TOWERS_UNCHANGED else _embed_by_features
    order = ("text", "image") if name == "altclip" and BEFORE_5 else ("image", "text")  # dropout draws in this order
    output_class = _positions_kept(_output_class(model_class))

    @can_return_tuple
    def fused(self: Any, output_logits: bool, arguments: dict[str, Any], **shared: Any) -> Any:
        found = {
            tower: embed(self, tower, {k: v for k, v in arguments.items() if k in towers[tower]} | shared)
            for tower in order
        }
        (images, image_output), (texts, text_output) = found["image"], found["text"]
        if len(texts) != len(images):
            raise ValueError(
                f"input_ids: got {len(texts)} texts for the {len(images)} images of pixel_values, expected one for "
                "each image with return_loss=True: text i belongs to image i. For several captions of an image call "
                "fused_contrastive.info_nce_loss, with targets and ids, on the embeddings"
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

    @functools.wraps(original)
    def forward(self: Any, *args: Any, output_logits: bool = default_output_logits, **options: Any) -> Any:
        by_decorator = {"return_dict": options.pop("return_dict")} if decorated and "return_dict" in options else {}
        bound = signature.bind(self, *args, **options).arguments
        if not bound.get("return_loss"):
            return original(self, *args, **options, **by_decorator)
        checks.boolean("output_logits", output_logits)
        for name in ("input_ids", "pixel_values"):
            if bound.get(name) is None:
                raise ValueError(f"{name}: got None, expected a tensor: return_loss=True needs texts and images")
        known = {k: v for k, v in bound.items() if k not in ("self", "return_loss", "kwargs")}
        shared = {**bound.get("kwargs", {}), **by_decorator}
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
        (model.text_model, "text_projection") if tower == "text" else (model.vision_model, "visual_projection")
    )
    if "pixel_attention_mask" in inputs:  # SigLIP 2's tower has another name for it
        inputs = {**inputs, "attention_mask": inputs["pixel_attention_mask"]}
        del inputs["pixel_attention_mask"]
    parameters = inspect.signature(encoder.forward).parameters
    if "return_dict" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inputs = {**inputs, "return_dict": True}
    output = encoder(**inputs)
    has_pooler = (tower, model.config.model_type) != ("text", "chinese_clip")
    pooled = output[1] if has_pooler else output[0][:, 0]
    return getattr(model, projection, torch.nn.Identity())(pooled), output  # SigLIP has no projection


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


@functools.cache
def _positions_kept(output_class: Any) -> Any:
    """The class, but where there are no logits its tuple has None in their positions, not the next values."""

    class Output(output_class):
        def to_tuple(self) -> tuple[Any, ...]:
            loss, *rest = super().to_tuple()
            return (loss, *rest) if self.logits_per_image is not None else (loss, None, None, *rest)

        def __reduce__(self) -> Any:  # unpickled, it is of the library's class
            return output_class, *super().__reduce__()[1:]

    Output.__name__, Output.__qualname__ = output_class.__name__, output_class.__qualname__
    return Output
