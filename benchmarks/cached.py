"""Peak memory and time of a training step against the batch size: the whole batch at once, or in chunks (GradCache).

    python -m benchmarks.cached [--batch 256 512 1024] [--chunk 64]

A transformer encodes queries and passages of 32 tokens (2 layers, width 128), and the loss is InfoNCE.
sentence-transformers' CachedMultipleNegativesRankingLoss is listed where it is installed. Each number comes from a
process of its own, in which losses and gradients are first compared at a small batch. Memory beyond the parameters, the
inputs and the gradients; Linux, on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.memory import rise
from benchmarks.provenance import line, provenance
from benchmarks.report import table
from fused_contrastive import cached, info_nce_loss

WORDS, TOKENS, WIDTH, LAYERS, SCALE = 1000, 32, 128, 2, 20.0
SMALL = 16  # rows of the comparison
Step = Callable[[Tensor, Tensor], Tensor]
LOSS = partial(info_nce_loss, logit_scale=SCALE, normalize=True)


class Encoder(nn.Module):
    """(N, TOKENS) word ids -> (N, WIDTH) features."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.layers(self.words(ids)).mean(dim=1)
        return features


class ForSentenceTransformers(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def __getitem__(self, _: int) -> Encoder:
        return self.encoder

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.encoder(batch["input_ids"])}


def whole_batch(encoder: Encoder, _: int) -> Step:
    return lambda queries, passages: LOSS(encoder(queries), encoder(passages))


def ours(encoder: Encoder, chunk: int) -> Step:
    return lambda queries, passages: cached(encoder, (queries, passages), LOSS, chunk)


def of_sentence_transformers(encoder: Encoder, chunk: int) -> Step:
    from sentence_transformers.sentence_transformer import losses

    model = ForSentenceTransformers(encoder)
    loss = losses.CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=chunk)
    return lambda *columns: loss([{"input_ids": ids} for ids in columns], None)


STEPS: dict[str, Callable[[Encoder, int], Step]] = {
    "the whole batch": whole_batch,
    "**ours, cached**": ours,
    "sentence-transformers, cached": of_sentence_transformers,
}


def measure(name: str, batch: int, chunk: int) -> tuple[float, float]:
    """Seconds of a step, and bytes that the peak of memory rises by in it."""
    torch.manual_seed(0)
    encoder = Encoder()
    step, expected = STEPS[name](encoder, chunk), STEPS["the whole batch"](encoder, 0)
    gradients = []
    for each in (expected, step):
        torch.manual_seed(1)
        loss = each(*(torch.randint(WORDS, (SMALL, TOKENS)) for _ in range(2)))
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)])
        encoder.zero_grad(set_to_none=False)  # memory for the gradients stays
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    columns = [torch.randint(WORDS, (batch, TOKENS)) for _ in range(2)]
    start = time.perf_counter()
    peak, _ = rise(lambda: step(*columns).backward(), "cpu")
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024], help="rows of a batch")
    parser.add_argument("--chunk", type=int, default=64, help="rows of a chunk")
    options = parser.parse_args()
    names = [name for name in STEPS if "sentence" not in name or importlib.util.find_spec("sentence_transformers")]
    rows: dict[str, list[list[str]]] = {"MB": [], "seconds": []}
    for name in names:
        measured = []
        for batch in options.batch:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(measure, (name, batch, options.chunk)))
        rows["MB"].append([name, *(f"{peak / 1e6:.0f}" for _, peak in measured)])
        rows["seconds"].append([name, *(f"{seconds:.2f}" for seconds, _ in measured)])
    print(line(provenance()))
    for unit, lines in rows.items():
        print(f"\n{unit} of a step, in chunks of {options.chunk} rows\n")
        print("\n".join(table(["batch", *map(str, options.batch)], lines)))


if __name__ == "__main__":
    main()
