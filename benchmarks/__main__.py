"""Times the losses beside eager PyTorch, torch.compile and other libraries, each checked against float64 first.

python -m benchmarks [--suite SUITE] [--out FOLDER]; python -m benchmarks compare OLD NEW shows what became slower.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, plots, report
from benchmarks.implementations import REGISTRY
from benchmarks.provenance import line, provenance
from benchmarks.run import broken_ours, candidates, run_suite
from benchmarks.suites import SUITES, Suite
from benchmarks.workloads import DTYPES, WORKLOADS, BenchProblem
from fused_contrastive.core.errors import InputError

FILTERS = {"losses": "loss", "n": "n", "d": "d", "dtype": "dtype"}  # option -> field of the problem


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    if arguments[:1] == ["compare"]:
        two = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
        two.add_argument("old", type=Path, metavar="OLD", help="a report, .json, or a folder of them")
        two.add_argument("new", type=Path, metavar="NEW", help="the same, made by the changed code")
        tolerance = "how far a ratio may be from 1, besides the noise (default %(default)s)"
        two.add_argument("--tolerance", type=float, default=compare.TOLERANCE, help=tolerance)
        return two.parse_args(arguments[1:])
    bench = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    bench.add_argument("--suite", choices=list(SUITES), default="quick", help="default %(default)s")
    for flag, choices, kind, metavar in (
        ("--losses", list(WORKLOADS), str, None),
        ("--implementations", list(dict.fromkeys(one.name for one in REGISTRY)), str, "NAME"),
        ("--n", None, int, "N"),
        ("--d", None, int, "D"),
        ("--dtype", list(DTYPES), str, None),
    ):
        bench.add_argument(flag, nargs="+", choices=choices, type=kind, metavar=metavar, help="only these of the suite")
    bench.add_argument("--out", type=Path, default=Path("benchmark"), metavar="FOLDER", help="default ./%(default)s")
    bench.add_argument("--name", help="the files' name there; default: the suite's")
    show = "print an earlier report and write its plots next to it; runs nothing"
    bench.add_argument("--show", type=Path, metavar="REPORT.json", help=show)
    return bench.parse_args(arguments)


def chosen(options: argparse.Namespace) -> Suite:
    """The part of the suite that the filters leave. Raises: InputError if it is empty."""
    suite = SUITES[options.suite]()
    named = options.implementations or suite.only
    only = tuple(name for name in named if not suite.only or name in suite.only)
    asked = {field: values for flag, field in FILTERS.items() if (values := getattr(options, flag)) is not None}

    def left(problem: BenchProblem) -> bool:
        fits = all(getattr(problem, field) in values for field, values in asked.items())
        return fits and bool(only or not named) and any(candidates(problem, only))

    timed = [(problem, seconds) for problem, seconds in suite.timed if left(problem)]
    found = suite._replace(timed=timed, memory=[problem for problem in suite.memory if left(problem)], only=only)
    if not found.problems:
        has = "; ".join(dict.fromkeys(map(str, suite.problems)))
        raise InputError(f"--suite {options.suite}: the filters leave nothing of it; it has {has}")
    if any(problem.device == "cuda" for problem in found.problems) and not torch.cuda.is_available():
        raise InputError(f"--suite {options.suite}: needs a GPU, and torch sees none here")
    return found


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs a suite and writes its report. Returns the exit status, 1 if one of ours failed or was wrong."""
    suite = chosen(options)
    name = options.name or options.suite
    if name != Path(name).name:
        raise InputError(f"--name: got {name!r}, expected a file's name without its folder, which is --out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: got {options.out}, expected a folder ({error.strerror})") from error
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    made: dict[str, Any] = {"command": command, "provenance": provenance(), "rows": []}
    stamp = {key: made["provenance"][key] for key in ("fused_contrastive", "torch", "machine", "date")}
    partial = options.out / f"{name}.partial.json"

    def keep(rows: list[dict[str, Any]]) -> None:
        """Writes a partial report after each problem, which leaves an earlier report alone until the run is done."""
        made["rows"] = [{**row, "provenance": stamp} for row in rows]
        report.write_json(made, partial)

    print(line(made["provenance"]))
    try:
        run_suite(suite, lambda text: print(text, flush=True), keep)
    except KeyboardInterrupt:
        print(f"interrupted: python -m benchmarks --show {partial} shows what was measured")
        raise
    partial.replace(options.out / f"{name}.json")
    show(made, options.out, name)
    for what in (failed := broken_ours(made["rows"])):
        print(what)
    return 1 if failed else 0


def show(made: dict[str, Any], folder: Path, name: str) -> None:
    """The tables, printed and in a file, and the plots, beside the JSON."""
    page = folder / f"{name}.md"
    page.write_text(report.markdown(made))
    print(page.read_text())
    try:
        pictures = plots.draw(made["rows"], folder / f"{name}.png")
        pictures += plots.bars(made["rows"], folder / f"{name}-clip.png")
        print(f"written: {', '.join(map(str, (folder / f'{name}.json', page, *pictures)))}")
    except ModuleNotFoundError as error:
        print(f"no plots: they need the package {error.name!r}: pip install matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if one of ours failed or became slower, 2 for bad arguments and files."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        if "old" in options:
            return compare.compare(options.old, options.new, options.tolerance)
        if options.show is not None:
            show(report.load(options.show), options.show.parent, options.show.stem)
            return 0
        return bench(options, arguments)
    except InputError as error:
        print(f"python -m benchmarks: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
