"""The CLIP loss as other packages compute it: (x, y, scale) -> loss, for each that can be imported here.

Called as their documentation has it, on the same tensors; a loss of one direction is called for each.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import eager

os.environ.setdefault("MEMEFF_INPUT_PRECISION", "ieee")  # read when it is imported; its default for float32 is tf32

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def linear_cross_entropy(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """torch's chunked cross-entropy of a product, once per direction."""
    a, b = (scale * x).to(x.dtype), (scale * y).to(y.dtype)
    labels = _labels(x)
    return (F.linear_cross_entropy(a, y, labels) + F.linear_cross_entropy(b, x, labels)) / 2


def inf_cl(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    from inf_cl import cal_inf_loss

    head = max(
        h for h in (32, 64, 128, 256) if x.shape[1] % h == 0
    )  # D in parts of this, 256 unless that does not divide
    options = {"scale": scale, "head_dim": head}
    return (cal_inf_loss(x, y, **options) + cal_inf_loss(y, x, **options)) / 2


def memeff(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Its temperature is a number, without a gradient; the benchmark's is fixed, so that nothing waits to read it."""
    from memeff import MemoryEfficientCLIPLoss

    from common import SCALE

    loss: Tensor = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)(x, y)
    return loss + 0 * scale


def cut_cross_entropy(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Exact: no gradients filtered out."""
    from cut_cross_entropy import linear_cross_entropy

    a, b, labels = (scale * x).to(x.dtype), (scale * y).to(y.dtype), _labels(x)
    options = {"impl": "cce_exact", "filter_eps": None}
    return (linear_cross_entropy(a, y, labels, **options) + linear_cross_entropy(b, x, labels, **options)) / 2


def available() -> tuple[dict[str, Loss], dict[str, str]]:
    """Those that can be called here, and why the others cannot."""
    losses: dict[str, Loss] = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    missing = {}
    if hasattr(F, "linear_cross_entropy"):
        losses["2 x F.linear_cross_entropy"] = linear_cross_entropy
    else:
        missing["2 x F.linear_cross_entropy"] = f"torch {torch.__version__} has none"
    for name, loss in (("inf_cl", inf_cl), ("memeff", memeff), ("cut_cross_entropy", cut_cross_entropy)):
        try:
            importlib.import_module(name)
            losses[name] = loss
        except ImportError as error:
            missing[name] = str(error)
    return losses, missing
