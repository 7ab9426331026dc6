"""Whether `compare` can be believed on this machine: honest runs of the benchmark, and runs with a slowdown planted.

    python benchmarks/planted.py                     # a slowdown of 1.3, five times, two reports a side: half an hour
    python benchmarks/planted.py --times 1 --factor 1.2

Each time three kinds of runs take turns: before a change, after one that changes nothing, and after one that makes a
loss slower at N = 1024, by waiting. `compare` should stay quiet about the second and name the loss, and nothing else,
in the third. Timing alone, without the memory of the quick suite. The exit status is the number of wrong verdicts.
"""

from __future__ import annotations

import argparse
import io
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fused_contrastive.__main__ import main as fused_contrastive
from fused_contrastive.bench import compare
from fused_contrastive.bench.implementations import REGISTRY, Load
from fused_contrastive.bench.suites import MATRIX, SUITES
from fused_contrastive.bench.workloads import Loss, Problem

N, D = 1024, 512  # a size that the quick suite times each loss at


def slowed(loss: Loss, factor: float) -> Loss:
    """The same, and then waiting, so that forward and backward together take ``factor`` times as long."""
    ratios: list[float] = []  # of forward and backward to the forward, in the first calls

    def run(*inputs: Tensor) -> Tensor:
        while len(ratios) < 7:
            start = time.perf_counter()
            value = loss(*inputs)
            forward = time.perf_counter() - start
            torch.autograd.grad(value, inputs, allow_unused=True)
            ratios.append((time.perf_counter() - start) / forward)
        start = time.perf_counter()
        value = loss(*inputs)
        now = time.perf_counter()
        until = now + (factor - 1) * statistics.median(ratios) * (now - start)
        while time.perf_counter() < until:
            pass
        return value

    return run


def one_run(slow: str, factor: float, out: Path, name: str) -> int:
    """A report, in this process; ``slow``: the loss to be slowed, or "" for none."""
    whole = SUITES["quick"]()
    SUITES["quick"] = lambda: whole._replace(memory=[])
    for k, implementation in enumerate(REGISTRY):
        if (implementation.loss, implementation.name) == (slow, "ours"):

            def load(problem: Problem, honest: Load = implementation.load) -> Loss:
                loss = honest(problem)
                return slowed(loss, factor) if problem.n == N else loss

            REGISTRY[k] = replace(implementation, load=load)
    return fused_contrastive(["bench", "--suite", "quick", "--out", str(out), "--name", name])


def verdict(old: Path, new: Path, tolerance: float) -> tuple[list[str], int, str]:
    """What of ours `compare` calls slower, its exit status, and all that it says."""
    console = Console(record=True, width=250, file=io.StringIO())
    code = compare.compare(old, new, tolerance, console)
    sides = ([report for _, report in compare.side(path)] for path in (old, new))
    found = [change.what for change in compare.regressions(compare.changes(*sides), tolerance)]
    return found, code, console.export_text()


def made_in_turns(folder: Path, slow: str, options: argparse.Namespace) -> dict[str, Path]:
    """Reports before a change, after one that changes nothing, after one that makes the loss ``slow`` slower."""
    sides = {name: folder / name for name in ("old", "same", "slow")}
    for report in range(options.reports):
        for name, side in sides.items():
            planted = [slow if name == "slow" else "", str(side), str(report)]
            command = [sys.executable, __file__, "--factor", str(options.factor), "--run", *planted]
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if result.returncode:
                sys.exit(f"{shlex.join(command)}: exit status {result.returncode}\n{result.stdout}")
    return sides


def at_least(least: float, kind: type) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"got {text}, expected at least {least}")
        return value

    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--factor", type=at_least(1, float), default=1.3, help="default %(default)s")
    parser.add_argument("--times", type=at_least(1, int), default=5, help="default %(default)s")
    parser.add_argument("--reports", type=at_least(1, int), default=2, help="a side (default %(default)s)")
    parser.add_argument("--tolerance", type=at_least(0, float), default=compare.TOLERANCE, help="default %(default)s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the reports there (default: none)")
    parser.add_argument("--run", nargs=3, metavar=("LOSS", "FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return one_run(options.run[0], options.factor, Path(options.run[1]), options.run[2])
    if options.factor <= 1 + options.tolerance:
        parser.error(f"--factor: got {options.factor}, expected more than 1 + the tolerance, {options.tolerance}")
    if options.keep is not None and options.keep.exists():  # its reports would take part
        parser.error(f"--keep: got {options.keep}, which exists, expected a new folder")
    wrong = 0
    for k in range(options.times):
        loss = MATRIX[k % len(MATRIX)]
        with TemporaryDirectory() if options.keep is None else nullcontext(options.keep / f"{k + 1}") as folder:
            sides = made_in_turns(Path(folder), loss, options)
            for name, expected in (("same", []), ("slow", [f"{Problem(loss, N, D)}: ours"])):
                found, code, text = verdict(sides["old"], sides[name], options.tolerance)
                right = found == expected and code == len(expected)
                wrong += not right
                said = "as it should be" if right else f"WRONG, exit status {code}\n{text}"
                print(f"{k + 1}: {loss}, {name}: {', '.join(found) or 'quiet'}: {said}", flush=True)
    print(f"{wrong} of {2 * options.times} verdicts are wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
