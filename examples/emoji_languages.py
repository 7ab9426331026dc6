"""Sentence embeddings with mined negatives and a large batch: which English emoji name translates a German one?

    pip install emoji
    python examples/emoji_languages.py

The names are those of the package ``emoji``. A tenth of them is held out; their words occur in training, in other
names. One transformer encodes both languages. Each epoch begins by mining: for each German name, ``rank`` finds the
best English name that is not its translation, such as that of another skin tone, and the loss takes it as one more
negative. ``cached`` encodes a batch chunk by chunk, so that the memory of the encoder does not grow with the batch.
Exits with 1 if fewer than half of the held-out names find their translation among all names.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from functools import partial

import emoji
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_contrastive import cached, info_nce_loss, rank, recall_at_k

WIDTH, LAYERS, TEMPERATURE, LEARNING_RATE, HELD_OUT_SHARE = 64, 1, 0.05, 5e-3, 0.1
Names = list[list[str]]  # the words of each name


class Encoder(nn.Module):
    """(N, L) word numbers, 0 where there is no word -> (N, WIDTH) unit features."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True)
        self.words = nn.Embedding(vocabulary, WIDTH, padding_idx=0)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        filler = words == 0
        hidden = self.layers(self.words(words), src_key_padding_mask=filler)
        return F.normalize(hidden.masked_fill(filler[..., None], 0).sum(dim=1), dim=-1)


def load_names() -> tuple[Names, Names]:
    """German and English names of the same emoji; of emoji with equal names, the first."""
    emoji.config.load_language("de")
    found: dict[str, str] = {}
    for entry in emoji.EMOJI_DATA.values():
        if entry["status"] == emoji.STATUS["fully_qualified"] and "de" in entry and entry["de"] not in found.values():
            found.setdefault(entry["en"], entry["de"])
    german, english = ([re.findall(r"[^_,:]+", name.lower()) for name in names] for names in (found.values(), found))
    return german, english


def numbered(names: Names, numbers: dict[str, int]) -> Tensor:
    """Names -> (N, L) word numbers, padded with 0."""
    return nn.utils.rnn.pad_sequence([torch.tensor([numbers[w] for w in name]) for name in names], batch_first=True)


def hold_out(german: Names, english: Names, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to train on, and those of held-out names, each word of which stays in a name of the training."""
    counts = [Counter(word for name in names for word in set(name)) for names in (german, english)]
    rows, train, held_out = list(range(len(english))), [], []
    random.Random(seed).shuffle(rows)
    for row in rows:
        words = [
            (count, word) for count, name in zip(counts, (german[row], english[row]), strict=True) for word in set(name)
        ]
        if len(held_out) < HELD_OUT_SHARE * len(rows) and all(count[word] > 3 for count, word in words):
            held_out.append(row)
            for count, word in words:
                count[word] -= 1
        else:
            train.append(row)
    return torch.tensor(train), torch.tensor(held_out)


def hardest(queries: Tensor, names: Tensor) -> Tensor:
    """For each query the row of the most similar name that is not its own."""
    best = rank(queries, names, 2).indices
    return torch.where(best[:, 0] == torch.arange(len(best)), best[:, 1], best[:, 0])


def contrast(rows: Tensor, mined: Tensor, query: Tensor, key: Tensor, negatives: Tensor) -> Tensor:
    """A mined name may be the translation of another name of the batch: pairs with equal row numbers are left out."""
    ids = torch.cat((rows, mined))
    return info_nce_loss(query, key, negatives=negatives, row_ids=rows, col_ids=ids, temperature=TEMPERATURE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="pairs in a batch (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=128, help="names encoded at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    names = load_names()
    vocabulary = sorted({word for language in names for name in language for word in name})
    numbers = {word: number for number, word in enumerate(vocabulary, start=1)}
    german, english = (numbered(language, numbers) for language in names)
    train, held_out = hold_out(*names, options.seed)
    print(f"{len(train)} pairs to train on, {len(held_out)} held out, {len(vocabulary)} words")

    encoder = Encoder(len(vocabulary) + 1)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE)
    recall = 0.0
    for epoch in range(1, options.epochs + 1):
        encoder.eval()
        with torch.no_grad():
            mined = train[cached(encoder, (german[train], english[train]), hardest, options.chunk)]
        encoder.train()
        losses = []
        for places in torch.randperm(len(train)).split(options.batch):
            rows, hard = train[places], mined[places]
            loss = cached(
                encoder, (german[rows], english[rows], english[hard]), partial(contrast, rows, hard), options.chunk
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        encoder.eval()
        with torch.no_grad():
            recall = cached(
                encoder, (german[held_out], english), lambda q, c: recall_at_k(q, c, (1,), targets=held_out)[1],
                options.chunk,
            )  # fmt: skip
        print(f"epoch {epoch:2}: loss {sum(losses) / len(losses):.3f}, recall@1 of held-out names {recall:.1%}")
    for k in torch.randperm(len(train))[:3].tolist():
        print(f"mined for {' '.join(names[0][int(train[k])])!r}: {' '.join(names[1][int(mined[k])])!r}")
    print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
    return 0 if recall >= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
