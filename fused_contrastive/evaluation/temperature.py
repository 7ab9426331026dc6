"""``python -m fused_contrastive temperature``: loss and weights of the negatives at each of several temperatures.

A smaller temperature concentrates the gradient on the hardest negatives: docs/temperature.md explains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fused_contrastive.core.errors import InputError
from fused_contrastive.core.files import load_pairs
from fused_contrastive.core.terminal import Terminal
from fused_contrastive.evaluation.sweep import HARDEST, Row, sweep

TEMPERATURES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)


def show(rows: Sequence[Row], n: int, terminal: Terminal) -> None:
    """Prints the table, one line for each temperature."""
    columns = ("temperature", "scale", "loss", "effective negatives", *(f"hardest {k}" for k in HARDEST))
    cells = [
        (
            *(f"{row.temperature:.4g}", f"{1 / row.temperature:.4g}", f"{row.loss:.4f}", f"{row.effective:.1f}"),
            *(f"{row.share(k):.1%}" for k in HARDEST),
        )
        for row in rows
    ]
    title = f"{n} pairs: how a row's {n - 1} negatives share its gradient"
    terminal.table(title, columns, cells, right=range(len(columns)))


def run(
    x_path: Path, y_path: Path, temperatures: Sequence[float], out: Path | None, mark: float | None, terminal: Terminal
) -> None:
    """Prints the table for two .npy files of (N, D) pairs, and draws the picture if ``out`` is given.

    Raises: InputError for a file that cannot be used, a picture that cannot be written, and without matplotlib for it.
    """
    if out is not None:
        if not out.absolute().parent.is_dir():
            raise InputError(f"--out: got {out}, expected a file in a folder that exists")
        if out.is_dir():
            raise InputError(f"--out: got {out}, a folder, expected a picture file")
        out = out if out.suffix else out.with_suffix(".png")
        try:  # imported before the work, which would be lost without matplotlib
            from fused_contrastive.evaluation import picture
        except ModuleNotFoundError as error:
            raise InputError(
                f"the picture needs the package {error.name!r}: pip install matplotlib, or --no-picture for the table"
            ) from error
    x, y = load_pairs(x_path, y_path)
    rows = sweep(x, y, [*temperatures, *([] if mark is None else [mark])])
    show(rows, len(x), terminal)
    note = "features normalised; scale = 1 / temperature; loss: CLIP's; shares are means over rows and directions"
    terminal.say(note, style="dim")
    if out is not None:
        try:
            picture.draw(out, rows, len(x), mark)
        except (OSError, ValueError) as error:  # a folder, no permission, a format that matplotlib does not have
            raise InputError(f"--out: got {out} ({error}), expected a picture file that can be written") from error
        terminal.say(f"picture: {out}")
