"""Lightning and Accelerate: a model that trains with the eager formula trains the same with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_contrastive import ClipLoss

N, BATCH = 40, 8


class Eager(nn.Module):
    def forward(self, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        logits = scale * images @ texts.T
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Model(nn.Module):
    """Two towers, a learned scale and the loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images, self.texts = nn.Linear(12, 16), nn.Linear(10, 16)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.loss = loss
        self.double()

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        images, texts = F.normalize(self.images(images), dim=1), F.normalize(self.texts(texts), dim=1)
        return self.loss(images, texts, self.log_scale.exp())


Run = tuple[list[float], dict[str, Tensor]]


def dataset() -> TensorDataset:
    return TensorDataset(torch.randn(N, 12, dtype=torch.float64), torch.randn(N, 10, dtype=torch.float64))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def assert_same(ours: Run, eager: Run, steps: int) -> None:
    """Asserts equal losses and final parameters, and that the parameters have changed."""
    assert len(eager[0]) == steps
    assert ours[0] == pytest.approx(eager[0], rel=1e-10)
    start = dict(Model(Eager()).named_parameters())
    for name, value in eager[1].items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(ours[1][name], value, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_lightning(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: make conformance")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, loss: nn.Module) -> None:
            super().__init__()
            self.model = Model(loss)
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            value = self.model(*batch)
            self.losses.append(value.item())
            return value

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    data = dataset()

    def run(loss: nn.Module) -> Run:
        module = Module(loss)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, BATCH))
        return module.losses, dict(module.model.named_parameters())

    assert_same(run(ClipLoss()), run(Eager()), steps=2 * N // BATCH)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: make conformance")
    data = dataset()

    def run(loss: nn.Module) -> Run:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        module, losses = Model(loss), []
        model, optimizer, loader = accelerator.prepare(module, sgd(module), DataLoader(data, BATCH))
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    value = model(*batch)
                    accelerator.backward(value)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(value.item())
        return losses, dict(module.named_parameters())

    assert_same(run(ClipLoss()), run(Eager()), steps=2 * N // BATCH)
