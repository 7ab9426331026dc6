"""What the emoji demo shows at its end: tables, a verdict and a picture."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from emoji_cost import LOSSES, Cost
from emoji_data import CREDIT, Pairs, picture
from emoji_train import Recall, Run, features

COMPARED_STEPS = 50
MONITORED = ("loss", "temperature", "top1", "hardest_share", "alignment", "uniformity")
MOST_DEVIATION = 1e-4  # largest relative difference of the losses over the first COMPARED_STEPS steps
LEAST_GAIN = 10  # least recall@1, as a multiple of chance
CARDS = (4, 3)  # rows and columns of the picture
SHOWN = 3  # captions per card
RIGHT, WRONG, INK, FAINT = "#2e9e5b", "#c9ced6", "#1f2933", "#7b8794"


class Scores(NamedTuple):
    """One model's recall with the held-out pairs as candidates, and with all pairs."""

    held_out: Recall
    among_all: Recall


class Costs(NamedTuple):
    """Costs of each loss at one batch size; None where the machine has too little memory for it."""

    rows: int
    by_loss: dict[str, Cost | None]


def deviation(runs: dict[str, Run], steps: int) -> float:
    """The largest relative difference between the two loss curves over the first steps."""
    pairs = list(zip(runs["fused"].losses, runs["eager"].losses, strict=True))[:steps]
    return max(abs(fused - eager) / abs(eager) for fused, eager in pairs)


def recall_table(scores: dict[str, Scores], held_out: int, everything: int) -> Table:
    table = Table(title=f"Retrieval of {held_out} held-out pairs: recall@1 / recall@5")
    table.add_column("query -> candidates")
    for name in scores:
        table.add_column(f"trained {name}", justify="right")
    table.add_column("chance", justify="right")
    settings = {"held-out": held_out, "all": everything}
    for index, (setting, candidates) in enumerate(settings.items()):
        for direction, (query, candidate) in enumerate((("image", "texts"), ("text", "images"))):
            cells = [percents(score[index][direction]) for score in scores.values()]
            chance = percents((1 / candidates, 5 / candidates), digits=2)
            table.add_row(f"{query} -> {candidates} {setting} {candidate}", *cells, chance)
    return table


def percents(shares: tuple[float, float], digits: int = 1) -> str:
    return " / ".join(f"{share:.{digits}%}" for share in shares)


def curve_table(runs: dict[str, Run]) -> Table:
    """Both trainings side by side."""
    steps = len(runs["fused"].losses)
    table = Table(title=f"The same training twice: {steps} steps each, same seed, same batches")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for step in sorted({1, min(COMPARED_STEPS, steps), steps}):
        table.add_row(f"loss at step {step}", *(f"{run.losses[step - 1]:.7f}" for run in runs.values()))
    table.add_row("learned temperature", *(f"{run.model.temperature:.5f}" for run in runs.values()))
    first = min(COMPARED_STEPS, steps)
    table.add_section()
    table.add_row(f"max relative difference, steps 1-{first}", f"{deviation(runs, first):.1e}", "")
    table.add_row(f"max relative difference, steps 1-{steps}", f"{deviation(runs, steps):.1e}", "")
    return table


def monitor_table(measures: list[dict[str, float]], every: int, warnings: int) -> Table:
    """What ``fused_contrastive.monitor`` measured at steps 1, every + 1, ... of the fused training."""
    table = Table(title=f"The monitor of the fused training; warnings: {warnings}")
    table.add_column("step", justify="right")
    for key in MONITORED:
        table.add_column(key.replace("_", " "), justify="right")
    for check, found in enumerate(measures):
        table.add_row(str(check * every + 1), *(f"{found[f'clip_loss/{key}']:.3f}" for key in MONITORED))
    return table


def cost_table(runs: dict[str, Run], all_costs: list[Costs]) -> Table:
    """Time and extra memory of the loss alone, forward and backward."""
    table = Table(title="The loss alone, forward + backward")
    table.add_column("batch", justify="right")
    table.add_column("measured")
    for name in LOSSES:
        table.add_column(name.replace(", ", ",\n"), justify="right")
    medians = {name: statistics.median(run.seconds) for name, run in runs.items()}
    times = [f"{medians[name] * 1e3:.0f} ms" if name in medians else "-" for name in LOSSES]
    training, large = all_costs
    table.add_row(str(training.rows), "time, median of the training's steps", *times)
    table.add_row("", "extra peak memory, fresh process", *map(megabytes, training.by_loss.values()))
    table.add_section()
    table.add_row(str(large.rows), "time of one call, fresh process", *map(seconds, large.by_loss.values()))
    table.add_row("", "extra peak memory, fresh process", *map(megabytes, large.by_loss.values()))
    return table


