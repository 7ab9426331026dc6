"""Compares reports of one machine, before a change and after: what became slower in u, beyond noise.

u is the time of the vendor's product of all similarities. A side is one report, or a folder of reports whose rounds are
put together. On a machine that others use too, make the reports of both sides in turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.provenance import line
from benchmarks.report import Report, load, table
from benchmarks.timing import quantile
from benchmarks.workloads import BenchProblem, problem_of
from fused_contrastive.core.errors import InputError

TOLERANCE = 0.15  # half of the slowdown of 30% that should be found, which leaves as much room for noise
FEWEST = 5  # rounds that a row must have to be compared
NOT_OURS_TO_KEEP_FAST = "ours, backend=reference"  # its slowdown is no failure: much of its time is page faults
Key = tuple[BenchProblem, str]  # problem, name of the implementation


class Change(NamedTuple):
    """A row that both sides have: median times in u, and the least and largest ratio of the two by the quartiles."""

    what: str
    counts: bool  # whether a slowdown is a failure
    old: float
    new: float
    low: float
    high: float

    def verdict(self, tolerance: float) -> str:
        ratio = self.new / self.old
        if ratio > 1 + tolerance and self.low > 1:
            return "slower"
        return "faster" if ratio < 1 / (1 + tolerance) and self.high < 1 else ""


def side(path: Path) -> list[Report]:
    """The report of a file, or the reports of a folder."""
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.glob("*.json") if not p.name.endswith(".partial.json"))
    if not paths:
        raise InputError(f"{path}: got a folder without reports, expected some of the benchmarks")
    return [load(p) for p in paths]


def rounds_in_u(reports: Sequence[Report]) -> dict[Key, tuple[bool, list[float]]]:
    """Each row that was timed: whether it is ours, and each round's time over the time of u in the same round."""
    found: dict[Key, tuple[bool, list[float]]] = {}
    for row in (row for report in reports for row in report["rows"] if row.get("rounds")):
        _, times = found.setdefault((problem_of(row), row["implementation"]), (row["ours"], []))
        times += [t / u for t, u in zip(row["rounds"], row["u_rounds"], strict=True)]
    return found


def changes(old: Sequence[Report], new: Sequence[Report]) -> list[Change]:
    """All rows that both sides timed in ``FEWEST`` rounds at least."""
    found, before = [], rounds_in_u(old)
    for key, (ours, times) in rounds_in_u(new).items():
        if key in before and min(len(times), len(before[key][1])) >= FEWEST:
            (a, b, c), (d, e, f) = ([quantile(t, q) for q in (0.25, 0.5, 0.75)] for t in (before[key][1], times))
            counts = ours and key[1] != NOT_OURS_TO_KEEP_FAST
            found.append(Change(f"{key[0]}: {key[1]}", counts, b, e, d / c, f / a))
    return found


def lost(old: Sequence[Report], new: Sequence[Report]) -> list[str]:
    """Which of ours the old side timed and the new one could not, and why."""
    before, after = rounds_in_u(old), rounds_in_u(new)
    rows = [row for report in new for row in report["rows"] if row["ours"] and row["status"] != "ok"]
    gone = {(problem_of(row), row["implementation"]): row["status"] for row in rows}
    return [f"{key[0]}: {key[1]}: {why}" for key, why in gone.items() if key in before and key not in after]


def compare(old: Path, new: Path, tolerance: float) -> int:
    """Prints what changed. Returns 1 if one of ours became slower or was lost, 2 if there is nothing to compare."""
    sides = side(old), side(new)
    for report in (*sides[0], *sides[1]):
        print(line(report["provenance"]))
    for what in ("machine", "torch"):
        was, now = ({str(report["provenance"].get(what)) for report in one} for one in sides)
        if was != now or len(was) > 1:
            print(f"{what}: {sorted(was)} and {sorted(now)}, so u itself differs")
    found, gone = changes(*sides), lost(*sides)
    if not found:
        print(f"No row of at least {FEWEST} rounds is on both sides.")
        return 2
    verdicts = {change: change.verdict(tolerance) for change in found}
    changed = sorted((c for c in found if verdicts[c]), key=lambda c: -c.new / c.old)
    if changed:
        rows = [
            [c.what, f"{c.old:.2f}", f"{c.new:.2f}", f"{c.new / c.old:.2f}", f"{c.low:.2f}..{c.high:.2f}", verdicts[c]]
            for c in changed
        ]
        print("\n".join(["", *table(["", "old, u", "new, u", "ratio", "by the quartiles", ""], rows)]))
    slower = [change for change, verdict in verdicts.items() if change.counts and verdict == "slower"]
    counts = list(verdicts.values())
    print(
        f"{len(found)} rows of {FEWEST} rounds and more on both sides; beyond noise and {tolerance:.0%}: "
        f"{counts.count('slower')} slower, {counts.count('faster')} faster; {len(slower)} of ours slower."
    )
    for row in gone:
        print(f"no longer measured: {row}")
    return 1 if slower or gone else 0
