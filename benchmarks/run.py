"""Runs a suite: all implementations of a problem, checked and then timed in turns; then their memory."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, peers  # noqa: F401  peers: puts the libraries into the registry
from benchmarks.check import small_enough, wrong
from benchmarks.implementations import REGISTRY, CannotRunError, Implementation, broken, failure, load
from benchmarks.suites import Suite
from benchmarks.timing import Rounds, Step, interleaved, product, quantile, step
from benchmarks.workloads import WORKLOADS, BenchProblem, Loss, problem_of

KEPT = 60  # how many rounds of an implementation go into the report, for `compare`
SLOW = 30.0  # an implementation whose call takes more seconds is not timed

Row = dict[str, Any]  # a problem's fields, "implementation", "ours", "status"; if that is "ok", what was measured


def candidates(problem: BenchProblem, only: tuple[str, ...]) -> Iterator[tuple[Implementation, Row]]:
    for one in REGISTRY:
        if one.loss == problem.loss and (not only or one.name in only):
            yield one, {**asdict(problem), "implementation": one.name, "ours": one.ours}


def attempt(row: Row, measure: Callable[[], Row]) -> None:
    """Puts what was measured into a row, or the reason why nothing was."""
    try:
        row |= {"status": "ok", **measure()}
    except CannotRunError as error:
        row["status"] = str(error)
    except Exception as error:
        row["status"] = failure(error)
    if broken(row["status"]):
        release()


def release() -> None:
    """Gives back what a failed call held: exceptions hold frames, frames tensors, and torch keeps freed memory."""
    if torch.cuda.is_available():
        gc.collect()
        try:
            torch.cuda.empty_cache()
        except Exception:  # the device is lost, which the next problem's rows will say
            return


def forget_shapes() -> None:
    """Makes torch.compile forget what it has compiled, so that it compiles anew for the next problem's shapes.

    Otherwise torch.compile would turn to code for any size, and after 8 sizes would run a function uncompiled, both
    without a word.
    """
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and nothing was compiled without it
        torch._dynamo.reset()


def time_problem(problem: BenchProblem, only: tuple[str, ...], seconds: float, fewest: int) -> list[Row]:
    """Rows of all implementations: checked, called once, and then timed in turns for so many seconds and rounds."""
    torch.manual_seed(0)
    forget_shapes()
    leaves = WORKLOADS[problem.loss].inputs(problem)
    losses: dict[str, Loss] = {}
    steps: dict[str, Step] = {}
    rows = {}
    for implementation, row in candidates(problem, only):
        rows[implementation.name] = row
        attempt(row, partial(check, implementation, problem, losses))
    if small_enough(problem) != problem:
        forget_shapes()
    for name, loss in losses.items():
        attempt(rows[name], partial(first_call, name, loss, leaves, problem.device, steps))
    if steps:
        rounds = interleaved(product(problem), steps, seconds, fewest)
        for name in steps:
            rows[name] |= {"status": rounds.failed[name]} if name in rounds.failed else figures(problem, rounds, name)
    return list(rows.values())


def check(implementation: Implementation, problem: BenchProblem, losses: dict[str, Loss]) -> Row:
    """Checks an implementation; if it is right, its loss goes into ``losses``."""
    loss = load(implementation, problem)
    if (why := wrong(implementation, small_enough(problem))) is not None:
        return {"status": why}
    losses[implementation.name] = loss
    return {}


def first_call(name: str, loss: Loss, leaves: dict[str, Tensor], device: str, steps: dict[str, Step]) -> Row:
    """Calls a loss once, which may compile it; if it is not too slow, it goes into ``steps``."""
    run = step(loss, leaves, device)
    spent = sum(run())
    if spent > SLOW:  # perhaps it was compiled
        spent = sum(run())
    if spent > SLOW:
        return {"status": f"not timed: {spent:.0f} s a call"}
    steps[name] = run
    return {}


def figures(problem: BenchProblem, rounds: Rounds, name: str) -> Row:
    """Medians and quantiles in u, and a sample of the rounds."""
    u = statistics.median(rounds.u)
    forward, backward = ([times[k] for times in rounds.times[name]] for k in (0, 1))
    both = [a + b for a, b in zip(forward, backward, strict=True)]
    # A random sample, because rounds at equal distances may have something in common.
    kept = sorted(random.Random(0).sample(range(len(both)), min(len(both), KEPT)))

    def in_units(values: list[float]) -> dict[str, float]:
        return {
            "median": statistics.median(values) / u, "q20": quantile(values, 0.2) / u, "q80": quantile(values, 0.8) / u
        }  # fmt: skip

    return {
        "u_seconds": u,
        "u_spread": [quantile(rounds.u, q) / u for q in (0.2, 0.8)],
        "unit_tflops": 2 * math.prod(WORKLOADS[problem.loss].unit(problem)) / u / 1e12,
        "seconds": statistics.median(both),
        "both": in_units(both),
        "forward": in_units(forward),
        "backward": in_units(backward),
        "rounds": [round(both[k] / u, 4) for k in kept],
        "u_rounds": [round(rounds.u[k] / u, 4) for k in kept],
    }


def measure_memory(problem: BenchProblem, only: tuple[str, ...]) -> list[Row]:
    """Rows of all implementations, with the bytes that a step takes besides inputs and gradients."""
    rows = []
    for implementation, row in candidates(problem, only):
        rows.append(row)
        attempt(row, partial(memory.measure, implementation, problem))
    return rows


def run_suite(suite: Suite, say: Callable[[str], None], keep: Callable[[list[Row]], None]) -> list[Row]:
    """Rows of all timed problems and of all measured memory. ``keep`` gets the rows so far, whenever there are more."""
    started = time.monotonic()
    work: list[tuple[BenchProblem, str, Callable[[], list[Row]]]] = []
    for problem, seconds in suite.timed:
        work.append((problem, "time", partial(time_problem, problem, suite.only, seconds, suite.fewest)))
    work += [(problem, "memory", partial(measure_memory, problem, suite.only)) for problem in suite.memory]
    rows: list[Row] = []
    keep(rows)
    for number, (problem, what, measure) in enumerate(work, 1):
        say(f"[{time.monotonic() - started:.0f} s] {number} of {len(work)}: {what}, {problem}")
        release()
        try:
            found = measure()
        except Exception as error:  # for example, memory does not hold its tensors, or the device is lost
            found = [row | {"status": failure(error)} for _, row in candidates(problem, suite.only)]
        for row in found:
            say(f"    {row['implementation']}: {shown(row)}")
        rows += found
        keep(rows)
    return rows


def shown(row: Row) -> str:
    if "both" in row:
        return "{median:.2f} u ({q20:.2f}..{q80:.2f})".format(**row["both"])
    return f"{row['extra_bytes'] / 2**20:.1f} MB" if "extra_bytes" in row else str(row["status"])


def broken_ours(rows: Iterable[Row]) -> list[str]:
    """Which of ours failed or was wrong, on which problem, and how."""
    return [
        f"{row['implementation']}, {problem_of(row)}: {row['status']}"
        for row in rows
        if row["ours"] and broken(row["status"])
    ]
