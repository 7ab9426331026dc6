"""A scale, temperature or bias on another device than the features is moved, but not while a CUDA graph is captured.

Numbers outside float64's range raise an error that names the argument. No GPU is needed: fake tensors have a device
and a shape, and no values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

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


X, TOKENS = torch.ones(4, 3), torch.ones(4, 2, 3)
NUMBERS: dict[str, tuple[str, Callable[[int], object]]] = {
    "stats": ("scale", lambda s: fc.contrastive_stats(X, X, s)),
    "rank": ("scale", lambda s: fc.rank(X, X, 2, scale=s)),
    "rank's limit": ("max_score", lambda s: fc.rank(X, X, 2, max_score=s)),
    "sample": ("scale", lambda s: fc.sample_negatives(X, X, s)),
    "diagnose": ("scale", lambda s: fc.diagnose(X, X, s)),
    "clip": ("logit_scale", lambda s: fc.clip_loss(X, X, s)),
    "clip by temperature": ("temperature", lambda s: fc.clip_loss(X, X, temperature=s)),
    "smoothing": ("label_smoothing", lambda s: fc.clip_loss(X, X, 1.0, label_smoothing=s)),
    "siglip's bias": ("logit_bias", lambda s: fc.siglip_loss(X, X, 1.0, s)),
    "margin": ("margin", lambda s: fc.info_nce_loss(X, X, margin=s)),
    "filip": ("logit_scale", lambda s: fc.filip_loss(TOKENS, TOKENS, s)),
    "x_clip": ("logit_scale", lambda s: fc.x_clip_loss(X, X, s)),
    "x_clip's weight": ("ssl_loss_weight", lambda s: fc.x_clip_loss(X, X, 1.0, ssl_loss_weight=s)),
}


@pytest.mark.parametrize("number", [10**400, -(10**5000)], ids=["10**400", "-10**5000"])
@pytest.mark.parametrize("call", NUMBERS)
def test_integers_that_no_float_holds(call: str, number: int) -> None:
    """The longer one has more digits than Python prints."""
    name, run = NUMBERS[call]
    with pytest.raises(ValueError, match=rf"^{name}: got an? (negative )?integer of \d+ bits, expected "):
        run(number)


@pytest.mark.parametrize("name", ["k", "memory_budget"])
def test_integers_too_long_to_print(name: str) -> None:
    options = {"k": 2, name: -(10**5000)}
    with pytest.raises(ValueError, match=rf"^{name}: got a negative integer of \d+ bits, expected "):
        fc.rank(X, X, **options) if name == "k" else fc.clip_loss(X, X, 1.0, memory_budget=options[name])


@pytest.mark.parametrize("call", ["stats", "rank", "clip", "siglip's bias", "filip", "x_clip"])
def test_numbers_that_the_logits_do_not_hold(call: str) -> None:
    name, run = NUMBERS[call]
    with pytest.raises(
        ValueError, match=rf"^{name}: got 1e\+300, expected a number that torch.float32 holds, up to 3.4e"
    ):
        run(1e300)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^temperature: got 1e-60, expected at least 2.9e-39"):
        fc.clip_loss(X, X, temperature=1e-60)
    assert torch.isfinite(fc.clip_loss(X.double(), X.double(), 1e300))


def test_fractions() -> None:
    with pytest.raises(
        ValueError, match=r"^logit_scale: got a Fraction, expected a number that float64 holds, up to 1\.8e\+308"
    ):
        fc.clip_loss(X, X, Fraction(10**400))
    assert torch.equal(fc.clip_loss(X, X, Fraction(1, 2)), fc.clip_loss(X, X, 0.5))


def test_integers_under_compile() -> None:
    """torch.compile makes an integer dynamic when its value changes for the first time."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: fc.clip_loss(X, X, s, label_smoothing=0), fullgraph=True, backend="eager")
    for scale in (2, 3, 5):
        assert torch.equal(compiled(scale), fc.clip_loss(X, X, scale))


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
