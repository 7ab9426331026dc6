"""The commands ``bench`` and ``compare``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fused_contrastive.bench import compare, plots, report
from fused_contrastive.bench.provenance import head, provenance
from fused_contrastive.bench.run import run_suite
from fused_contrastive.bench.suites import SUITES, Suite
from fused_contrastive.bench.workloads import WORKLOADS


def add_parsers(commands: Any, positive: Any) -> None:
    bench = commands.add_parser("bench", help="time the losses beside eager, torch.compile and other libraries")
    bench.add_argument("--suite", choices=list(SUITES), default="quick", help="default %(default)s, about a minute")
    bench.add_argument("--losses", nargs="+", choices=list(WORKLOADS), help="only these of the suite")
    bench.add_argument("--out", type=Path, default=Path("benchmark"), metavar="FOLDER", help="default ./%(default)s")
    bench.add_argument("--name", help="of the files in it; default: the suite's")
    bench.add_argument("--speed", type=positive, default=1.0, help="2: half the seconds of timing")
    bench.add_argument("--show", type=Path, metavar="REPORT.json", help="print and draw an earlier report; run nothing")
    two = commands.add_parser("compare", help="what became slower between two reports of bench, beyond noise")
    two.add_argument("old", type=Path, metavar="OLD.json")
    two.add_argument("new", type=Path, metavar="NEW.json")
    two.add_argument(
        "--tolerance",
        type=positive,
        default=compare.TOLERANCE,
        help="of a ratio, beside the noise (default %(default)s)",
    )


def run(options: argparse.Namespace, console: Console) -> int:
    if options.command == "compare":
        try:
            return compare.compare(options.old, options.new, options.tolerance, console)
        except (OSError, ValueError) as error:
            console.print(f"compare: {error}", style="red", markup=False)
            return 2
    if options.show:
        try:
            return finish(compare.load(options.show), options.show.with_suffix(""), console)
        except (OSError, ValueError) as error:
            console.print(f"--show: {error}", style="red", markup=False)
            return 2
    suite = chosen(SUITES[options.suite](), options.losses)
    devices = {problem.device for problem in (*(problem for problem, _ in suite.timed), *suite.memory)}
    if "cuda" in devices and not torch.cuda.is_available():
        console.print(f"--suite {options.suite}: needs a GPU, and torch sees none here", style="red", markup=False)
        return 2
    made: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "fused_contrastive", *sys.argv[1:]]), "provenance": provenance()
    }  # fmt: skip
    stem = options.out / (options.name or options.suite)

    def keep(rows: list[dict[str, Any]]) -> None:
        """After each problem, so that a run cut short has lost nothing."""
        stamp = {key: made["provenance"][key] for key in ("fused_contrastive", "torch", "machine", "date")}
        made["rows"] = [{**row, **{"provenance": stamp}} for row in rows]
        report.write_json(made, stem.with_suffix(".json"))

    console.print(head(), markup=False)
    run_suite(suite, console, keep, options.speed)
    return finish(made, stem, console)


def finish(made: dict[str, Any], stem: Path, console: Console) -> int:
    """The tables on the terminal, in Markdown, and the plots."""
    report.show(made, console)
    stem.with_suffix(".md").write_text(report.markdown(made))
    written = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    try:
        if plots.draw(made["rows"], stem.with_suffix(".png")):
            written.append(stem.with_suffix(".png"))
    except ModuleNotFoundError as error:
        console.print(f"no plots: they need the package {error.name!r}: pip install matplotlib", markup=False)
    console.print("written: " + ", ".join(map(str, written)), markup=False)
    return 0


def chosen(suite: Suite, losses: list[str] | None) -> Suite:
    if losses is None:
        return suite
    timed = [(problem, seconds) for problem, seconds in suite.timed if problem.loss in losses]
    return suite._replace(timed=timed, memory=[problem for problem in suite.memory if problem.loss in losses])
