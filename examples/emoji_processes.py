"""The emoji demo's training in several processes, each with its part of every batch, against one with the whole batch.

    python examples/emoji_processes.py                                            # starts 2 processes itself
    torchrun --nproc-per-node 2 examples/emoji_processes.py                       # uses the processes of torchrun

Model, optimiser and data are the same as in emoji_clip.py; the model is wrapped in DistributedDataParallel, and the
loss gets ``group=``: that is all that changes. DDP averages the processes' gradients, and the average is the gradient
of the loss of the whole batch. The first process trains a second copy alone on the whole batches. Exits with 1 if the
two loss curves differ, or if the loss does not halve.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from itertools import islice

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import emoji_data
from emoji_model import EmojiClip
from emoji_train import LEARNING_RATE, batches, rate
from fused_contrastive import GlobalBatch, clip_loss


def train(
    model: nn.Module, pairs: emoji_data.Pairs, rows_of_steps: list[Tensor], group: GlobalBatch | None
) -> list[float]:
    """Trains the model and returns each step's loss, which is of the whole batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, len(rows_of_steps)))
    losses = []
    for rows in rows_of_steps:
        loss = clip_loss(*model(pairs.images[rows], pairs.words[rows]), group=group)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def work(options: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = emoji_data.load_pairs()
    split = emoji_data.hold_out(pairs, 0.1, options.seed)
    torch.manual_seed(options.seed)
    model = EmojiClip(pairs.vocabulary)
    alone = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(options.seed)
    steps = list(islice(batches(split.train, options.batch, generator), options.steps))
    own = [rows.tensor_split(world)[rank] for rows in steps]  # sizes differ if the batch does not divide evenly
    losses = train(DistributedDataParallel(model), pairs, own, GlobalBatch(exchange=options.exchange))
    if rank == 0:
        expected = train(alone, pairs, steps, None)
        difference = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        for step in (0, options.steps // 2, options.steps - 1):
            print(f"step {step + 1:3}: {world} processes {losses[step]:.6f}, one {expected[step]:.6f}")
        print(f"largest relative difference over {options.steps} steps: {difference:.1e} (at most 1e-03)")
        learned = losses[-1] < losses[0] / 2
        if difference > 1e-3 or not (learned or options.any_loss):
            raise SystemExit(1)


def spawned(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // options.processes))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.processes)
    work(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="processes to start (default %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of the training (default %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=1001, help="pairs in a batch of all processes (default %(default)s)"
    )
    parser.add_argument("--exchange", choices=["auto", "gather", "ring"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--any-loss", action="store_true", help="do not fail if the loss does not halve")
    options = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(spawned, (options, folder), nprocs=options.processes)
        except torch.multiprocessing.ProcessExitedException as error:
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
