"""The report: everything measured as JSON, and tables of it in Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import line
from benchmarks.workloads import BenchProblem, problem_of
from fused_contrastive.core.errors import InputError

LEAST = 1024  # rows: with fewer, much of the time is a call's overhead, which does not grow with N

Report = dict[str, Any]
Row = dict[str, Any]


def write_json(report: Report, path: Path) -> None:
    """Writes the report whole or not at all: an interrupted run leaves the one that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items() if key != "rows"]
    rows = ",\n".join(map(json.dumps, report["rows"]))  # one row a line, for git's diffs and for readers
    part.write_text("{\n" + ",\n".join([*fields, f'"rows": [\n{rows}\n]']) + "\n}\n")
    part.replace(path)


def load(path: Path) -> Report:
    """A report from its file. Raises: InputError that names the file."""
    try:
        report: Report = json.loads(path.read_text())
        line(report["provenance"]), report["command"]
        for row in report["rows"]:
            problem_of(row), row["implementation"], row["ours"], row["status"]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: got no report of the benchmarks ({type(error).__name__}: {error})") from error
    return report


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, all columns but the first right-aligned, and an empty line."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [*(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)), ""]


def bold(name: str) -> str:
    return f"**{name}**" if name.startswith("ours") else name


def grids(rows: list[Row], title: str, quantity: str, cell: Callable[[Row], str]) -> list[str]:
    """A table for each loss, dtype and D: an implementation a line, N a column."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for row in (row for row in rows if row["status"] == "ok" and quantity in row):
        by_name = found.setdefault(f"{row['loss']}, {row['dtype']}, D = {row['d']}", {})
        by_name.setdefault(row["implementation"], {})[row["n"]] = cell(row)
    lines = [f"## {title}", ""] if found else []
    for section, by_name in found.items():
        sizes = sorted({n for cells in by_name.values() for n in cells})
        body = [[bold(name), *(cells.get(n, "") for n in sizes)] for name, cells in by_name.items()]
        lines += table([f"{section}; N =", *map(str, sizes)], body)
    return lines


def standings(rows: list[Row]) -> list[list[str]]:
    """For each problem, the fastest implementation that is not ours, and its time divided by ours."""
    by_problem: dict[BenchProblem, list[Row]] = {}
    for row in (row for row in rows if "both" in row):
        by_problem.setdefault(problem_of(row), []).append(row)
    lines = []
    for problem, found in by_problem.items():
        ours = [row["both"]["median"] for row in found if row["implementation"] == "ours"]
        others = [(row["both"]["median"], row["implementation"]) for row in found if not row["ours"]]
        if ours and others:
            best, name = min(others)
            lines.append([str(problem), name, f"{best / ours[0]:.2f}"])
    return lines


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The power of x that y grows with: the slope of log y over log x, by least squares; None with under 3 points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 3:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope: float = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return slope


def growth(rows: list[Row]) -> list[list[str]]:
    """Loss, implementation, and the exponents of N that time and memory grow with."""
    points: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in (row for row in rows if row["status"] == "ok" and row["n"] >= LEAST):
        key = f"{row['loss']}, {row['dtype']}, D = {row['d']}", row["implementation"]
        found = points.setdefault(key, {"seconds": [], "extra_bytes": []})
        for quantity in found:
            if quantity in row:
                found[quantity].append((row["n"], row[quantity]))
    powers = {key: [exponent(of_one) for of_one in found.values()] for key, found in points.items()}
    return [
        [*key, *("" if power is None else f"{power:.2f}" for power in both)]
        for key, both in powers.items()
        if both != [None, None]
    ]


def reasons(rows: list[Row]) -> list[str]:
    """Each implementation that was not measured somewhere: why, and on what."""
    found: dict[str, dict[str, set[str]]] = {}
    for row in (row for row in rows if row["status"] != "ok"):
        found.setdefault(row["implementation"], {}).setdefault(row["status"], set()).add(row["loss"])
    return [
        f"- {name}: " + "; ".join(f"{', '.join(sorted(losses))}: {status}" for status, losses in why.items())
        for name, why in found.items()
    ]


def markdown(report: Report) -> str:
    rows = report["rows"]
    lines = ["# Benchmark", "", f"`{report['command']}`", "", f"{line(report['provenance'])}.", ""]
    lines += [
        "Medians of interleaved runs in one process, of implementations that were checked against float64 before, at "
        "4096 x 4096 similarities at most. u is one torch.mm of all similarities there (for max_sim, of all tokens); "
        "its seconds are in the JSON. Memory is the rise of the peak above inputs and gradients.",
        "",
    ]
    title = "Forward + backward in u: the time of the vendor's product of all similarities"
    lines += grids(rows, title, "both", lambda row: f"{row['both']['median']:.2f}")
    title = "Extra peak memory, forward + backward, in MB"
    lines += grids(rows, title, "extra_bytes", lambda row: f"{row['extra_bytes'] / 2**20:.1f}")
    if found := standings(rows):
        lines += ["## Ours and the fastest of the others", "", *table(["", "fastest other", "its time / ours"], found)]
    if found := growth(rows):
        lines += [f"## Growth: exponents of N, from N = {LEAST} on", ""]
        lines += table(["loss", "implementation", "time", "memory"], found)
    if why := reasons(rows):
        lines += ["## Not measured", "", *why, ""]
    return "\n".join(lines)
