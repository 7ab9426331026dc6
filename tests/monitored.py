"""The losses that the monitor's tests train with, and what the monitor measures of one call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_contrastive as fc

N, D = 192, 16  # of the trainings
Loss = Callable[[Tensor, Tensor, Any], Tensor]
LOSSES: dict[str, Loss] = {
    "clip_loss": lambda x, y, s: fc.clip_loss(x, y, s),
    "info_nce_loss": lambda x, y, s: fc.info_nce_loss(x, y, logit_scale=s),
    "nt_xent_loss": lambda x, y, s: fc.nt_xent_loss(x, y, logit_scale=s, normalize=False),
    "siglip_loss": lambda x, y, s: fc.siglip_loss(x, y, s, -math.log(N)),
    "supcon_loss": lambda x, y, s: fc.supcon_loss(torch.stack((x, y), 1), torch.arange(len(x)), logit_scale=s),
}


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def logged(loss: Callable[[], Tensor], silent: bool = True) -> dict[str, float]:
    """What the monitor measures of one call."""
    found: list[dict[str, float]] = []
    with warnings.catch_warnings(), fc.monitor(log=found.append) as m:
        if silent:
            warnings.simplefilter("ignore")
        value = loss()
    (only,) = found
    assert only == next(iter(m.measures.values()))
    assert only[f"{next(iter(m.measures))}/loss"] == pytest.approx(value.double().mean().item(), rel=1e-6, nan_ok=True)
    return {key.partition("/")[2]: number for key, number in only.items()}