def megabytes(cost: Cost | None) -> str:
    return "not run" if cost is None else f"{cost.extra_bytes / 1e6:,.0f} MB"


def seconds(cost: Cost | None) -> str:
    return "not run" if cost is None else f"{cost.seconds:.1f} s"


def verdict(console: Console, runs: dict[str, Run], score: Recall, held_out: int) -> bool:
    """Prints and returns whether recall is high enough and the loss curves agree."""
    gains = [share[0] * held_out for share in score]
    first = min(COMPARED_STEPS, len(runs["fused"].losses))
    apart = deviation(runs, first)
    checks = {
        f"image -> text recall@1 is {gains[0]:.0f}x chance (at least {LEAST_GAIN}x)": gains[0] >= LEAST_GAIN,
        f"text -> image recall@1 is {gains[1]:.0f}x chance (at least {LEAST_GAIN}x)": gains[1] >= LEAST_GAIN,
        f"loss curves differ by {apart:.1e} over {first} steps (at most {MOST_DEVIATION:.0e})": apart <= MOST_DEVIATION,
    }
    for claim, holds in checks.items():
        console.print(f"{'[green]ok  ' if holds else '[red]FAIL'}[/] {claim}")
    return all(checks.values())


def draw(file: Path, run: Run, pairs: Pairs, held_out: Tensor, score: Recall, seed: int) -> None:
    """Cards of held-out images drawn at random, each with its top captions among all held-out ones."""
    images, texts = features(run.model, pairs, held_out)
    probabilities = (images @ texts.T / run.model.temperature).softmax(dim=1)  # (H, H)
    rows, columns = CARDS
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(held_out), generator=generator)[: rows * columns].tolist()
    figure = Figure(figsize=(15, 10), dpi=120, facecolor="white")
    header, body, footer = figure.subfigures(3, 1, height_ratios=[1.1, 8.5, 0.4])
    write_header(header, run, score, len(held_out))
    for card, index in zip(body.subfigures(rows, columns).flat, chosen, strict=True):
        captions = [pairs.captions[row] for row in held_out.tolist()]
        draw_card(card, pairs.files[int(held_out[index])], captions, probabilities[index], index)
    footer.text(0.5, 0.5, f"Emoji: {CREDIT}", ha="center", va="center", fontsize=9, color=FAINT)
    figure.savefig(file)


def write_header(header: SubFigure, run: Run, score: Recall, held_out: int) -> None:
    header.text(
        0.5,
        0.68,
        f"Emoji never seen in training, and their top {SHOWN} of {held_out} captions never seen in training",
        ha="center",
        va="center",
        fontsize=17,
        fontweight="bold",
        color=INK,
    )
    header.text(
        0.5,
        0.22,
        f"recall@1  image→text {score.image_to_text[0]:.0%},  text→image {score.text_to_image[0]:.0%}"
        f"  (chance {1 / held_out:.2%})     learned temperature {run.model.temperature:.4f}"
        f"  (logits x {1 / run.model.temperature:.1f})     {len(run.losses)} steps, fused loss",
        ha="center",
        va="center",
        fontsize=12,
        color=FAINT,
    )


def draw_card(card: SubFigure, file: Path, captions: list[str], probabilities: Tensor, right: int) -> None:
    """One held-out image and its top captions, out of (H,) probabilities; the right one in green."""
    image = card.add_axes((0.03, 0.1, 0.25, 0.8))
    image.imshow(picture(file), interpolation="lanczos")
    image.set_axis_off()
    bars = card.add_axes((0.31, 0.08, 0.66, 0.84))
    bars.set(xlim=(0, 1), ylim=(SHOWN, 0))
    bars.set_axis_off()
    top = probabilities.topk(SHOWN)
    for place, (probability, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
        draw_caption(bars, place, captions[index], probability, is_right=index == right)


def draw_caption(bars: Axes, place: int, caption: str, probability: float, *, is_right: bool) -> None:
    colour = RIGHT if is_right else WRONG
    text = "\n".join(textwrap.wrap(("✓ " if is_right else "") + caption, 46))
    bars.text(
        0,
        place + 0.52,
        text,
        fontsize=8.5,
        va="bottom",
        linespacing=1.05,
        color=RIGHT if is_right else INK,
        fontweight="bold" if is_right else "normal",
    )
    bars.barh(place + 0.68, 0.86, height=0.16, align="center", color="#eef1f4")
    bars.barh(place + 0.68, 0.86 * probability, height=0.16, align="center", color=colour)
    bars.text(1, place + 0.68, f"{probability:.0%}", fontsize=8, ha="right", va="center", color=FAINT)
