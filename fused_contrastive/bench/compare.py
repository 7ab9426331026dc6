"""Reports of the same machine, before a change and after: what became slower in u, beyond noise.

A side is one report or a folder of several. Other guests of a machine slow some minutes of it: where reports of both
sides were made in turns, each side has some of the quiet ones, and a time is that of its quiet rounds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fused_contrastive.bench.implementations import EAGER
from fused_contrastive.bench.provenance import line
from fused_contrastive.bench.timing import quantile
from fused_contrastive.bench.workloads import Problem, problem_of
from fused_contrastive.core.errors import InputError

TOLERANCE = 0.15  # half of the slowdown that is to be found, 1.3: noise and slowdown are then told apart alike
CHECKED_BY = "ours, backend=reference"  # told of, no failure: much of its time is page faults, as malloc keeps memory
RESAMPLES = 400
FEWEST = 5  # rounds: of three, an interval is the three themselves
QUIET = 0.1  # a time is this quantile of its rounds
LARGEST = 1e30  # of what a report's number may be
Report = dict[str, Any]
Reports = Sequence[Report]
Row = dict[str, Any]
Key = tuple[Problem, str]  # and the implementation's name
Interval = tuple[float, float]  # of the middle 90% of resampled rounds
FIELDS = {
    "loss": str, "dtype": str, "d": int, "n": int, "device": str, "implementation": str, "ours": bool, "status": str,
}  # fmt: skip


class Change(NamedTuple):
    """One row of both reports: its times in u, and by what factor it changed.

    ``factors`` has the change over that of each control. The first is u. The others are not ours either, and were
    timed in the same rounds, or in between: eager PyTorch on the same problem, and the vendor's bfloat16 product of
    ``timing.probe``. What they went through as well is noise, a busier machine or a u that came out otherwise: slower
    is slower by each of them. ``controls`` has these others' own change over that of u.
    """

    what: str
    counts: bool  # whether a slowdown is a failure
    old: float
    new: float
    factors: dict[str, Interval]
    controls: dict[str, Interval]

    def verdict(self, tolerance: float) -> str:
        """Slower in u alone: "as others" where a control was slower too, "unclear" where one is too noisy to say."""
        if min(low for low, _ in self.factors.values()) > 1 + tolerance:
            return "slower"
        if max(high for _, high in self.factors.values()) < 1 / (1 + tolerance):
            return "faster"
        if self.factors["u"][0] <= 1 + tolerance:
            return ""
        doubting = [name for name, (low, _) in self.factors.items() if low <= 1 + tolerance]
        return "as others" if any(self.controls[name][0] > 1 for name in doubting) else "unclear"


def load(path: Path) -> Report:
    """A report, or InputError that says what the file is instead."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: got no readable file ({error.strerror}), expected a report of `bench`") from error
    except (RecursionError, ValueError) as error:  # of bytes that are no text, too
        raise InputError(f"{path}: got no JSON ({error}), expected a report of `bench`") from error
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise InputError(f"{path}: got JSON without rows, expected a report of `bench`")
    if not isinstance(report.get("provenance", {}), dict):
        raise InputError(f"{path}: got provenance {report['provenance']!r}, expected a report of `bench`")
    for place, fields in ((report, ("command", "provenance")), *((row, FIELDS) for row in report["rows"])):
        if not isinstance(place, dict) or (missing := [name for name in fields if name not in place]):
            what = repr(missing[0]) if isinstance(place, dict) else f"row, but {place!r}"
            raise InputError(f"{path}: got no {what}, expected a report of this version's `bench`")
    for row in report["rows"]:
        if (name := _wrong(row)) is not None:
            raise InputError(f"{path}: got {name} {row[name]!r}, expected a report of this version's `bench`")
    return report


def _wrong(row: Row) -> str | None:
    """A field of a row that is not what `bench` writes there."""
    for name, kind in FIELDS.items():
        if type(row[name]) is not kind or (kind is int and not 0 < row[name] < LARGEST):
            return name
        if kind is str and name != "status" and not row[name].isprintable():
            return name
    both = row.get("both", {"median": 1})
    right = {
        "both": isinstance(both, dict) and _is_time(both.get("median")),
        "seconds": _is_time(row.get("seconds", 1)),
        "extra_bytes": type(row.get("extra_bytes", 0)) is int and abs(row.get("extra_bytes", 0)) < LARGEST,
    }
    return next((name for name, its in right.items() if not its), None)


