"""The backend that docs/extend.md sketches works with every loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from snippets import run_page
from torch import Tensor

import fused_contrastive as fc
from fused_contrastive.backends.contract import Backend
from fused_contrastive.core.spec import Forward, Gradients, Needs, StatsSpec, Upstream
from fused_contrastive.ops import dispatch

N, D = 12, 8
IDS = torch.arange(N) // 3
CASES: dict[str, Any] = {
    "clip": lambda x, y, s, **o: fc.clip_loss(x, y, s, **o),
    "info_nce": lambda x, y, s, **o: fc.info_nce_loss(x, y, logit_scale=s, row_ids=IDS, col_ids=IDS, **o),
    "nt_xent": lambda x, y, s, **o: fc.nt_xent_loss(x, y, logit_scale=s, normalize=True, **o),
    "siglip": lambda x, y, s, **o: fc.siglip_loss(x, y, s, -2.0, row_ids=IDS, col_ids=IDS, **o),
    "supcon": lambda x, y, s, **o: fc.supcon_loss(torch.stack((x, y), dim=1), IDS, logit_scale=s, **o),
    "filip": lambda x, y, s, **o: fc.filip_loss(x.view(N, 2, -1), y.view(N, 2, -1), s, **o),
    "ranks": lambda x, y, s, **o: (s * x).sum() + fc.target_ranks(x, y, **o).sum(),
}


@pytest.fixture
def _sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {kind.__name__: kind for kind in (Backend, Forward, Gradients, Needs, StatsSpec, Upstream, Tensor)}
    session: dict[str, Any] = {"torch": torch, "F": F, **given}
    assert run_page("docs/extend.md", session) == 1
    sketch = session["BACKEND"]
    monkeypatch.setattr(type(sketch), "device_type", "cpu")
    monkeypatch.setattr(type(sketch), "unavailable", lambda _: None)
    monkeypatch.setitem(dispatch.BACKENDS, "mps", sketch)


@pytest.mark.usefixtures("_sketch")
@pytest.mark.parametrize("loss", CASES)
def test_losses_on_the_backend_of_the_page(loss: str) -> None:
    x, y = F.normalize(torch.randn(2, N, D), dim=2)
    found = []
    for backend, dtype in (("mps", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, y, torch.tensor(3.0))]
        value = CASES[loss](*leaves, backend=backend)
        found.append(
            [
                value.double(),
                *(g.double() for g in torch.autograd.grad(value, leaves, allow_unused=True) if g is not None),
            ]
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
