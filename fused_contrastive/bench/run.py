"""Runs a suite: for each problem every implementation that can, checked, then timed in turns; then memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

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
from fused_contrastive.bench.timing import in_units, interleaved, probe, product, quantile, step
from fused_contrastive.bench.workloads import WORKLOADS, Loss, Problem

ROUNDS = 60  # of an implementation, kept for `compare`, from the whole time
SLOW = 30.0  # seconds of a call, beyond which an implementation is not timed

Row = dict[str, Any]  # a problem's fields, "implementation", "status"; if that is "ok", what was measured


def run_suite(suite: Suite, console: Console, keep: Callable[[list[Row]], None], speed: float = 1.0) -> list[Row]:
    """Rows of all timed problems and of all measured memory. ``keep`` gets the rows so far, after each problem."""
    started = time.monotonic()
    rows: list[Row] = []
    total = len(suite.timed) + len(suite.memory)
    for k, (problem, seconds) in enumerate(suite.timed):
        console.print(f"[{k + 1} / {total}, {time.monotonic() - started:.0f} s] {problem}", markup=False)
        rows += time_problem(problem, seconds / speed, suite.only, console)
        keep(rows)
    for k, problem in enumerate(suite.memory, len(suite.timed)):
        console.print(f"[{k + 1} / {total}, {time.monotonic() - started:.0f} s] memory, {problem}", markup=False)
        rows += measure_memory(problem, suite.only, console)
        keep(rows)
    return rows


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


def time_problem(problem: Problem, seconds: float, only: tuple[str, ...], console: Console) -> list[Row]:
    torch.manual_seed(0)
    torch._dynamo.reset()  # after 8 shapes of one function it would run uncompiled, and say nothing
    smaller = replace(problem, n=min(problem.n, CHECKED))
    truth = Truth(smaller)
    leaves = truth.leaves if smaller == problem else WORKLOADS[problem.loss].inputs(problem)
    rows, steps = [], {}
    for implementation, row in candidates(problem, only):
        rows.append(row)
        try:
            loss = load(implementation, problem)
            wrong = truth.wrong(implementation, loss)
            if wrong is None:
                run = step(loss, leaves, problem.device)
                first = sum(run())  # compiles, tunes, touches memory
                wrong = f"not timed: {first:.0f} s a call" if first > SLOW else None
        except CannotRunError as error:
            wrong = str(error)
        except Exception as error:  # a peer's failure is a result; ours is not
            if implementation.ours:
                raise
            wrong = f"failed: {described(error)}"
        row["status"] = wrong or "ok"
        if wrong is None:
            steps[implementation.name] = run
        if wrong and wrong.startswith("WRONG") and implementation.ours:
            raise AssertionError(f"{implementation.name}, {problem}: {wrong}; nothing is timed")
    del truth
    times = interleaved(product(problem), probe(problem.device), steps, seconds)
    u = statistics.median(times.u)
    for row in rows:
        name = row["implementation"]
        if row["status"] != "ok":
            console.print(f"    {name}: {row['status']}", markup=False)
            continue
        both = times.both(name)
        row |= {
            "u_seconds": u,
            "u_spread": [quantile(times.u, q) / u for q in (0.2, 0.8)],
            "seconds": statistics.median(both),
            "unit_tflops": 2 * math.prod(WORKLOADS[problem.loss].unit(problem)) / u / 1e12,
        }
        if times.probe:
            row["probe"] = statistics.median(times.probe) / u
        row |= {"both": in_units(both, u), "forward": in_units(times.forward[name], u)}
        row |= {
            "backward": in_units(times.backward[name], u),
            "rounds": [round(t / u, 4) for t in both[:: -(-len(both) // ROUNDS)]],
        }
        line = f"{row['both']['median']:.2f} u ({row['both']['q20']:.2f}..{row['both']['q80']:.2f})"
        console.print(f"    {name}: {line}, {len(both)} rounds", markup=False)
    return rows


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