def _is_time(value: object) -> bool:
    """Of seconds, or in u; ratios of products of such are finite."""
    return type(value) in (int, float) and 1 / LARGEST < value < LARGEST  # type: ignore[operator]


def side(path: Path) -> list[tuple[Path, Report]]:
    """The report, or those in a folder, all of one machine."""
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.glob("*.json") if p.is_file() and not p.name.endswith(".partial.json"))
    if not paths:
        raise InputError(f"{path}: got a folder without reports, expected some of `bench`")
    found = [(p, load(p)) for p in paths]
    for p, report in found:
        for row in (row for row in report["rows"] if "rounds" in row):
            if wrong := _damage(row):
                raise InputError(f"{p}: got {wrong}, expected a report of this version's `bench`")
    machines = sorted({str(report["provenance"].get("machine")) for _, report in found})
    if len(machines) > 1:
        raise InputError(f"{path}: got reports of {len(machines)} machines ({'; '.join(machines)}), expected one")
    return found


def _damage(row: Row) -> str | None:
    """What ``changes`` could not read of a row that was timed."""
    for name in ("u_rounds", "u_seconds"):
        if name not in row:
            return f"rounds without {name!r}"
    for name in ("rounds", "u_rounds"):
        if not isinstance(row[name], list):
            return f"{name} {row[name]!r}"
    if len(row["u_rounds"]) != len(row["rounds"]):
        return f"{len(row['rounds'])} rounds and {len(row['u_rounds'])} of u"
    times = (*row["rounds"], *row["u_rounds"], row["u_seconds"], row.get("probe", 1))
    wrong = [t for t in times if not _is_time(t)]
    return f"a time of {wrong[0]!r}" if wrong else None


def _measured(reports: Reports) -> dict[Key, Row]:
    """The rows that were timed, with the rounds of all reports, in seconds."""
    pooled: dict[Key, Row] = {}
    for row in (row for report in reports for row in report["rows"] if "rounds" in row):
        seconds = {name: [t * row["u_seconds"] for t in row[name]] for name in ("rounds", "u_rounds")}
        if "probe" in row:
            seconds["probe"] = [row["probe"] * row["u_seconds"]]
        into = pooled.setdefault((problem_of(row), row["implementation"]), {"ours": row["ours"]})
        for name, values in seconds.items():
            into[name] = into.get(name, []) + values
    return pooled


def _resampled(rows: list[list[float]], draw: random.Random) -> list[list[float]]:
    """The quiet times of several things that were timed in the same rounds, of rounds drawn with replacement."""
    count = len(rows[0])
    chosen = [draw.choices(range(count), k=count) for _ in range(RESAMPLES)]
    return [[quantile([row[i] for i in some], QUIET) for some in chosen] for row in rows]


def _interval(ratios: list[float]) -> Interval:
    ratios = sorted(ratios)
    edge = len(ratios) // 20
    return ratios[edge], ratios[-edge - 1]


def _change(key: Key, was: Row, row: Row, eager: tuple[Row, Row] | None, draw: random.Random) -> Change:
    """``eager``: its rows before and after, timed in the same rounds."""
    controls = {"u": (was["u_rounds"], row["u_rounds"])}
    if eager is not None:
        controls[EAGER] = (eager[0]["rounds"], eager[1]["rounds"])
    pairs = [(was["rounds"], row["rounds"]), *controls.values()]
    old, new = (_resampled([pair[which] for pair in pairs], draw) for which in (0, 1))
    ratios = [_over(after, before) for before, after in zip(old, new, strict=True)]
    ours, others = ratios[0], dict(zip(controls, ratios[1:], strict=True))
    if "probe" in was and "probe" in row:
        others["bfloat16"] = [min(row["probe"]) / min(was["probe"])] * RESAMPLES
    factors = {name: _interval(_over(ours, other)) for name, other in others.items()}
    own = {name: _interval(_over(other, others["u"])) for name, other in others.items() if name != "u"}
    times = [quantile(of["rounds"], QUIET) / quantile(of["u_rounds"], QUIET) for of in (was, row)]
    return Change(f"{key[0]}: {key[1]}", row["ours"] and key[1] != CHECKED_BY, times[0], times[1], factors, own)


def _over(values: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(values, others, strict=True)]


