"""The report: a table on the terminal, the same in Markdown, everything measured in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fused_contrastive.bench.growth import fit
from fused_contrastive.bench.provenance import line
from fused_contrastive.bench.timing import SELDOM, SLOW_PEER
from fused_contrastive.bench.workloads import Problem, problem_of

Row = dict[str, Any]


class Grid:
    """Rows of one quantity: an implementation on a loss a line, N a column."""

    def __init__(self, title: str, rows: list[Row], quantity: str, cell: Callable[[Row], str]) -> None:
        kept = [row for row in rows if row["status"] == "ok" and quantity in row]
        self.title = title
        self.sizes = sorted({row["n"] for row in kept})
        self.sections: dict[str, dict[str, dict[int, str]]] = {}
        for row in kept:
            section = self.sections.setdefault(f"{row['loss']}, {row['dtype']}, D = {row['d']}", {})
            section.setdefault(row["implementation"], {})[row["n"]] = cell(row)

    def to_rich(self) -> Table:
        table = Table(title=self.title)
        table.add_column("N =")
        for n in self.sizes:
            table.add_column(str(n), justify="right")
        for section, lines in self.sections.items():
            table.add_section()
            table.add_row(escape(section), style="bold")
            for name, cells in lines.items():
                style = "green" if name.startswith("ours") else None
                table.add_row(f"  {escape(name)}", *(cells.get(n, "") for n in self.sizes), style=style)
        return table

    def to_markdown(self) -> list[str]:
        lines = [f"## {self.title}"]
        for section, found in self.sections.items():
            sizes = [n for n in self.sizes if any(n in cells for cells in found.values())]
            lines += ["", f"| {section}; N = | {' | '.join(map(str, sizes))} |", f"| --- |{' ---: |' * len(sizes)}"]
            for name, cells in found.items():
                name = f"**{name}**" if name.startswith("ours") else name
                lines.append(f"| {name} | {' | '.join(cells.get(n, '') for n in sizes)} |")
        return [*lines, ""]


def time_grid(rows: list[Row]) -> Grid:
    def cell(row: Row) -> str:
        return f"{row['both']['median']:.2f}"

    return Grid("Forward + backward in u: the time of the vendor's product of all similarities", rows, "both", cell)


def memory_grid(rows: list[Row]) -> Grid:
    def cell(row: Row) -> str:
        return f"{row['extra_bytes'] / 2**20:.1f}"

    return Grid("Extra peak memory, forward + backward, in MB", rows, "extra_bytes", cell)


def growth_lines(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """Loss, implementation, exponent of time, exponent of memory."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return [(f"{g.loss}, {g.dtype}, D = {g.d}", g.implementation, shown(g.time), shown(g.memory)) for g in fit(rows)]


def standings(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Problem, the fastest of the others, and its time over ours."""
    by_problem: dict[Problem, list[Row]] = {}
    for row in rows:
        if "both" in row:
            by_problem.setdefault(problem_of(row), []).append(row)
    lines = []
    for problem, found in by_problem.items():
        ours = [row["both"]["median"] for row in found if row["implementation"] == "ours"]
        others = [(row["both"]["median"], row["implementation"]) for row in found if not row["ours"]]
        if ours and others:
            best, name = min(others)
            lines.append((str(problem), name, f"{best / ours[0]:.2f}"))
    return lines


def reasons(rows: list[Row]) -> dict[str, list[str]]:
    """Of the implementations that were not measured somewhere: why, and on what."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault((row["implementation"], row["status"]), set()).add(row["loss"])
    lines: dict[str, list[str]] = {}
    for (name, status), losses in found.items():
        lines.setdefault(name, []).append(f"{', '.join(sorted(losses))}: {status}")
    return lines


def show(report: dict[str, Any], console: Console) -> None:
    rows = report["rows"]
    for grid in (time_grid(rows), memory_grid(rows)):
        if grid.sections:
            console.print(grid.to_rich())
    if standing := standings(rows):
        table = Table("", "fastest other", "its time / ours", title="Ours and the fastest of the others")
        for row in standing:
            table.add_row(*map(escape, row))
        console.print(table)
    if lines := growth_lines(rows):
        table = Table("loss", "implementation", "time ~ N^", "memory ~ N^", title="Growth, from N = 1024 on")
        for cells in lines:
            table.add_row(*map(escape, cells))
        console.print(table)
    for name, why in reasons(rows).items():
        console.print(f"not measured: {name}: {'; '.join(why)}", markup=False)


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    lines = ["# Benchmark", "", f"`{report['command']}`", "", f"{line(report['provenance'])}.", ""]
    lines += [
        "Medians of interleaved runs in one process, of implementations that were checked against float64 before, at "
        "4096 x 4096 similarities at most. Ours and eager are in all rounds; of the others one that takes more than "
        f"{SLOW_PEER} times as long as the fastest of them is in one of {SELDOM}. u is one torch.mm of all "
        "similarities there (for max_sim, of all tokens); its seconds are in the JSON. Memory is the rise of the peak "
        "above inputs and gradients, in a process of its own.",
        "",
    ]
    for grid in (time_grid(rows), memory_grid(rows)):
        if grid.sections:
            lines += grid.to_markdown()
    if standing := standings(rows):
        lines += ["## Ours and the fastest of the others", "", "| | fastest other | its time / ours |"]
        lines += ["| --- | --- | ---: |", *(f"| {' | '.join(cells)} |" for cells in standing), ""]
    if found := growth_lines(rows):
        lines += ["## Growth: exponents of N, from N = 1024 on", "", "| loss | implementation | time | memory |"]
        lines += ["| --- | --- | ---: | ---: |", *(f"| {' | '.join(cells)} |" for cells in found), ""]
    if why := reasons(rows):
        lines += ["## Not measured", "", *(f"- {name}: {'; '.join(each)}" for name, each in why.items()), ""]
    return "\n".join(lines)


def write_json(report: dict[str, Any], path: Path) -> None:
    """Whole or not at all: an interrupted run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items() if key != "rows"]
    rows = ",\n".join(map(json.dumps, report["rows"]))  # a row a line: for git, and for reading
    part.write_text("{\n" + ",\n".join([*fields, f'"rows": [\n{rows}\n]']) + "\n}\n")
    part.replace(path)
