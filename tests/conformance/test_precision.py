"""The adapters under autocast, on half-precision features and compiled, against the libraries in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from against import assert_same, features
from torch import Tensor

lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed: make conformance")
open_clip = pytest.importorskip("open_clip.loss", reason="open_clip is not installed: make conformance")
metric = pytest.importorskip("pytorch_metric_learning.losses", reason="not installed: make conformance")
sentences = pytest.importorskip("sentence_transformers.losses", reason="not installed: make conformance")

from fused_contrastive.adapters import lightly as our_lightly  # noqa: E402
from fused_contrastive.adapters import open_clip as our_open_clip  # noqa: E402
from fused_contrastive.adapters import pytorch_metric_learning as our_metric  # noqa: E402
from fused_contrastive.adapters import sentence_transformers as our_sentences  # noqa: E402

N, D, SCALE = 24, 16, 10.0
LABELS = torch.arange(N) // 3
Call = Callable[..., Tensor]


class Case(NamedTuple):
    """The library's class and ours, and how to call either on two sets of features."""

    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    call: Callable[[Any, Tensor, Tensor], Tensor]


def _ranking(loss: Any, x: Tensor, y: Tensor) -> Tensor:
    value: Tensor = loss.compute_loss_from_embeddings([x, y], None)
    return value


def _labelled(loss: Any, x: Tensor, _: Tensor) -> Tensor:
    value: Tensor = loss(x, LABELS)
    return value


def _two(loss: Any, x: Tensor, y: Tensor) -> Tensor:
    value: Tensor = loss(x, y)
    return value


CASES = {
    "open_clip ClipLoss": Case(
        open_clip.ClipLoss, our_open_clip.ClipLoss, lambda loss, x, y: loss(x, y, torch.tensor(SCALE))
    ),
    "open_clip SigLipLoss": Case(
        open_clip.SigLipLoss, our_open_clip.SigLipLoss, lambda loss, x, y: loss(x, y, torch.tensor(SCALE), -5.0)
    ),
    "lightly NTXentLoss": Case(lambda: lightly.NTXentLoss(1 / SCALE), lambda: our_lightly.NTXentLoss(1 / SCALE), _two),
    "lightly DCLLoss": Case(lambda: lightly.DCLLoss(1 / SCALE), lambda: our_lightly.DCLLoss(1 / SCALE), _two),
    "pytorch-metric-learning NTXentLoss": Case(
        lambda: metric.NTXentLoss(1 / SCALE), lambda: our_metric.NTXentLoss(1 / SCALE), _labelled
    ),
    "pytorch-metric-learning SupConLoss": Case(
        lambda: metric.SupConLoss(1 / SCALE), lambda: our_metric.SupConLoss(1 / SCALE), _labelled
    ),
    "sentence-transformers": Case(
        lambda: sentences.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=SCALE),
        lambda: our_sentences.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=SCALE),
        _ranking,
    ),
}


def results(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    value = call(*leaves)
    value.backward()
    return [value.detach().double(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def ours_of(case: Case, backend: str) -> Any:
    loss = case.ours()
    loss.backend = backend
    return loss


def assert_no_worse(
    case: Case, backend: str, call: Callable[[Any], Callable[[Tensor, Tensor], Tensor]], dtype: torch.dtype
) -> None:
    """Asserts that our relative error against float64, in norm, is at most eps(dtype) times the scale."""
    x, y = features(N, D), features(N, D)
    truth = results(lambda a, b: case.call(case.theirs(), a, b), x.double(), y.double())
    found = results(call(ours_of(case, backend)), x, y)
    eps = torch.finfo(dtype).eps
    for ours, exact in zip(found, truth, strict=True):
        error = (ours.double() - exact).norm() / max(exact.norm(), 1e-3)
        assert error <= eps * SCALE, (error, eps * SCALE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]

    def call(loss: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def under(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return case.call(loss, x, y)

        return under

    assert_no_worse(case, backend, call, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_features(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]
    assert_no_worse(case, backend, lambda loss: lambda x, y: case.call(loss, x.to(dtype), y.to(dtype)), dtype)


@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, backend: str) -> None:
    """They compile into one graph, unless the labels' values decide what is computed."""
    case = CASES[name]
    loss = ours_of(case, backend)
    x, y = features(N, D), features(N, D)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: case.call(loss, x, y), fullgraph=case.call is not _labelled)
    assert_same(lambda x, y: case.call(case.theirs(), x, y), compiled, {"x": x, "y": y}, SCALE)
