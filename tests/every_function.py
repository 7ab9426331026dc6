"""The arguments of one small call of each public function and module, for tests of behaviour and not of results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

import fused_contrastive as fc

_generator = torch.Generator().manual_seed(0)
X, Y, TOKENS = (torch.randn(*shape, generator=_generator) for shape in ((6, 4), (6, 4), (6, 3, 4)))
RESULTS = (
    "ContrastiveStats", "Deviation", "Diagnosis", "MaxSimScores", "Metrics", "Ranking", "SigmoidStats", "Verification",
)  # fmt: skip
OTHERS = ("GlobalBatch", "verify_against_reference")  # neither takes tensors
PUBLIC: dict[str, Any] = {name: getattr(fc, name) for name in fc.__all__}
_RETRIEVAL = {"queries": X, "candidates": Y, "targets": torch.arange(6).roll(1)}
_PAIRS = {"image_features": X, "text_features": Y, "logit_scale": 1.0}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "clip_loss": {**_PAIRS, "label_smoothing": 0.1},
    "contrastive_stats": {"x": X, "y": Y, "scale": 1.0},
    "diagnose": {"x": X, "y": Y, "scale": 1.0},
    "distillation_loss": {
        "x": X,
        "y": Y,
        "logit_scale": 1.0,
        "teacher_x": Y,
        "teacher_y": X,
        "teacher_scale": 2.0,
    },
    "filip_loss": {"image_tokens": TOKENS, "text_tokens": TOKENS, "logit_scale": 1.0},
    "info_nce_loss": {"query": X, "key": Y},
    "max_sim": {"x_tokens": TOKENS, "y_tokens": TOKENS},
    "median_rank": _RETRIEVAL,
    "nt_xent_loss": {"z1": X, "z2": Y, "normalize": True},
    "rank": {"queries": X, "candidates": Y, "k": 3, "scale": 2.0},
    "recall_at_k": _RETRIEVAL,
    "self_stats": {"x": X, "scale": 1.0},
    "siglip_loss": {**_PAIRS, "logit_bias": -1.0},
    "sigmoid_stats": {"x": X, "y": Y, "scale": 1.0},
    "supcon_loss": {"features": X, "labels": torch.arange(6) % 3},
    "target_ranks": _RETRIEVAL,
    "verify": {"loss_fn": fc.clip_loss, **_PAIRS},
    "x_clip_loss": {"text_latents": TOKENS[:2], "image_latents": TOKENS[:2], "logit_scale": 1.0},
    "zero_shot": {"image_features": X, "class_text_features": Y, "scale": 1.0, "probabilities": True},
}
# For each module: its options, and the function whose remaining arguments its call takes.
MODULES: dict[str, tuple[dict[str, Any], str]] = {
    "ClipLoss": ({"label_smoothing": 0.1}, "clip_loss"),
    "DistillationLoss": ({}, "distillation_loss"),
    "FilipLoss": ({}, "filip_loss"),
    "InfoNCELoss": ({}, "info_nce_loss"),
    "NTXentLoss": ({"normalize": True}, "nt_xent_loss"),
    "SigLipLoss": ({}, "siglip_loss"),
    "SupConLoss": ({}, "supcon_loss"),
}


def call(name: str, **options: Any) -> Any:
    """The result of a function, or of a module, which is made and then called."""
    if name in FUNCTIONS:
        function: Callable[..., Any] = PUBLIC[name]
        return function(**{**FUNCTIONS[name], **options})
    made, same = MODULES[name]
    module = PUBLIC[name](**{**made, **options})
    takes = inspect.signature(module.forward).parameters
    arguments = {k: v for k, v in FUNCTIONS[same].items() if k in takes or k == "z2"}
    return module(*arguments.values()) if same == "nt_xent_loss" else module(**arguments)