def changes(old: Reports, new: Reports) -> list[Change]:
    """Of all rows that both sides have measured, in ``FEWEST`` rounds at least."""
    draw = random.Random(0)
    before, after = ({k: row for k, row in _measured(r).items() if len(row["rounds"]) >= FEWEST} for r in (old, new))
    found = []
    for key, row in after.items():
        if key in before:
            eager = (key[0], EAGER)
            control = (before[eager], after[eager]) if eager in before and eager in after and key != eager else None
            lengths = [len(one["rounds"]) for one in (before[key], row)]
            if control and [len(one["rounds"]) for one in control] != lengths:
                control = None  # not in all reports of a side
            found.append(_change(key, before[key], row, control, draw))
    return found


def regressions(found: Sequence[Change], tolerance: float) -> list[Change]:
    """What of ours became slower."""
    return [change for change in found if change.counts and change.verdict(tolerance) == "slower"]


def uncompared(old: Reports, new: Reports) -> list[str]:
    """Problems of both sides with a row of ours in too few rounds, and in how many. A slow peer's are few."""
    before, after = _measured(old), _measured(new)
    few: dict[Problem, int] = {}
    for key in (key for key, row in after.items() if key in before and row["ours"]):
        rounds = min(len(before[key]["rounds"]), len(after[key]["rounds"]))
        if rounds < FEWEST:
            few[key[0]] = min(rounds, few.get(key[0], FEWEST))
    return [f"{problem} ({rounds})" for problem, rounds in few.items()]


def lost(old: Reports, new: Reports) -> list[str]:
    """What of ours the old side measured and the new one could not."""
    before, after = _measured(old), _measured(new)
    rows = [row for report in new for row in report["rows"] if row["ours"] and row["status"] != "ok"]
    gone = {(problem_of(row), row["implementation"]): row["status"] for row in rows}
    return [f"{key[0]}: {key[1]}: {why}" for key, why in gone.items() if key in before and key not in after]


def compare(old: Path, new: Path, tolerance: float, console: Console) -> int:
    """Prints what changed; 1 if something of ours became slower, 2 if there is nothing to compare."""
    sides = side(old), side(new)
    for path, report in (*sides[0], *sides[1]):
        console.print(f"{path}: {line(report['provenance'])}", markup=False)
    reports = [[report for _, report in one] for one in sides]
    for what in ("machine", "torch"):
        was, now = ({str(report["provenance"].get(what)) for report in one} for one in reports)
        if was != now:
            sides_have = " before, after ".join(" and ".join(sorted(values)) for values in (was, now))
            console.print(f"{what}: {sides_have}, so u itself differs", style="yellow", markup=False)
    found = changes(*reports)
    if few := uncompared(*reports):
        console.print(
            f"Not compared, in fewer than {FEWEST} rounds: {'; '.join(few)}. More reports a side have more.",
            markup=False,
        )
    if not found:
        console.print(f"No row of at least {FEWEST} rounds is on both sides.", style="red")
        return 2
    verdicts = [change.verdict(tolerance) for change in found]
    if any(verdicts):
        _show([change for change in found if change.verdict(tolerance)], tolerance, console)
    slower = regressions(found, tolerance)
    console.print(
        f"{len(found)} rows compared; beyond noise and {tolerance:.0%}: {verdicts.count('slower')} slower, "
        f"{verdicts.count('faster')} faster, {verdicts.count('as others')} slower as what is not ours was, "
        f"{verdicts.count('unclear')} unclear, as that was too noisy; {len(slower)} of ours slower."
    )
    if (slower or "unclear" in verdicts) and min(map(len, reports)) == 1:
        console.print(
            "One report a side: on a machine that others use too, measure both again in turns, into two folders, and "
            "compare those."
        )
    elif "unclear" in verdicts:
        console.print("More reports a side, made in turns, make clear what is unclear.")
    for row in (gone := lost(*reports)):
        console.print(f"no longer measured: {row}", style="red", markup=False)
    return 1 if slower or gone else 0


def _show(told: list[Change], tolerance: float, console: Console) -> None:
    names = list(dict.fromkeys(name for change in told for name in change.factors))
    table = Table("", "old, u", "new, u", *(f"change by {name}" for name in names), "")
    for c in sorted(told, key=lambda c: -c.new / c.old):
        style = "red" if c.counts and c.verdict(tolerance) == "slower" else None
        ends = ("{:.2f}..{:.2f}".format(*c.factors[name]) if name in c.factors else "" for name in names)
        table.add_row(escape(c.what), f"{c.old:.2f}", f"{c.new:.2f}", *ends, c.verdict(tolerance), style=style)
    console.print(table)
