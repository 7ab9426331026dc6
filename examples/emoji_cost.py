"""The cost of the loss alone: time and extra resident memory, each measured in a fresh process.

Run as ``python emoji_cost.py LOSS ROWS FEATURES THREADS``; prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_contrastive import clip_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
EAGER_MATRICES = 5  # N x N float32 matrices to allow for the eager loss: it holds four at once, and one is a reserve


def eager_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The CLIP loss as usually written: (N, D), (N, D), 0-d -> 0-d, through the (N, N) logits."""
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LOSSES: dict[str, Loss] = {
    "eager": eager_clip_loss,
    "fused": clip_loss,
    "fused, budget 0": partial(clip_loss, memory_budget=0),
}


class Cost(NamedTuple):
    seconds: float  # forward and backward, once
    extra_bytes: int  # peak resident memory above what was there before


def loss_and_gradients(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """The loss at (N, D), (N, D) and 0-d inputs, its gradient for each input, and the seconds that both took."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    start = time.perf_counter()
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return value.detach(), gradients, time.perf_counter() - start


def memory_line(file: str, key: str) -> int:
    """Bytes in the line ``key: 123 kB`` of a file under /proc."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no line {key!r}; measuring memory needs Linux")


def measure_here(loss: Loss, rows: int, features: int) -> Cost:
    """The cost at (rows, features) random inputs; a small call comes first to load what the process needs anyway."""
    generator = torch.Generator().manual_seed(0)

    def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
        image_features, text_features = F.normalize(torch.randn(2, n, features, generator=generator), dim=2)
        return image_features, text_features, torch.tensor(20.0)

    loss_and_gradients(loss, inputs(64))
    full = inputs(rows)
    before = memory_line("/proc/self/status", "VmRSS")
    *_, seconds = loss_and_gradients(loss, full)
    return Cost(seconds, memory_line("/proc/self/status", "VmHWM") - before)


def measure(name: str, rows: int, features: int, threads: int) -> Cost:
    """``measure_here`` in a fresh process."""
    command = [sys.executable, __file__, name, str(rows), str(features), str(threads)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Cost(**json.loads(answer))


def eager_needs(rows: int) -> int:
    """Bytes that the eager loss takes at its peak."""
    return EAGER_MATRICES * rows * rows * 4


def available_memory() -> int:
    return memory_line("/proc/meminfo", "MemAvailable")


if __name__ == "__main__":
    chosen, row_count, feature_count, thread_count = sys.argv[1:]
    torch.set_num_threads(int(thread_count))
    print(json.dumps(measure_here(LOSSES[chosen], int(row_count), int(feature_count))._asdict()))
