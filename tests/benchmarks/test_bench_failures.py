"""What fails while it is measured is a row of the benchmark with its reason, and the run goes on."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from fused_contrastive.bench import run, suites
from fused_contrastive.bench.check import Truth
from fused_contrastive.bench.implementations import Implementation, named
from fused_contrastive.bench.workloads import WORKLOADS, Problem

pytestmark = pytest.mark.usefixtures("not_interpreted")

QUIET = Console(quiet=True)
CLIP, SIGLIP = Problem("clip", 48, 24), Problem("siglip", 48, 24)


def timed(*problems: Problem, sweeps: int = 1, console: Console = QUIET) -> list[run.Row]:
    suite = suites.Suite([(problem, 0.0) for problem in problems], [], sweeps=sweeps)
    return run.run_suite(suite, console, lambda rows: None)


def raises(error: Exception) -> Any:
    """A loader of a loss that fails."""

    def loss(*leaves: Any) -> Any:
        raise error

    return lambda problem: loss


NO_ROOM = "CUDA out of memory. Tried to allocate 8 GiB\nGPU 0 has a total capacity of 4 GiB"


@pytest.mark.parametrize(
    ("load", "status"),
    [
        (lambda problem: lambda x, y, scale: (x + y).sum() * scale, "WRONG: loss is off by "),
        (raises(RuntimeError("no such kernel")), "failed: RuntimeError: no such kernel"),
        (
            raises(torch.OutOfMemoryError(NO_ROOM)),
            "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 8 GiB",
        ),
    ],
)
def test_ours_failing_is_a_row_and_the_run_goes_on(load: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Implementation("ours, broken", "clip", load, ours=True)
    monkeypatch.setattr(run, "REGISTRY", [broken, named("clip", "ours"), named("siglip", "ours")])
    rows = timed(CLIP, SIGLIP)
    assert [row["status"] for row in rows[1:]] == ["ok", "ok"]
    assert all("both" in row for row in rows[1:])
    assert set(rows[0]) == run.IDENTITY | {"status"}
    assert rows[0]["status"].startswith(status)
    (told,) = run.broken_ours(rows)
    assert told.startswith(f"ours, broken, clip N = 48, D = 24, fp32: {status}")


def test_what_cannot_run_is_not_broken() -> None:
    why = (
        "ok",
        "needs cuda",
        "not run above N = 8: slow",
        "not timed: 40 s a call",
        "cannot be imported: it is not here",
    )
    row = {**CLIP.__dict__, "implementation": "ours", "ours": True}
    assert run.broken_ours([{**row, "status": status} for status in why]) == []
    assert run.broken_ours([{**row, "ours": False, "status": "failed: of a peer"}]) == []


@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_problem_that_cannot_be_made_or_timed(sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors have no room; or u fails, as all does once a GPU is lost. The next problem is timed all the same."""
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours"), named("clip", "eager"), named("siglip", "ours")])
    whole, product = WORKLOADS["clip"], run.product

    def no_room(problem: Problem) -> Any:
        raise torch.OutOfMemoryError("no room for x")

    def no_u(problem: Problem) -> Any:
        return no_room_for_u if problem.loss == "clip" else product(problem)

    def no_room_for_u() -> float:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setitem(WORKLOADS, "clip", replace(whole, inputs=no_room))
    rows = timed(CLIP, SIGLIP, sweeps=sweeps)
    assert [row["status"] for row in rows] == [*["out of memory: OutOfMemoryError: no room for x"] * 2, "ok"]
    monkeypatch.setitem(WORKLOADS, "clip", whole)
    monkeypatch.setattr(run, "product", no_u)
    rows = timed(CLIP, SIGLIP, sweeps=sweeps)
    lost = "failed: RuntimeError: CUDA error: unspecified launch failure"
    assert [row["status"] for row in rows] == [lost, lost, "ok"]


def test_a_peer_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Problem) -> Any:
        def loss(*leaves: Any) -> Any:
            raise NotImplementedError("no such kernel\nsecond line")

        return loss

    def missing(problem: Problem) -> Any:
        raise ImportError("No module named 'elsewhere'")

    others = [Implementation("fails", "clip", fails), Implementation("missing", "clip", missing)]
    others += [Implementation("gpu", "clip", fails, devices=("cuda",)), Implementation("big", "clip", fails, largest=8)]
    others.append(Implementation("matrices", "clip", fails, matrices=1e12))
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours"), *others])
    rows = {row["implementation"]: row["status"] for row in timed(CLIP)}
    assert rows.pop("matrices").startswith("its N x N tensors would take")
    assert rows == {
        "ours": "ok",
        "fails": "failed: NotImplementedError: no such kernel",
        "missing": "cannot be imported: No module named 'elsewhere'",
        "gpu": "needs cuda",
        "big": "not run above N = 8: slow, and there to check by",
    }


def test_a_peer_s_known_lack_of_a_gradient_is_allowed() -> None:
    truth = Truth(CLIP)

    def loss(x: Any, y: Any, scale: Any) -> Any:
        return WORKLOADS["clip"].eager(x, y, scale.detach())

    peer = Implementation("peer", "clip", lambda problem: loss)
    assert truth.wrong(peer, loss) == "WRONG: gives the gradient of scale as None"
    assert truth.wrong(replace(peer, no_gradient=("scale",)), loss) is None


@pytest.mark.parametrize(("sweeps", "failing"), [(1, 4), (2, 6)])  # in the third round; in the second sweep
def test_a_peer_that_fails_while_it_is_timed(sweeps: int, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a row with its reason, and the others' rounds are whole; ours as well."""
    calls = itertools.count()

    def load(problem: Problem) -> Any:
        def loss(*leaves: Any) -> Any:
            if next(calls) == failing:
                raise MemoryError("no room\nsecond line")
            return WORKLOADS["clip"].eager(*leaves)

        return loss

    weary = Implementation("weary", "clip", load)
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours"), weary])
    shown = Console(record=True, file=io.StringIO())
    rows = {row["implementation"]: row for row in timed(CLIP, sweeps=sweeps, console=shown)}
    assert rows["weary"]["status"] == "failed: MemoryError: no room"
    assert "weary: failed: MemoryError: no room" in shown.export_text()
    assert set(rows["weary"]) == run.IDENTITY | {"status"}
    assert rows["ours"]["status"] == "ok"
    assert len(rows["ours"]["rounds"]) == len(rows["ours"]["u_rounds"]) >= 3
    calls = itertools.count()
    monkeypatch.setattr(run, "REGISTRY", [replace(weary, ours=True)])
    (row,) = timed(CLIP, sweeps=sweeps)
    assert row["status"] == "failed: MemoryError: no room"
    assert set(row) == run.IDENTITY | {"status"}
    assert len(run.broken_ours([row])) == 1
