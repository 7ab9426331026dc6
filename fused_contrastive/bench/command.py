"""The commands ``bench`` and ``compare``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fused_contrastive.bench import compare, plots, read, report
from fused_contrastive.bench.implementations import REGISTRY
from fused_contrastive.bench.provenance import line, provenance
from fused_contrastive.bench.run import broken_ours, candidates, run_suite
from fused_contrastive.bench.suites import SUITES, Suite
from fused_contrastive.bench.workloads import DTYPES, WORKLOADS, Problem
from fused_contrastive.core.errors import InputError


def add_parsers(commands: Any, positive: Any) -> None:
    bench = commands.add_parser("bench", help="time the losses beside eager, torch.compile and other libraries")
    bench.add_argument("--suite", choices=list(SUITES), default="quick", help="default %(default)s")
    for flag, choices, kind, metavar in (
        ("--losses", list(WORKLOADS), str, None),
        ("--implementations", list(dict.fromkeys(i.name for i in REGISTRY)), str, "NAME"),
        ("--n", None, int, "N"),
        ("--d", None, int, "D"),
        ("--dtype", list(DTYPES), str, None),
    ):
        bench.add_argument(flag, nargs="+", choices=choices, type=kind, metavar=metavar, help="only these of the suite")
    bench.add_argument("--out", type=Path, default=Path("benchmark"), metavar="FOLDER", help="default ./%(default)s")
    bench.add_argument("--name", help="of the files in it; default: the suite's")
    bench.add_argument("--speed", type=positive, default=1.0, help="2: half the seconds of timing")
    bench.add_argument(
        "--show", type=Path, metavar="REPORT.json", help="print an earlier report and draw it, beside it; runs nothing"
    )
    two = commands.add_parser("compare", help="what became slower between reports of bench, beyond noise")
    two.add_argument("old", type=Path, metavar="OLD", help="a report, .json, or a folder of them")
    two.add_argument("new", type=Path, metavar="NEW", help="the same, made by the changed code; best in turns with OLD")
    two.add_argument(
        "--tolerance",
        type=positive,
        default=compare.TOLERANCE,
        help="of a ratio, beside the noise (default %(default)s)",
    )


def run(options: argparse.Namespace, arguments: Sequence[str], console: Console) -> int:
    """``arguments``: what ``options`` were parsed from, for the report to name the command."""
    if options.command == "compare":
        return compare.compare(options.old, options.new, options.tolerance, console)
    if options.show:
        shown = read.load(options.show)
        try:
            return finish(shown, options.show.parent, options.show.stem, console)
        except OSError as error:
            raise InputError(f"--show: {error}, expected a folder to write to") from error
    filters = {name: asked for name in FILTERS if (asked := getattr(options, name)) is not None}
    suite = chosen(options.suite, filters)
    if "cuda" in {problem.device for problem in _problems(suite)} and not torch.cuda.is_available():
        raise InputError(f"--suite {options.suite}: needs a GPU, and torch sees none here")
    if options.name is not None and (options.name != Path(options.name).name or options.name in ("", ".", "..")):
        raise InputError(f"--name: got {options.name!r}, expected a file's name without its folder, which is --out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: got {options.out}, expected a folder ({error.strerror})") from error
    made: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "fused_contrastive", *arguments]),
        "provenance": provenance(),
        "rows": [],
    }
    name = options.name or options.suite
    partial = options.out / f"{name}.partial.json"

    def keep(rows: list[dict[str, Any]]) -> None:
        """After each problem, beside an earlier report, so that neither is lost to a run cut short."""
        stamp = {key: made["provenance"][key] for key in ("fused_contrastive", "torch", "machine", "date")}
        made["rows"] = [{**row, **{"provenance": stamp}} for row in rows]
        report.write_json(made, partial)

    console.print(line(made["provenance"]), markup=False)
    try:
        run_suite(suite, console, keep, options.speed)
    except KeyboardInterrupt:
        console.print(f"interrupted: bench --show {partial} shows what was measured", style="red", markup=False)
        raise
    partial.replace(options.out / f"{name}.json")
    finish(made, options.out, name, console)
    for what in (of_ours := broken_ours(made["rows"])):
        console.print(what, style="red", markup=False)
    return 1 if of_ours else 0


def finish(made: dict[str, Any], folder: Path, name: str, console: Console) -> int:
    """The tables on the terminal, in Markdown, and the plots, beside the JSON."""
    report.show(made, console)
    page = folder / f"{name}.md"
    page.write_text(report.markdown(made), encoding="utf-8", errors="replace")
    written = [page]
    try:
        for draw, ending in ((plots.draw, ""), (plots.draw_largest, "-clip")):
            if draw(made["rows"], picture := folder / f"{name}{ending}.png"):
                written.append(picture)
    except ModuleNotFoundError as error:
        console.print(f"no plots: they need the package {error.name!r}: pip install matplotlib", markup=False)
    console.print(f"{folder / name}.json: written " + " and ".join(map(str, written)), markup=False)
    return 0


def _problems(suite: Suite) -> list[Problem]:
    return [*(problem for problem, _ in suite.timed), *suite.memory]


FILTERS: dict[str, Callable[[Problem, Suite], list[Any]]] = {
    "losses": lambda problem, _: [problem.loss],
    "implementations": lambda problem, suite: [i.name for i, _ in candidates(problem, suite.only)],
    "n": lambda problem, _: [problem.n],
    "d": lambda problem, _: [problem.d],
    "dtype": lambda problem, _: [problem.dtype],
}


def _listed(values: Iterable[object]) -> str:
    return ", ".join(shlex.quote(str(value)) for value in values)


def chosen(name: str, filters: dict[str, list[Any]]) -> Suite:
    """What the filters leave of a suite; InputError names the one that leaves nothing, and what there was for it."""
    suite, where = SUITES[name](), f"--suite {name}"
    for flag, asked in filters.items():
        values = {problem: FILTERS[flag](problem, suite) for problem in _problems(suite)}
        left = [problem for problem, its in values.items() if not set(asked).isdisjoint(its)]
        if not left:
            has = dict.fromkeys(chain(*values.values()))
            raise InputError(f"--{flag}: got {_listed(asked)}, expected some of {_listed(has)}: {where}")
        timed = [(problem, seconds) for problem, seconds in suite.timed if problem in left]
        suite = suite._replace(timed=timed, memory=[problem for problem in suite.memory if problem in left])
        if flag == "implementations":
            suite = suite._replace(only=tuple(name for name in asked if not suite.only or name in suite.only))
        where += f" --{flag} {shlex.join(map(str, asked))}"
    return suite
