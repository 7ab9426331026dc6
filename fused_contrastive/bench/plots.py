"""Time and memory: of every loss against N, log-log; and of CLIP at its largest N, as bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


OURS = ("tab:blue", "tab:orange", "tab:purple")
OTHERS = (
    "tab:red", "tab:green", "tab:brown", "tab:pink", "tab:gray", "tab:olive", "tab:cyan", "gold", "black", "lime",
    "lightcoral", "navy", "peru", "teal",
)  # fmt: skip


def _colours(names: list[str]) -> dict[str, str]:
    ours = [name for name in names if name.startswith("ours")]
    others = [name for name in names if not name.startswith("ours")]
    return {
        **{name: OURS[k % len(OURS)] for k, name in enumerate(ours)},
        **{name: OTHERS[k % len(OTHERS)] for k, name in enumerate(others)},
    }


def draw(rows: list[Row], path: Path) -> bool:
    """A panel for each loss, dtype and D with at least two sizes. False: there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, pyplot

    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for quantity, label, unit in (
            ("seconds", "forward + backward, ms", 1e-3),
            ("extra_bytes", "extra memory, MB", 2**20),
        ):
            if row["status"] == "ok" and row.get(quantity, 0) > 0:
                title = f"{row['loss']}, {row['dtype']}, D = {row['d']}"
                panel = panels.setdefault((title, label), {})
                panel.setdefault(row["implementation"], []).append((row["n"], row[quantity] / unit))
    wanted = {key: p for key, p in panels.items() if len({n for points in p.values() for n, _ in points}) > 1}
    if not wanted:
        return False
    wanted = dict(sorted(wanted.items(), key=lambda item: "memory" not in item[0][1]))  # memory first
    names = sorted({name for p in wanted.values() for name in p}, key=lambda name: (not name.startswith("ours"), name))
    colours = _colours(names)
    columns = min(3, len(wanted))
    down = -(-len(wanted) // columns)
    figure, axes = pyplot.subplots(down, columns, figsize=(5 * columns, 3.6 * down), squeeze=False)
    for axis, ((title, label), panel) in zip(axes.flat, wanted.items(), strict=False):
        for name, points in panel.items():
            ours = name.startswith("ours")
            style = {"linewidth": 2.4 if ours else 1.0, "zorder": 3 if ours else 2}
            axis.plot(
                *zip(*sorted(points), strict=True), marker="o", markersize=3, color=colours[name], label=name, **style
            )
        axis.set(title=title, yscale="log", xlabel="N", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(wanted) :]:
        axis.axis("off")
    handles = [lines.Line2D([], [], color=colours[name], marker="o", markersize=3, label=name) for name in names]
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=8, frameon=False)
    legend = 0.1 + 0.18 * -(-len(names) // 3)  # inches
    figure.tight_layout(rect=(0, legend / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def draw_largest(rows: list[Row], path: Path) -> bool:
    """Time and memory of the CLIP loss in fp32 as bars, at the largest N that has both. False: there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        if (row["loss"], row["dtype"], row["status"]) == ("clip", "fp32", "ok"):
            cells = found.setdefault((row["n"], row["d"]), {}).setdefault(row["implementation"], {})
            if "seconds" in row:
                cells["seconds"] = row["seconds"]
            if row.get("extra_bytes", 0) > 0:
                cells["MB"] = row["extra_bytes"] / 2**20
    whole = {key: {name: cells for name, cells in bars.items() if len(cells) == 2} for key, bars in found.items()}
    sizes = [key for key, bars in whole.items() if len(bars) > 1]
    if not sizes:
        return False
    n, d = max(sizes)
    bars = whole[n, d]
    names = sorted(bars, key=lambda name: (not name.startswith("ours"), bars[name]["MB"]))
    colours = ["tab:blue" if name.startswith("ours") else "silver" for name in names]
    figure, axes = pyplot.subplots(1, 2, figsize=(6.4, 0.6 + 0.27 * len(names)), sharey=True)
    for axis, unit, title, shown in zip(
        axes, ("seconds", "MB"), ("time of a step, seconds", "extra memory, MB"), ("%.2f", "%.0f"), strict=True
    ):
        values = [bars[name][unit] for name in names]
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
    return True
