"""The benchmarks measure peak memory, and report why where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import memory, run
from benchmarks.implementations import Implementation, named
from benchmarks.workloads import BenchProblem

pytestmark = [
    pytest.mark.usefixtures("not_interpreted"),
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux"),
]
SMALL = BenchProblem("clip", 48, 24)


def test_memory_sees_one_matrix() -> None:
    """Eager holds at least two N x N matrices at N = 2048 (16 MB each), ours with budget 0 a block of one matrix."""
    problem = BenchProblem("clip", 2048, 16)
    found = {name: memory.measure(named("clip", name), problem) for name in ("eager", "ours, memory_budget=0")}
    assert 32 * 2**20 < found["eager"]["extra_bytes"] < 160 * 2**20
    assert found["ours, memory_budget=0"]["extra_bytes"] < 32 * 2**20


@pytest.mark.parametrize("loss", ["clip", "nt_xent", "supcon"])
def test_ours_takes_64_mb_of_products_and_copies_and_little_more(loss: str) -> None:
    assert memory.measure(named(loss, "ours"), BenchProblem(loss, 8192, 256))["extra_bytes"] < 88 * 2**20


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["-c", "import os; os.kill(os.getpid(), 9)"], "failed: ended by signal 9, perhaps for want of memory"),
        (["-c", "import sys; sys.exit('first line\\nno room')"], "failed: exited with 1, and said 'no room'"),
    ],
)
def test_a_measurement_that_ends_early(command: list[str], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, **options: start([words[0], *command], **options))
    assert memory.measure(named("clip", "ours"), SMALL) == {"status": status}


def test_ours_failing_is_a_row_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the first implementation is told to load one that its registry does not have."""

    def lost(problem: BenchProblem) -> Any:
        raise RuntimeError("the GPU is lost")

    nobody = Implementation("nobody's", "clip", lambda problem: None, ours=True)  # type: ignore[arg-type, return-value]
    unloadable = Implementation("unloadable", "clip", lost, ours=True)
    monkeypatch.setattr(run, "REGISTRY", [nobody, unloadable, named("clip", "eager")])
    rows = run.measure_memory(SMALL, ())
    assert rows[0]["status"].startswith("failed: ValueError: implementation: got \"nobody's\" for 'clip', expected one")
    assert [row["status"] for row in rows[1:]] == ["failed: RuntimeError: the GPU is lost", "ok"]
    assert len(run.broken_ours(rows)) == 2


def test_where_memory_cannot_be_measured_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    rows = run.measure_memory(SMALL, ("ours",))
    assert [row["status"] for row in rows] == ["resident memory is measured by Linux's /proc/self/clear_refs"]
