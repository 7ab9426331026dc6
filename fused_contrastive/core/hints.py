"""Warnings, each given once, about arguments that a loss accepts but that its caller probably did not mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fused_contrastive.core import warn

NEAR = 0.02  # how far a norm may be from 1; rows normalised in bfloat16 are within 0.4%


class Hint(NamedTuple):
    kind: str
    text: str


def hint(features: Mapping[str, Tensor], scale_name: str = "scale", scale: float = 1.0) -> Hint | None:
    """A hint if (..., D) features that a loss does not normalise are not of norm 1; else, if its scale is below 1.

    Rows of zeros, which pad ragged batches, are ignored.
    """
    for name, rows in features.items():
        norms = torch.linalg.vector_norm(rows.detach(), dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        norms = norms[norms > 0]
        if ((norms - 1).abs() > NEAR).any():
            return Hint(
                "norms",
                f"{name}: got rows of norm {norms.min():.3g} to {norms.max():.3g}, expected 1, as CLIP's cosines need: "
                "torch.nn.functional.normalize(features, dim=-1). Ignore this if inner products are meant.",
            )
    if scale < 1:
        return Hint(
            "scale",
            f"{scale_name}: got {scale:.4g} with features of norm 1, expected 1 / temperature, in CLIP 14 to 100: "
            "exponentiate a logarithm, pass a temperature t as 1 / t. Ignore this if logits so near 0 are meant.",
        )
    return None


def warn_once(found: Hint | None) -> None:
    """Each kind once a process."""
    if found is not None:
        warn.once(found.kind, found.text)
