"""The two encoders of the emoji demo, small enough for a laptop's CPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emoji_data import SIZE

FEATURES = 128
INITIAL_TEMPERATURE = 0.07  # as CLIP starts


def convolution(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False),
        nn.GroupNorm(4, outputs),
        nn.GELU(),
    )


class ImageEncoder(nn.Module):
    """(N, 3, SIZE, SIZE) uint8 -> (N, FEATURES): 4 x 4 patches, two convolutions, one linear layer on the whole map."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        side = math.ceil(SIZE / 4 / 2)
        self.layers = nn.Sequential(
            convolution(3, width, kernel=4, stride=4, padding=0),
            convolution(width, 2 * width, kernel=3, stride=2, padding=1),
            convolution(2 * width, 4 * width, kernel=3, stride=1, padding=1),
            nn.Flatten(),
            nn.Linear(4 * width * side * side, FEATURES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 127.5 - 1)


class TextEncoder(nn.Module):
    """(N, L) word numbers -> (N, FEATURES): each word reads its two neighbours, then the words are averaged.

    One table for a word itself and one for each side make the order of the words count.
    """

    def __init__(self, vocabulary: int, width: int = 256) -> None:
        super().__init__()
        self.before = nn.Embedding(vocabulary, width)
        self.itself = nn.Embedding(vocabulary, width)
        self.after = nn.Embedding(vocabulary, width)
        for table in (self.before, self.itself, self.after):
            nn.init.normal_(table.weight, std=0.5)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, FEATURES))

    def forward(self, words: Tensor) -> Tensor:
        padded = F.pad(words, (1, 1))  # (N, L + 2)
        readings = self.before(padded[:, :-2]) + self.itself(words) + self.after(padded[:, 2:])
        present = (words > 0).unsqueeze(-1)  # (N, L, 1)
        total = (F.gelu(readings) * present).sum(dim=1)  # (N, width)
        return self.head(total / present.sum(dim=1))


class EmojiClip(nn.Module):
    """Both encoders and the learned temperature."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder()
        self.text_encoder = TextEncoder(vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N images and N captions -> (N, FEATURES) and (N, FEATURES) of unit length, and the 0-d logit scale."""
        image_features = F.normalize(self.image_encoder(images), dim=1)
        text_features = F.normalize(self.text_encoder(words), dim=1)
        return image_features, text_features, self.log_scale.exp()

    @property
    def temperature(self) -> float:
        return math.exp(-self.log_scale.item())
