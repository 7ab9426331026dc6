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
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from torch import Tensor

from fused_contrastive.__main__ import main as fused_contrastive
from fused_contrastive.bench import compare
from fused_contrastive.bench.implementations import REGISTRY, Load
from fused_contrastive.bench.suites import MATRIX, SUITES
from fused_contrastive.bench.workloads import Loss, Problem

N = 1024


def slowed(loss: Loss, factor: float) -> Loss:
    """The same, and then as idle as to take ``factor`` times as long, forward and backward together."""
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


def compared(old: Path, new: Path, tolerance: float) -> tuple[int, str]:
    console = Console(record=True, width=250, file=io.StringIO())
    return compare.compare(old, new, tolerance, console), console.export_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--factor", type=float, default=1.3, help="default %(default)s")
    parser.add_argument("--times", type=int, default=5, help="default %(default)s")
    parser.add_argument("--reports", type=int, default=2, help="a side (default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=compare.TOLERANCE, help="default %(default)s")
    parser.add_argument("--run", nargs=3, metavar=("LOSS", "FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return one_run(options.run[0], options.factor, Path(options.run[1]), options.run[2])
    wrong = 0
    for k in range(options.times):
        loss = MATRIX[k % len(MATRIX)]
        with TemporaryDirectory() as folder:
            sides = {name: Path(folder) / name for name in ("old", "same", "slow")}
            for report in range(options.reports):
                for name, side in sides.items():
                    slow = loss if name == "slow" else ""
                    command = [sys.executable, __file__, "--factor", str(options.factor)]
                    subprocess.run(
                        [*command, "--run", slow, str(side), str(report)], check=True, stdout=subprocess.DEVNULL
                    )
            for name, expected in (("same", 0), ("slow", 1)):
                code, text = compared(sides["old"], sides[name], options.tolerance)
                right = code == expected and (
                    name == "same" or ("; 1 of ours slower" in text and f"{loss} N = {N}" in text)
                )
                wrong += not right
                print(f"{k + 1}: {loss}, {name}: {'as it should' if right else f'WRONG, {code}'}", flush=True)
                if not right:
                    print(text, flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
