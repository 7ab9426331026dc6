"""Training of the emoji demo: two copies of one model in lockstep, one per loss, on the same batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from emoji_cost import LOSSES, loss_and_gradients
from emoji_data import Pairs, Split
from emoji_model import EmojiClip
from fused_contrastive import clip_loss, recall_at_k

LEARNING_RATE = 3e-3
SCALE_LEARNING_RATE = 1e-2  # the temperature is one number and has far to go
WEIGHT_DECAY = 0.05
WARM_UP = 20  # steps
TRAINED = ("fused", "eager")


class Recall(NamedTuple):
    """recall@1 and recall@5 of the held-out pairs, image to text and text to image."""

    image_to_text: tuple[float, float]
    text_to_image: tuple[float, float]


class Run:
    """One model, its optimiser and its loss, with what each step measured."""

    def __init__(self, model: EmojiClip, loss_name: str, steps: int) -> None:
        self.model = model
        self.loss = self._loss_with_accuracy if loss_name == "fused" else LOSSES[loss_name]
        self.accuracy = 0.0  # of the last step: the share of images and texts whose partner is the first of the batch
        self.losses: list[float] = []
        self.seconds: list[float] = []  # each step's forward and backward of the loss alone
        encoders = [*model.image_encoder.parameters(), *model.text_encoder.parameters()]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": encoders, "weight_decay": WEIGHT_DECAY, "lr": LEARNING_RATE},
                {"params": [model.log_scale], "weight_decay": 0.0, "lr": SCALE_LEARNING_RATE},
            ]
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: rate(step, steps))

    def _loss_with_accuracy(self, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        loss, metrics = clip_loss(images, texts, scale, metrics=True)
        self.accuracy = metrics.top1.item()
        return loss

    def step(self, images: Tensor, words: Tensor) -> None:
        """One update from N images (N, 3, SIZE, SIZE) and N captions (N, L).

        The loss runs on detached features, so that its own forward and backward can be timed.
        """
        outputs = self.model(images, words)
        loss, gradients, seconds = loss_and_gradients(self.loss, outputs)
        self.optimiser.zero_grad()
        torch.autograd.backward(outputs, gradients)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(seconds)


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: a linear warm-up, then a cosine down to nearly nothing."""
    progress = max(step - WARM_UP, 0) / max(steps - WARM_UP, 1)
    return min((step + 1) / WARM_UP, 1.0) * (0.51 + 0.49 * math.cos(math.pi * progress))


def batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers (size,) without end: each pass shuffles the rows and leaves out an incomplete last batch."""
    while True:
        for chunk in rows[torch.randperm(len(rows), generator=generator)].split(size):
            if len(chunk) == size:
                yield chunk


def train(
    pairs: Pairs, split: Split, steps: int, batch: int, seed: int, report: Callable[[dict[str, Run]], None]
) -> dict[str, Run]:
    """Train one copy of a freshly drawn model per loss; ``report`` is called after every step.

    The copies take turns at going first, so that neither always finds the caches as the other's step left them.
    """
    torch.manual_seed(seed)
    model = EmojiClip(pairs.vocabulary)
    runs = {name: Run(copy.deepcopy(model), name, steps) for name in TRAINED}
    order = list(runs.values())
    generator = torch.Generator().manual_seed(seed)
    for rows in islice(batches(split.train, batch, generator), steps):
        for run in order:
            run.step(pairs.images[rows], pairs.words[rows])
        order.reverse()
        report(runs)
    return runs


@torch.no_grad()
def features(model: EmojiClip, pairs: Pairs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) row numbers -> the unit features (R, FEATURES) of their images and of their texts."""
    images, texts, _ = model(pairs.images[rows], pairs.words[rows])
    return images, texts


def recall(queries: Tensor, candidates: Tensor, right: Tensor) -> tuple[float, float]:
    """(Q, D) queries, (C, D) candidates and the (Q,) right ones -> recall@1 and recall@5."""
    shares = recall_at_k(queries, candidates, (1, 5), targets=right)
    return shares[1], shares[5]


def held_out_recall(model: EmojiClip, pairs: Pairs, held_out: Tensor) -> Recall:
    """Rank H unseen images against H unseen texts, and the reverse."""
    images, texts = features(model, pairs, held_out)
    right = torch.arange(len(held_out))
    return Recall(recall(images, texts, right), recall(texts, images, right))


def recall_among_all(model: EmojiClip, pairs: Pairs, held_out: Tensor) -> Recall:
    """The harder task: rank all P texts or images, the training pairs' included, for each of H unseen queries."""
    images, texts = features(model, pairs, torch.arange(len(pairs.captions)))
    return Recall(recall(images[held_out], texts, held_out), recall(texts[held_out], images, held_out))
