"""A flag is True or False: 1, "no" and their like raise, of every public function and module, on every backend."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fused_contrastive as fc

X, Y, TOKENS = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 3, 4)
PUBLIC = {name: getattr(fc, name) for name in fc.__all__}
# The rest of a call that is right but for the flag.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "clip_loss": {"image_features": X, "text_features": Y, "logit_scale": 1.0},
    "contrastive_stats": {"x": X, "y": Y},
    "filip_loss": {"image_tokens": TOKENS, "text_tokens": TOKENS, "logit_scale": 1.0},
    "info_nce_loss": {"query": X, "key": Y},
    "median_rank": {"queries": X, "candidates": Y, "targets": torch.arange(6).roll(1)},
    "nt_xent_loss": {"z1": X, "z2": Y, "normalize": True},
    "recall_at_k": {"queries": X, "candidates": Y, "targets": torch.arange(6).roll(1)},
    "supcon_loss": {"features": X, "labels": torch.arange(6) % 3},
    "target_ranks": {"queries": X, "candidates": Y, "targets": torch.arange(6).roll(1)},
    "x_clip_loss": {"text_latents": TOKENS[:2], "image_latents": TOKENS[:2], "logit_scale": 1.0},
    "zero_shot": {"image_features": X, "class_text_features": Y, "scale": 1.0},
    "ClipLoss": {},
    "FilipLoss": {},
    "InfoNCELoss": {},
    "NTXentLoss": {"normalize": True},
    "SupConLoss": {},
}
RESULTS = ("ContrastiveStats", "Deviation", "Diagnosis", "MaxSimScores", "Ranking", "SigmoidStats", "Verification")
NOT_FLAGS = [0, 1, 0.0, "no", "False", np.bool_(True), torch.tensor(True), [], None]


def flags(function: Callable[..., Any]) -> list[str]:
    """Parameters that are annotated with bool, or whose default is one."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if re.search(r"\bbool\b", str(parameter.annotation)) or isinstance(parameter.default, bool)
    ]


def entries() -> list[tuple[str, str]]:
    return [(name, flag) for name in PUBLIC if name not in RESULTS for flag in flags(PUBLIC[name])]


def optional(name: str, flag: str) -> bool:
    return "None" in str(inspect.signature(PUBLIC[name]).parameters[flag].annotation)


def test_all_that_have_a_flag_are_known() -> None:
    assert {name for name, _ in entries()} == set(ARGUMENTS)
    assert not [name for name in RESULTS if name.endswith(("Loss", "_loss"))]  # they are results, given and not made
    for thing in PUBLIC.values():
        if inspect.isclass(thing) and issubclass(thing, torch.nn.Module):
            assert not flags(thing.forward), "options of a module belong to its constructor"


@pytest.mark.parametrize(("name", "flag"), entries())
def test_a_flag_is_true_or_false(name: str, flag: str) -> None:
    function, arguments = PUBLIC[name], ARGUMENTS[name]
    for value in (True, False):
        function(**{**arguments, flag: value})
    for value in NOT_FLAGS:
        if value is None and optional(name, flag):
            continue
        with pytest.raises(TypeError, match=rf"^{flag}: got {re.escape(repr(value))}, expected True or False$"):
            function(**{**arguments, flag: value})


@pytest.mark.parametrize(("name", "flag"), [entry for entry in entries() if entry[0].islower()])
def test_on_every_backend(name: str, flag: str, backend: str) -> None:
    """Before the backend is asked, and whichever it is."""
    arguments = {k: v.to(torch.get_default_device()) if hasattr(v, "to") else v for k, v in ARGUMENTS[name].items()}
    with pytest.raises(TypeError, match=f"^{flag}: got 1, expected True or False$"):
        PUBLIC[name](**{**arguments, flag: 1, "backend": backend})
