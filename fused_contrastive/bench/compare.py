"""Two reports of the same machine: what became slower in u, beyond noise."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fused_contrastive.bench.provenance import line
from fused_contrastive.bench.workloads import Problem, problem_of

TOLERANCE = 0.15  # what two honest runs differ by: placement in memory, clocks
CONTROL = "eager"  # whose own change between the runs is not the change of anything here
CHECKED_BY = "ours, backend=reference"  # told of, no failure: its time is page faults, or none if malloc keeps memory
RESAMPLES = 400
FEWEST = 5  # rounds: of three, a median's interval is the three themselves
FIELDS = ("loss", "dtype", "d", "n", "device", "implementation", "ours", "status")


class Change(NamedTuple):
    """One row of both reports. ``low`` and ``high`` hold the ratio of the medians, 90% of the time.

    ``controls`` are the ratios of what is not ours, measured in the same rounds: eager PyTorch on the same problem and
    the vendor's bfloat16 product of ``timing.probe``. What they went through as well, a busier machine or a unit of a
    few microseconds that came out otherwise, is noise: slower is slower by itself and by each of them.
    """

    what: str
    counts: bool  # whether a slowdown is a failure
    old: float
    new: float
    low: float
    high: float
    controls: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        return self.new / self.old

    def verdict(self, tolerance: float) -> str:
        controls = (1.0, *self.controls)
        if self.low / max(controls) > 1 + tolerance:
            return "slower"
        return "faster" if self.high / min(controls) < 1 / (1 + tolerance) else ""


def load(path: Path) -> dict[str, Any]:
    """A report, or ValueError that says what the file is instead."""
    try:
        report = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got no JSON ({error}), expected a report of `bench`") from None
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise ValueError(f"{path}: got JSON without rows, expected a report of `bench`")
    for place, fields in ((report, ("command", "provenance")), *((row, FIELDS) for row in report["rows"])):
        if missing := [name for name in fields if name not in place]:
            raise ValueError(f"{path}: got no {missing[0]!r}, expected a report of this version's `bench`")
    return report


def _measured(report: dict[str, Any]) -> dict[tuple[Problem, str], dict[str, Any]]:
    """The rows that were timed, by problem and implementation."""
    return {(problem_of(row), row["implementation"]): row for row in report["rows"] if "rounds" in row}


def _medians(rounds: list[float], draw: random.Random) -> list[float]:
    return [statistics.median(draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES)]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Of all rows that both have measured."""
    draw = random.Random(0)
    before, after = _measured(old), _measured(new)
    found = []
    for (problem, name), row in after.items():
        was = before.get((problem, name))
        if was is None or min(len(was["rounds"]), len(row["rounds"])) < FEWEST:
            continue
        ratios = sorted(
            b / a for a, b in zip(_medians(was["rounds"], draw), _medians(row["rounds"], draw), strict=True)
        )
        edge = RESAMPLES // 20
        medians = (was["both"]["median"], row["both"]["median"])
        controls = [row["probe"] / was["probe"]] if "probe" in was and "probe" in row else []
        eager = (problem, CONTROL)
        if eager in before and eager in after and name != CONTROL:
            controls.append(after[eager]["both"]["median"] / before[eager]["both"]["median"])
        interval = (ratios[edge], ratios[-edge - 1])
        counts = row["ours"] and name != CHECKED_BY
        found.append(Change(f"{problem}: {name}", counts, *medians, *interval, tuple(controls)))
    return found


def lost(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of ours was measured in the old report and could not be in the new one."""
    before = _measured(old)
    return [
        f"{problem_of(row)}: {row['implementation']}: {row['status']}"
        for row in new["rows"]
        if row["ours"] and row["status"] != "ok" and (problem_of(row), row["implementation"]) in before
    ]


def compare(old: Path, new: Path, tolerance: float, console: Console) -> int:
    """Prints what changed; 1 if something of ours became slower, 2 if there is nothing to compare."""
    reports = load(old), load(new)
    for name, report in zip((old, new), reports, strict=True):
        console.print(f"{name}: {line(report['provenance'])}", markup=False)
    for what in ("machine", "torch"):
        one, other = (report["provenance"].get(what) for report in reports)
        if one != other:
            console.print(f"{what}: {one} and {other}, so u itself differs", style="yellow", markup=False)
    found = changes(*reports)
    if not found:
        console.print(f"No row of at least {FEWEST} rounds is in both reports.", style="red")
        return 2
    told = [change for change in found if change.verdict(tolerance)]
    if told:
        table = Table("", "old, u", "new, u", "new / old", "90% interval", "")
        for c in sorted(told, key=lambda c: -c.ratio):
            style = "red" if c.counts and c.verdict(tolerance) == "slower" else None
            cells = (
                f"{c.old:.2f}",
                f"{c.new:.2f}",
                f"{c.ratio:.2f}",
                f"{c.low:.2f}..{c.high:.2f}",
                c.verdict(tolerance),
            )
            table.add_row(c.what, *cells, style=style)
        console.print(table)
    regressions = [change for change in told if change.counts and change.verdict(tolerance) == "slower"]
    console.print(
        f"{len(found)} rows compared; beyond noise and {tolerance:.0%}: {len(told)} changed, "
        f"{len(regressions)} of ours slower."
    )
    for row in (gone := lost(*reports)):
        console.print(f"no longer measured: {row}", style="red", markup=False)
    return 1 if regressions or gone else 0
