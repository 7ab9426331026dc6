"""A scale, temperature or bias that is not where the features are: moved, but not while a CUDA graph is captured.

No GPU is needed: fake tensors have a device and a shape, and no values.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_contrastive as fc
from fused_contrastive.core import checks

GPU = torch.device("cuda:0")
FAKE = FakeTensorMode()


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FAKE:
        return torch.empty(shape, dtype=dtype, device=GPU)


CALLS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "stats": ("scale", lambda s: fc.contrastive_stats(features(4, 3), features(4, 3), s)),
    "sigmoid": ("scale", lambda s: fc.sigmoid_stats(features(4, 3), features(4, 3), s)),
    "self": ("scale", lambda s: fc.self_stats(features(4, 3), s)),
    "clip": ("logit_scale", lambda s: fc.clip_loss(features(4, 3), features(4, 3), s)),
    "info_nce": ("logit_scale", lambda s: fc.info_nce_loss(features(4, 3), features(4, 3), logit_scale=s)),
    "info_nce by temperature": (
        "temperature",
        lambda s: fc.info_nce_loss(features(4, 3), features(4, 3), temperature=s),
    ),
    "nt_xent": ("temperature", lambda s: fc.nt_xent_loss(features(4, 3), features(4, 3), s, normalize=True)),
    "supcon": ("temperature", lambda s: fc.supcon_loss(features(4, 3), features(4, dtype=torch.int64), s)),
    "siglip": ("logit_scale", lambda s: fc.siglip_loss(features(4, 3), features(4, 3), s, 0.0)),
    "siglip's bias": ("logit_bias", lambda s: fc.siglip_loss(features(4, 3), features(4, 3), 1.0, s)),
    "filip": ("logit_scale", lambda s: fc.filip_loss(features(4, 2, 3), features(4, 2, 3), s)),
    "x_clip": ("logit_scale", lambda s: fc.x_clip_loss(features(1, 4, 3), features(1, 4, 3), s)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("capturing")
def test_elsewhere_while_a_graph_is_captured(call: str) -> None:
    name, run = CALLS[call]
    message = (
        f"{name}: got a tensor on cpu while a CUDA graph is captured, expected one on cuda:0; move it before capturing"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(torch.ones((), device="cpu"))


@pytest.mark.usefixtures("capturing")
def test_in_place_while_a_graph_is_captured() -> None:
    scale = features()
    assert checks.scalar_beside("scale", scale, features(4, 3)) is scale
    assert checks.scalar_beside("scale", 2.0, features(4, 3)) == 2.0


def test_moved_with_its_gradient() -> None:
    scale = torch.ones((), device="cpu", requires_grad=True)
    moved = checks.scalar_beside("scale", scale, torch.empty(4, 3, device="meta"))
    assert isinstance(moved, Tensor)
    assert moved.device.type == "meta"
    assert moved.requires_grad


def test_on_a_cpu_nothing_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "is_current_stream_capturing")
    scale = torch.ones((), device="cpu")
    assert checks.scalar_beside("scale", scale, torch.ones(2, 2, device="cpu")) is scale
