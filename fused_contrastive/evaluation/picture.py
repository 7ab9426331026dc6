"""The picture of a temperature sweep. Needs matplotlib, which the rest of the package does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fused_contrastive.evaluation.sweep import HARDEST, Row

INK, FAINT, ACCENT = "#1f2933", "#7b8794", "#7c3aed"
BANDS = ("#b91c1c", "#f97316", "#fcd34d", "#e2e8f0")  # hardest first, then all the rest
CURVES = 6  # temperatures shown one by one


def draw(file: Path, rows: Sequence[Row], n: int, mark: float | None) -> None:
    """Draws rows, one per temperature, of a set of n pairs; ``mark`` is the model's own temperature."""
    figure = Figure(figsize=(15, 5.6), dpi=120, facecolor="white", layout="constrained")
    figure.suptitle(
        "A smaller temperature trains on the hardest negatives, a larger one on all alike",
        fontsize=16, fontweight="bold", color=INK,
    )  # fmt: skip
    shares, effective, weights = figure.subplots(1, 3)
    _draw_shares(shares, rows, n)
    _draw_effective(effective, rows, n)
    _draw_weights(weights, rows, n)
    for axes in (shares, effective):
        _temperature_axis(axes, rows)
        if mark is not None:
            axes.axvline(mark, color=ACCENT, linewidth=1.8, linestyle="--")
    if mark is not None:
        effective.annotate(
            f"the model's own: {mark:.3g}", (mark, 0.02), xycoords=("data", "axes fraction"), xytext=(6, 0),
            textcoords="offset points", color=ACCENT, fontsize=10,
        )  # fmt: skip
    for axes in (shares, effective, weights):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=10)
    for axis in (effective.yaxis, weights.xaxis, weights.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.savefig(file)


def _temperature_axis(axes: Any, rows: Sequence[Row]) -> None:
    temperatures = [row.temperature for row in rows]
    axes.set_xscale("log")
    if len(rows) > 1:
        axes.set_xlim(temperatures[0], temperatures[-1])
    low, high = axes.get_xlim()
    ticks = [t for t in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10) if low <= t <= high] or temperatures
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("temperature", fontsize=12, color=INK)


def _title(axes: Any, title: str, y_label: str) -> None:
    axes.set_title(title, fontsize=12.5, color=INK, pad=10)
    axes.set_ylabel(y_label, fontsize=12, color=INK)


def _draw_shares(axes: Any, rows: Sequence[Row], n: int) -> None:
    """Bands: how much of the weight lies on the hardest 1, the next 9, the next 90, and the rest."""
    temperatures = [row.temperature for row in rows]
    edges = [[0.0] * len(rows), *([row.share(k) for row in rows] for k in HARDEST), [1.0] * len(rows)]
    names = ["the hardest negative", *(f"the next {b - a}" for a, b in itertools.pairwise(HARDEST))]
    names.append(f"the other {max(n - 1 - HARDEST[-1], 0)}")
    for (low, high), colour, name in zip(itertools.pairwise(edges), BANDS, names, strict=True):
        axes.fill_between(temperatures, low, high, color=colour, label=name, linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.legend(loc="upper right", fontsize=10, framealpha=0.92)
    _title(axes, "Which negatives carry the gradient", "share of the negatives' gradient")


def _draw_effective(axes: Any, rows: Sequence[Row], n: int) -> None:
    temperatures = [row.temperature for row in rows]
    axes.axhline(n - 1, color=FAINT, linestyle=":", linewidth=1.5)
    axes.annotate(
        f"all {n - 1}", (0.02, n - 1), xycoords=("axes fraction", "data"), xytext=(0, -13),
        textcoords="offset points", color=FAINT, fontsize=10,
    )  # fmt: skip
    axes.plot(temperatures, [row.effective for row in rows], color=INK, marker="o", markersize=4.5, linewidth=2)
    axes.set_yscale("log")
    axes.set_ylim(0.9, 1.5 * (n - 1))
    axes.grid(axis="y", color="#eef1f4")
    _title(axes, "How many negatives count", "effective negatives (perplexity of their weights)")


def _draw_weights(axes: Any, rows: Sequence[Row], n: int) -> None:
    """The mean weight of the 1st, 2nd, ... hardest negative, as a multiple of equal weights, at a few temperatures."""
    count = min(CURVES, len(rows))
    chosen = [rows[round(i * (len(rows) - 1) / max(count - 1, 1))] for i in range(count)]
    colours = colormaps["plasma"]
    for place, row in enumerate(chosen):
        weights = row.shares.diff(prepend=row.shares.new_zeros(1)) * (n - 1)
        axes.plot(
            range(1, len(weights) + 1), weights, color=colours(0.88 * place / max(count - 1, 1)), linewidth=2.2,
            label=f"{row.temperature:.3g}",
        )  # fmt: skip
    axes.axhline(1, color=FAINT, linestyle=":", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    top = axes.get_ylim()[1]
    axes.set_ylim(max(axes.get_ylim()[0], 1e-3), top)
    axes.legend(title="temperature", loc="upper right", fontsize=10)
    axes.grid(color="#eef1f4")
    axes.set_xlabel("negatives, from the hardest on", fontsize=12, color=INK)
    _title(axes, "The weight of each of them", f"times an equal share, 1 / {n - 1}")
