"""Runs a suite: of each problem all implementations that can, checked, then timed in turns; then their memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fused_contrastive.bench import memory, peers  # noqa: F401  peers: puts the libraries into the registry
from fused_contrastive.bench.check import CHECKED, Truth
from fused_contrastive.bench.implementations import (
    REGISTRY,
    CannotRunError,
    Implementation,
    fit_together,
    reason_not_to,
)
from fused_contrastive.bench.suites import Suite
from fused_contrastive.bench.timing import Step, Times, in_units, interleaved, probe, product, quantile, step
from fused_contrastive.bench.workloads import WORKLOADS, Loss, Problem

ROUNDS = 60  # of an implementation, kept for `compare`, from the whole time
LONG = 1.5  # seconds of a round, whose problem is timed in one sweep: each would begin with an untimed round
SLOW = 30.0  # seconds of a call, beyond which an implementation is not timed

Row = dict[str, Any]  # a problem's fields, "implementation", "status"; if that is "ok", what was measured


class Prepared(NamedTuple):
    """A problem whose implementations are checked and called once, and the rounds that they were timed in so far."""

    problem: Problem
    rows: list[Row]
    unit: Callable[[], float]
    probe: Callable[[], float] | None
    steps: dict[str, Step]
    round_seconds: float  # of all steps, called once
    times: Times

    def time(self, seconds: float, sweeps: int) -> None:
        """One sweep's rounds. Puts the figures of all rounds so far into the rows."""
        forget_shapes()
        interleaved(self.times, self.unit, self.probe, self.steps, seconds, sweeps)
        times, u = self.times, statistics.median(self.times.u)
        for row in self.rows:
            if row["status"] != "ok":
                continue
            name = row["implementation"]
            both = times.both(name)
            row |= {
                "u_seconds": u,
                "u_spread": [quantile(times.u, q) / u for q in (0.2, 0.8)],
                "seconds": statistics.median(both),
                "unit_tflops": 2 * math.prod(WORKLOADS[self.problem.loss].unit(self.problem)) / u / 1e12,
            }
            if times.probe:
                row["probe"] = quantile(times.probe, 0.2) / u
            row |= {"both": in_units(both, u), "forward": in_units(times.forward[name], u)}
            every = -(-len(both) // ROUNDS)
            row |= {
                "backward": in_units(times.backward[name], u),
                "rounds": [round(t / u, 4) for t in both[::every]],
                "u_rounds": [round(t / u, 4) for t in times.u[::every]],
            }

    def show(self, console: Console) -> None:
        console.print(f"{self.problem}, {len(self.times.u)} rounds", markup=False)
        for row in self.rows:
            if row["status"] == "ok":
                both = row["both"]
                line = f"{both['median']:.2f} u ({both['q20']:.2f}..{both['q80']:.2f})"
                console.print(f"    {row['implementation']}: {line}", markup=False)


def run_suite(suite: Suite, console: Console, keep: Callable[[list[Row]], None], speed: float = 1.0) -> list[Row]:
    """Rows of all timed problems and of all measured memory. ``keep`` gets the rows so far, after each problem."""
    started = time.monotonic()
    rows: list[Row] = []
    total = len(suite.timed) + len(suite.memory)
    numbers = iter(range(1, total + 1))

    def say(what: str) -> None:
        console.print(f"[{time.monotonic() - started:.0f} s] {what}", markup=False)

    def time_all(problems: list[tuple[Problem, float]]) -> None:
        waiting = []
        for problem, seconds in problems:
            say(f"{next(numbers)} of {total}: {problem}")
            waiting.append((prepare(problem, suite.only, console), seconds / speed))
        for sweep in range(suite.sweeps):
            say(f"timing, sweep {sweep + 1} of {suite.sweeps}")
            for prepared, seconds in waiting:
                turns = suite.sweeps if prepared.round_seconds < LONG else 1
                if sweep < turns:
                    prepared.time(seconds, turns)
                if sweep == 0:
                    rows.extend(prepared.rows)
                keep(rows)
        for prepared, _ in waiting:
            prepared.show(console)

    keep(rows)
    for problems in [suite.timed] if suite.sweeps > 1 else [[one] for one in suite.timed]:
        time_all(problems)
    for problem in suite.memory:
        say(f"{next(numbers)} of {total}: memory, {problem}")
        rows += measure_memory(problem, suite.only, console)
        keep(rows)
    return rows


def forget_shapes() -> None:
    """What is compiled next is compiled for the next problem.

    Else code for any size that was compiled for a small one would serve, on one thread say, and after 8 sizes of a
    function it would run uncompiled, and say nothing.
    """
    torch._dynamo.reset()


def candidates(problem: Problem, only: tuple[str, ...]) -> Iterator[tuple[Implementation, Row]]:
    for implementation in REGISTRY:
        if implementation.loss == problem.loss and (not only or implementation.name in only):
            yield (
                implementation,
                {**asdict(problem), "implementation": implementation.name, "ours": implementation.ours},
            )


def described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def load(implementation: Implementation, problem: Problem) -> Loss:
    """The callable, or CannotRunError."""
    if (why := reason_not_to(implementation, problem)) is not None:
        raise CannotRunError(why)
    try:
        return implementation.load(problem)
    except ImportError as error:
        raise CannotRunError(f"cannot be imported: {error}") from error


def prepare(problem: Problem, only: tuple[str, ...], console: Console) -> Prepared:
    """Checks all implementations, and calls those that are right once. Says of each other why it is not timed."""
    torch.manual_seed(0)
    forget_shapes()
    smaller = replace(problem, n=min(problem.n, CHECKED))
    truth = Truth(smaller)
    leaves = truth.leaves if smaller == problem else WORKLOADS[problem.loss].inputs(problem)
    rows, steps, round_seconds = [], {}, 0.0
    for implementation, row in candidates(problem, only):
        rows.append(row)
        try:
            loss = load(implementation, problem)
            wrong = truth.wrong(implementation, loss)
            if wrong is None:
                run = step(loss, leaves, problem.device)
                spent = sum(run())
                if spent > SLOW:  # to compile, perhaps
                    spent = sum(run())
                wrong = f"not timed: {spent:.0f} s a call" if spent > SLOW else None
        except CannotRunError as error:
            wrong = str(error)
        except Exception as error:  # a peer's failure is a result; ours is not
            if implementation.ours:
                raise
            wrong = f"failed: {described(error)}"
        row["status"] = wrong or "ok"
        if wrong is None:
            steps[implementation.name] = run
            round_seconds += spent
            continue
        if wrong.startswith("WRONG") and implementation.ours:
            raise AssertionError(f"{implementation.name}, {problem}: {wrong}; nothing is timed")
        console.print(f"    {implementation.name}: {wrong}", markup=False)
    return Prepared(problem, rows, product(problem), probe(problem.device), steps, round_seconds, Times.of(steps))


def measure_memory(problem: Problem, only: tuple[str, ...], console: Console) -> list[Row]:
    """Two processes at a time where their memory is not the same: most of their seconds are imports."""
    rows, why = [], memory.cannot_measure(problem.device)
    with ThreadPoolExecutor(2 if problem.device == "cpu" and fit_together(2, problem) else 1) as pool:
        waiting: list[tuple[Implementation, Row, Future[int | str]]] = []
        for implementation, row in candidates(problem, only):
            rows.append(row)
            try:
                if why is not None:
                    raise CannotRunError(why)
                load(implementation, problem)
            except CannotRunError as error:
                row["status"] = str(error)
                continue
            waiting.append((implementation, row, pool.submit(memory.in_own_process, implementation, problem)))
        for implementation, row, measured in waiting:
            found = measured.result()
            if isinstance(found, str):
                if implementation.ours:
                    raise RuntimeError(f"{implementation.name}, {problem}: {found}")
                row["status"] = found
            else:
                row |= {"status": "ok", "extra_bytes": found}
                console.print(f"    {implementation.name}: {found / 2**20:.1f} MB", markup=False)
    return rows
