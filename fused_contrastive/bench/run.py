"""Runs a suite: of each problem all implementations that can, checked, then timed in turns; then their memory."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fused_contrastive.bench import memory, peers  # noqa: F401  peers: puts the libraries into the registry
from fused_contrastive.bench.check import Checks, small_enough
from fused_contrastive.bench.implementations import (
    EAGER,
    REGISTRY,
    CannotRunError,
    Implementation,
    broken,
    failure,
    fit_together,
    reason_not_to,
)
from fused_contrastive.bench.suites import Suite
from fused_contrastive.bench.timing import (
    Step,
    StepError,
    Times,
    called,
    in_units,
    interleaved,
    product,
    quantile,
    step,
)
from fused_contrastive.bench.workloads import WORKLOADS, Loss, Problem, problem_of

ROUNDS = 60  # of an implementation, kept for `compare`
LEAST, IF_SLOW = 5, 4  # rounds
LONG = 1.5  # seconds of a round, whose problem is timed at once: a sweep would begin with an untimed round
SLOW = 30.0  # seconds of a call, beyond which an implementation is not timed

Row = dict[str, Any]  # a problem's fields, "implementation", "ours", "status"; if that is "ok", what was measured
IDENTITY = {*(field.name for field in fields(Problem)), "implementation", "ours"}


class Prepared(NamedTuple):
    """A problem whose implementations are checked and called once, and the rounds that they were timed in so far."""

    problem: Problem
    rows: list[Row]
    unit: Callable[[], float]
    steps: dict[str, Step]
    round_seconds: float  # of all steps, called once
    times: Times

    def time_all(self, seconds: float, fewest: int | None = None) -> None:
        """All of its rounds, where nothing ran since it was prepared."""
        self._time(lambda: self._rounds(seconds, fewest or LEAST, fewest or IF_SLOW))

    def time_part(self, seconds: float, sweeps: int) -> None:
        """One sweep's part of the rounds.

        Before them each is called once more, so that caches and kept memory are those of a training run, and compiled
        code is there.
        """
        least, if_slow = -(-LEAST // sweeps), -(-IF_SLOW // sweeps)

        def rounds() -> None:
            forget_shapes()
            for name in self.steps:
                called(self.steps, name)
            self._rounds(seconds / sweeps, least, if_slow)

        self._time(rounds)

    def _rounds(self, seconds: float, least: int, if_slow: int) -> None:
        always = [row["implementation"] for row in self.rows if row["ours"] or row["implementation"] == EAGER]
        interleaved(self.times, self.unit, self.steps, always, seconds, least, if_slow)

    def _time(self, rounds: Callable[[], None]) -> None:
        """Rounds, without what fails now; then the figures of all rounds so far, into the rows."""
        while self.steps:
            try:
                rounds()
                break
            except StepError as error:
                self._leave_out([error.name], failure(error.error))
            except Exception as error:  # of the product that is u: nothing can be timed any more
                self._leave_out(list(self.steps), failure(error))
            release()
        if self.steps:
            self._fill()

    def _leave_out(self, names: list[str], why: str) -> None:
        for row in self.rows:
            if row["implementation"] in names:
                del self.steps[row["implementation"]]
                for field in set(row) - IDENTITY:  # what it was measured at in earlier sweeps
                    del row[field]
                row["status"] = why

    def _fill(self) -> None:
        times, u = self.times, statistics.median(self.times.u)
        count = len(times.u)
        # Drawn: rounds at equal distances may have something in common.
        kept = set(random.Random(0).sample(range(count), min(count, ROUNDS)))
        shared = {
            "u_seconds": u,
            "u_spread": [quantile(times.u, q) / u for q in (0.2, 0.8)],
            "unit_tflops": 2 * math.prod(WORKLOADS[self.problem.loss].unit(self.problem)) / u / 1e12,
        }
        for row in self.rows:
            name = row["implementation"]
            if name not in self.steps:
                continue
            both = times.both(name)
            rounds = [(k, seconds) for k, seconds in zip(times.rounds[name], both, strict=True) if k in kept]
            row |= {
                **shared,
                "seconds": statistics.median(both),
                "both": in_units(both, u),
                "forward": in_units(times.forward[name], u),
                "backward": in_units(times.backward[name], u),
                "rounds": [round(seconds / u, 4) for _, seconds in rounds],
                "u_rounds": [round(times.u[k] / u, 4) for k, _ in rounds],
            }

    def show(self, console: Console) -> None:
        console.print(f"{self.problem}, {len(self.times.u)} rounds", markup=False)
        for row in self.rows:
            if row["status"] == "ok":
                both = row["both"]
                line = f"{both['median']:.2f} u ({both['q20']:.2f}..{both['q80']:.2f})"
                console.print(f"    {row['implementation']}: {line}", markup=False)
            elif row["implementation"] in self.times.forward:  # it was right, and then failed
                console.print(f"    {row['implementation']}: {row['status']}", markup=False)


def run_suite(suite: Suite, console: Console, keep: Callable[[list[Row]], None], speed: float = 1.0) -> list[Row]:
    """Rows of all timed problems and of all measured memory. ``keep`` gets the rows so far, whenever there are more."""
    started = time.monotonic()
    begun: list[list[Row]] = []  # of the problems, in order
    weighed: list[Row] = []
    total = len(suite.timed) + len(suite.memory)
    numbers = iter(range(1, total + 1))
    waiting: list[tuple[Prepared, float]] = []
    checks = Checks()

    def say(what: str) -> None:
        console.print(f"[{time.monotonic() - started:.0f} s] {what}", markup=False)

    def so_far() -> list[Row]:
        timed = (row for rows in begun for row in rows if "both" in row or row["status"] != "ok")
        return [*timed, *weighed]

    def begin(problem: Problem, seconds: float) -> None:
        say(f"{next(numbers)} of {total}: {problem}")
        release()
        try:
            prepared = prepare(problem, suite.only, console, checks)
        except Exception as error:  # its tensors have no room, say, or the device is lost
            begun.append([row | {"status": failure(error)} for _, row in candidates(problem, suite.only)])
            say(f"{problem}: {failure(error)}")
            keep(so_far())
            return
        begun.append(prepared.rows)
        if suite.sweeps == 1 or prepared.round_seconds >= LONG:
            prepared.time_all(seconds, suite.fewest)
            prepared.show(console)
            keep(so_far())
        else:
            waiting.append((prepared, seconds))

    keep(so_far())
    for problem, seconds in suite.timed:
        begin(problem, seconds / speed)
    for sweep in range(1, suite.sweeps + 1) if waiting else ():
        say(f"timing {len(waiting)} problems, sweep {sweep} of {suite.sweeps}")
        for prepared, seconds in waiting:
            prepared.time_part(seconds, suite.sweeps)
            keep(so_far())
            if sweep == suite.sweeps:
                prepared.show(console)
    for problem in suite.memory:
        say(f"{next(numbers)} of {total}: memory, {problem}")
        weighed += measure_memory(problem, suite.only, console)
        keep(so_far())
    return so_far()


def forget_shapes() -> None:
    """What is compiled next is compiled for the next problem.

    Else code for any size that was compiled for a small one would serve, on one thread say, and after 8 sizes of a
    function it would run uncompiled, and say nothing.
    """
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and nothing was compiled without it
        torch._dynamo.reset()


def candidates(problem: Problem, only: tuple[str, ...]) -> Iterator[tuple[Implementation, Row]]:
    for implementation in REGISTRY:
        if implementation.loss == problem.loss and (not only or implementation.name in only):
            yield (
                implementation,
                {**asdict(problem), "implementation": implementation.name, "ours": implementation.ours},
            )


def release() -> None:
    """Gives back what a failed call held: exceptions hold frames, frames tensors, and torch keeps freed memory."""
    if torch.cuda.is_available():
        gc.collect()
        try:
            torch.cuda.empty_cache()
        except Exception:  # the device is lost: what runs next says so
            return


def broken_ours(rows: Iterable[Row]) -> list[str]:
    """What of ours failed or was wrong, on which problem, and how."""
    return [
        f"{row['implementation']}, {problem_of(row)}: {row['status']}"
        for row in rows
        if row["ours"] and broken(row["status"])
    ]


def load(implementation: Implementation, problem: Problem) -> Loss:
    """The callable, or CannotRunError."""
    if (why := reason_not_to(implementation, problem)) is not None:
        raise CannotRunError(why)
    try:
        return implementation.load(problem)
    except ImportError as error:
        raise CannotRunError(f"cannot be imported: {error}") from error


def prepare(problem: Problem, only: tuple[str, ...], console: Console, checks: Checks) -> Prepared:
    """Checks all implementations, and calls those that are right once. Says of each other why it is not timed."""
    torch.manual_seed(0)
    forget_shapes()
    leaves = WORKLOADS[problem.loss].inputs(problem)
    rows: list[Row] = []
    losses: dict[str, Loss] = {}
    steps: dict[str, Step] = {}
    round_seconds = 0.0
    for implementation, row in candidates(problem, only):
        rows.append(row)
        try:
            losses[implementation.name] = loss = load(implementation, problem)
            wrong = checks.wrong(implementation, loss, problem)
        except CannotRunError as error:
            wrong = str(error)
        except Exception as error:
            wrong = failure(error)
        row["status"] = wrong or "ok"
        if broken(row["status"]):
            release()
    if small_enough(problem) != problem:
        forget_shapes()
    for row in rows:
        if row["status"] == "ok":
            run = step(losses[row["implementation"]], leaves, problem.device)
            try:
                spent = sum(run())
                if spent > SLOW:  # to compile, perhaps
                    spent = sum(run())
            except Exception as error:
                row["status"] = failure(error)
            if row["status"] != "ok":
                release()
                continue
            if spent > SLOW:
                row["status"] = f"not timed: {spent:.0f} s a call"
                continue
            steps[row["implementation"]] = run
            round_seconds += spent
    for row in rows:
        if row["status"] != "ok":
            console.print(f"    {row['implementation']}: {row['status']}", markup=False)
    return Prepared(problem, rows, product(problem), steps, round_seconds, Times.of(steps))


def measure_memory(problem: Problem, only: tuple[str, ...], console: Console) -> list[Row]:
    """Two processes at a time where there is memory for two of any: the imports of most take longer than the loss."""
    release()
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
            except Exception as error:
                row["status"] = failure(error)
                continue
            waiting.append((implementation, row, pool.submit(memory.in_own_process, implementation, problem)))
        for implementation, row, measured in waiting:
            found = measured.result()
            if isinstance(found, str):
                row["status"] = found
            else:
                row |= {"status": "ok", "extra_bytes": found}
                console.print(f"    {implementation.name}: {found / 2**20:.1f} MB", markup=False)
    return rows
