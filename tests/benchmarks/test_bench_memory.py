"""The benchmark measures peak memory, and tells why where it cannot."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fused_contrastive.bench import memory, run
from fused_contrastive.bench.implementations import Implementation, named
from fused_contrastive.bench.workloads import Problem

pytestmark = pytest.mark.usefixtures("not_interpreted")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux")

SMALL = Problem("clip", 48, 24)


@LINUX
def test_memory_sees_one_matrix() -> None:
    """Eager holds at least two N x N at N = 2048 (16 MB each), ours with budget 0 a block of one."""
    problem = Problem("clip", 2048, 16)
    found = {name: memory.in_own_process(named("clip", name), problem) for name in ("eager", "ours, memory_budget=0")}
    assert 32 * 2**20 < found["eager"] < 160 * 2**20  # type: ignore[operator]
    assert found["ours, memory_budget=0"] < 32 * 2**20  # type: ignore[operator]


def test_memory_says_what_went_wrong() -> None:
    found = memory.in_own_process(Implementation("nobody's", "clip", lambda problem: None), SMALL)  # type: ignore[arg-type, return-value]
    assert isinstance(found, str)
    assert found.startswith("failed: ValueError: implementation: got \"nobody's\" for 'clip', expected one of ours")


def killed(answer: Any, output: str, name: str, problem: Problem) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended(answer: Any, output: str, name: str, problem: Problem) -> None:
    Path(output).write_text("first line\nno room left\n")
    os._exit(3)


@LINUX
@pytest.mark.parametrize(
    ("end", "told"),
    [
        (killed, "failed: ended by signal 9, perhaps for want of memory"),
        (ended, "failed: exited with 3, and said 'no room left'"),
    ],
)
def test_a_measurement_that_ends_early_is_told(end: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_measure", end)
    assert memory.in_own_process(named("clip", "ours"), SMALL) == told


@LINUX
def test_ours_failing_is_a_row_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two processes one is told to load what the registry of its own does not have."""

    def lost(problem: Problem) -> Any:
        raise RuntimeError("the GPU is lost")

    ours = [Implementation(name, "clip", lambda problem: None, ours=True) for name in ("nobody's", "unloadable")]  # type: ignore[arg-type, return-value]
    ours[1] = replace(ours[1], load=lost)
    monkeypatch.setattr(run, "REGISTRY", [*ours, named("clip", "eager")])
    rows = run.measure_memory(SMALL, (), Console(quiet=True))
    assert rows[0]["status"].startswith('failed: ValueError: implementation: got "nobody\'s"')
    assert [row["status"] for row in rows[1:]] == ["failed: RuntimeError: the GPU is lost", "ok"]
    assert len(run.broken_ours(rows)) == 2


@LINUX
def test_memory_is_measured_where_there_is_no_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._starter.cache_clear()
    monkeypatch.setattr(memory.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    try:
        assert isinstance(memory.in_own_process(named("clip", "eager"), SMALL), int)
        assert memory._starter().get_start_method() == "spawn"
    finally:
        memory._starter.cache_clear()


@LINUX
def test_where_memory_cannot_be_measured_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    rows = run.measure_memory(SMALL, ("ours",), Console(quiet=True))
    assert [row["status"] for row in rows] == ["resident memory is measured by Linux's /proc/self/clear_refs"]
