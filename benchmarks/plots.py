"""Pictures of a report: time and memory of every loss against N, and bars of both for CLIP at its largest N."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
QUANTITIES = (("extra_bytes", "extra memory, MB", 2**20), ("seconds", "forward + backward, ms", 1e-3))


def ours_first(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (not name.startswith("ours"), name))


def draw(rows: list[Row], path: Path) -> list[Path]:
    """A panel for each loss, dtype, D and quantity with at least two sizes. Returns the files that it wrote."""
    from matplotlib import pyplot

    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for quantity, label, unit in QUANTITIES:
        for row in rows:
            if row["status"] == "ok" and row.get(quantity, 0) > 0:
                panel = panels.setdefault((f"{row['loss']}, {row['dtype']}, D = {row['d']}", label), {})
                panel.setdefault(row["implementation"], []).append((row["n"], row[quantity] / unit))
    panels = {key: p for key, p in panels.items() if len({n for points in p.values() for n, _ in points}) > 1}
    if not panels:
        return []
    names = ours_first({name for panel in panels.values() for name in panel})
    colours = {name: pyplot.get_cmap("tab20")(k % 20) for k, name in enumerate(names)}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    shown = {}
    for axis, ((title, label), panel) in zip(axes.flat, panels.items(), strict=False):
        for name in ours_first(set(panel)):
            ours = name.startswith("ours")
            x, y = zip(*sorted(panel[name]), strict=True)
            style = {"linewidth": 2.4 if ours else 1.0, "zorder": 3 if ours else 2, "color": colours[name]}
            (shown[name],) = axis.plot(x, y, marker="o", markersize=3, **style)
        axis.set(title=title, yscale="log", xlabel="N", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend([shown[name] for name in names], names, loc="lower center", ncols=3, fontsize=8, frameon=False)
    legend = 0.1 + 0.18 * -(-len(names) // 3)  # inches
    figure.tight_layout(rect=(0, legend / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return [path]


def bars(rows: list[Row], path: Path) -> list[Path]:
    """Time and memory of the CLIP loss in fp32, at the largest N that has both for two implementations."""
    from matplotlib import pyplot

    found: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        if (row["loss"], row["dtype"], row["status"]) == ("clip", "fp32", "ok"):
            cells = found.setdefault((row["n"], row["d"]), {}).setdefault(row["implementation"], {})
            cells |= {quantity: row[quantity] for quantity, _, _ in QUANTITIES if row.get(quantity, 0) > 0}
    whole = {key: {name: cells for name, cells in by.items() if len(cells) == 2} for key, by in found.items()}
    sizes = [key for key, by_name in whole.items() if len(by_name) > 1]
    if not sizes:
        return []
    (n, d), by_name = max(sizes), whole[max(sizes)]
    names = sorted(by_name, key=lambda name: (not name.startswith("ours"), by_name[name]["extra_bytes"]))
    colours = ["tab:blue" if name.startswith("ours") else "silver" for name in names]
    figure, axes = pyplot.subplots(1, 2, figsize=(6.4, 0.6 + 0.27 * len(names)), sharey=True)
    for axis, quantity, title, unit, shown in (
        (axes[0], "seconds", "time of a step, seconds", 1, "%.2f"),
        (axes[1], "extra_bytes", "extra memory, MB", 2**20, "%.0f"),
    ):
        values = [by_name[name][quantity] / unit for name in names]
        axis.bar_label(axis.barh(names, values, color=colours), fmt=shown, padding=3, fontsize=9)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.25 * max(values))
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(bottom=False, labelbottom=False, left=False, labelsize=9)
    axes[0].invert_yaxis()
    figure.suptitle(f"CLIP loss, forward + backward, N = {n}, D = {d}, fp32", fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)
    return [path]
