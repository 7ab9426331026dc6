"""float32 features multiplied as tf32: rounded to nearest, once, wherever the matrix units would truncate them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_contrastive import max_sim
from fused_contrastive.ops import dispatch

pytest.importorskip("triton")

from fused_contrastive.backends.triton import max_sim_launch, problem


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tf32_allowed")
def test_max_sim_multiplies_rounded_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, the scores are those of rounded tokens, and the gradients are sums of unrounded tokens."""
    if (reason := dispatch.BACKENDS["triton"].unavailable()) is not None or torch.cuda.is_available():
        pytest.skip(f"needs Triton's interpreter: {reason}")

    def on_a_gpu(x: Tensor, y: Tensor, source: str, on: object) -> tuple[Tensor, Tensor]:
        assert source == "tf32"
        return multiplied(x, y, source, on._replace(architecture="sm_90"))

    multiplied = problem.multiplied
    monkeypatch.setattr(max_sim_launch, "multiplied", on_a_gpu)
    generator = torch.Generator("cpu").manual_seed(0)
    x, y = (torch.randn(3, size, 20, generator=generator, device="cpu").requires_grad_() for size in (5, 7))
    scores = max_sim(x, y, backend="triton")
    rounded = [problem.rounded_to_tf32(t.detach()) for t in (x, y)]
    products = torch.einsum("mtd,npd->mnpt", *(t.double() for t in rounded))
    torch.testing.assert_close(scores.double(), products.amax(dim=2).sum(dim=2), rtol=0, atol=1e-5)
    scores.sum().backward()
    expected = torch.stack([y.detach()[n][products[:, n].argmax(dim=1)] for n in range(3)]).sum(dim=0)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)
