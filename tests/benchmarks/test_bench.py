"""The benchmark times what it says, and refuses what is wrong."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from rich.console import Console

from fused_contrastive.bench import check, growth, run, suites, timing
from fused_contrastive.bench.check import Truth, evaluate
from fused_contrastive.bench.implementations import Implementation, named
from fused_contrastive.bench.workloads import WORKLOADS, Problem

pytestmark = pytest.mark.usefixtures("not_interpreted")


QUIET = Console(quiet=True)
SMALL = {loss: Problem(loss, 16 if loss == "max_sim" else 48, 24) for loss in WORKLOADS}


def timed(problem: Problem, only: tuple[str, ...] = ()) -> list[run.Row]:
    return run.run_suite(suites.Suite([(problem, 0.0)], [], only), QUIET, lambda rows: None)


@pytest.mark.parametrize("loss", list(WORKLOADS))
def test_ours_and_eager_agree_with_the_truth(loss: str) -> None:
    """Three independent forms of each workload: were one wrong, every benchmark of it would be."""
    problem = SMALL[loss]
    truth = Truth(problem)
    for name in ("ours", "ours, memory_budget=0", "ours, backend=reference", "eager"):
        implementation = named(loss, name)
        assert truth.wrong(implementation, implementation.load(problem)) is None


@pytest.mark.parametrize("loss", list(WORKLOADS))
@pytest.mark.parametrize("break_", ["value", "gradient", "missing"])
def test_what_is_wrong_is_reported_and_not_timed(loss: str, break_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(problem: Problem) -> Any:
        right = WORKLOADS[loss].eager
        if break_ == "value":
            return lambda *leaves: 1.001 * right(*leaves)
        if break_ == "gradient":
            return lambda x, *rest: right(x, *rest) + 0.01 * (x - x.detach()).sum()
        return lambda x, *rest: right(x.detach(), *rest) + (0 if rest else 0 * torch.ones((), requires_grad=True))

    broken = Implementation("broken", loss, load)
    monkeypatch.setattr(run, "REGISTRY", [named(loss, "ours"), broken])
    rows = {row["implementation"]: row for row in timed(SMALL[loss])}
    assert rows["ours"]["status"] == "ok"
    assert rows["broken"]["status"].startswith("WRONG: "), rows["broken"]
    assert "both" not in rows["broken"]


def test_timing_counts_forward_and_backward() -> None:
    (row,) = timed(SMALL["clip"], only=("ours",))
    assert len(row["rounds"]) >= 3
    assert 0 < row["forward"]["median"] < row["both"]["median"]
    assert row["both"]["q20"] <= row["both"]["median"] <= row["both"]["q80"]
    assert row["seconds"] == pytest.approx(row["both"]["median"] * row["u_seconds"])


def test_each_round_has_another_order() -> None:
    """What runs directly behind a slow or an unlike one finds other caches than the others do."""
    called: list[str] = []

    def stepping(name: str) -> timing.Step:
        return lambda: (float(called.append(name) or 1), 1.0)

    times = timing.Times.of("abc")
    timing.interleaved(times, lambda: 1e-3, {name: stepping(name) for name in "abc"}, "abc", 0.0, 30, 30)
    rounds = ["".join(called[k : k + 3]) for k in range(0, len(called), 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert {len(seconds) for seconds in times.forward.values()} == {30}


def steps_taking(seconds: dict[str, float]) -> dict[str, timing.Step]:
    return {name: lambda both=both: (0.0, both) for name, both in seconds.items()}  # type: ignore[misc]


def test_slow_peers_take_part_in_some_rounds() -> None:
    """What is compared rounds by rounds, ours and eager, is in all; a peer that is close to the fastest as well."""
    seconds = {"ours": 9.0, "eager": 8.0, "fastest": 4.0, "close": 4.0 * 1.19, "slow": 4.0 * 1.21}
    steps = steps_taking(seconds)
    times = timing.Times.of(steps)
    timing.interleaved(times, lambda: 1.0, steps, ["ours", "eager"], 0.0, 8, 8)
    everywhere = list(range(8))
    assert times.rounds == {**dict.fromkeys(seconds, everywhere), "slow": [0, 3, 6]}
    assert times.both("slow") == [seconds["slow"]] * 3
    seconds["fastest"] = 40.0  # one slow round, another guest's doing say, is no slow peer
    steps["fastest"] = lambda: (0.0, 40.0)
    timing.interleaved(times, lambda: 1.0, steps, ["ours", "eager"], 0.0, 4, 4)
    assert times.rounds["fastest"] == list(range(12))


def test_a_slow_peer_s_rounds_are_those_of_its_u(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROUNDS", 20)
    problem, seconds = SMALL["clip"], {"ours": 1.0, "eager": 2.0, "fast": 1.0, "slow": 3.0}
    rows = [{"implementation": name, "ours": name == "ours", "status": "ok"} for name in seconds]
    steps = steps_taking(seconds)
    count = itertools.count()  # twice a round: untimed, and timed
    times = run.Times.of(steps)
    prepared = run.Prepared(problem, rows, lambda: 1.0 + next(count) // 2, steps, 0.0, times)
    monkeypatch.setattr(run, "IF_SLOW", 30)
    monkeypatch.setattr(run, "LEAST", 30)
    prepared.time_all(0.0)
    assert times.u == [1.0 + k for k in range(30)]
    by_name = {row["implementation"]: row for row in rows}
    for name in ("ours", "eager", "fast"):
        assert len(by_name[name]["rounds"]) == 20
        assert by_name[name]["u_rounds"] == by_name["ours"]["u_rounds"]
    u = by_name["slow"]["u_seconds"]
    own = [round(t * u) for t in by_name["slow"]["u_rounds"]]
    kept = [round(t * u) for t in by_name["ours"]["u_rounds"]]
    assert own == [t for t in kept if (t - 1) % 3 == 0]
    assert len(by_name["slow"]["rounds"]) == len(own)


def test_what_is_checked_at_one_size_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger problem is checked at a smaller size, and others of the family at the same."""
    monkeypatch.setattr(check, "CHECKED", 48 * 48)
    assert check.small_enough(Problem("clip", 48, 24)) == Problem("clip", 48, 24)
    assert check.small_enough(Problem("clip", 192, 24)) == Problem("clip", 48, 24)
    assert check.small_enough(Problem("max_sim", 16, 24)).n == 1  # 32 x 49 tokens for each pair
    assert check.small_enough(Problem("supcon", 98, 24)).n == 48  # 49 would leave the last one without a positive
    sizes: list[int] = []
    real = Truth.wrong

    def wrong(truth: Truth, implementation: Implementation, loss: Any) -> str | None:
        sizes.append(len(truth.leaves["x"]))
        return real(truth, implementation, loss)

    monkeypatch.setattr(Truth, "wrong", wrong)
    problems = [Problem("clip", n, 24) for n in (48, 96, 192, 20)]
    rows = run.run_suite(suites.Suite([(p, 0.0) for p in problems], [], ("ours",)), QUIET, lambda rows: None)
    assert sizes == [48, 20]
    assert [row["status"] for row in rows] == ["ok"] * 4


def test_the_rounds_kept_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every eighth of 480 rounds might have something in common."""
    problem, names, count = SMALL["clip"], [f"peer {k}" for k in range(8)], 8 * run.ROUNDS
    rows = [{"implementation": name, "ours": False, "status": "ok"} for name in names]
    prepared = run.Prepared(problem, rows, lambda: 1.0, dict.fromkeys(names, lambda: (0, 0)), 0.0, run.Times.of(names))

    def rounds(times: timing.Times, *_: Any) -> None:
        times.u.extend([1.0] * count)
        for name in names:
            times.rounds[name].extend(range(count))
            times.forward[name].extend(float(k % 8) for k in range(count))  # told apart by eighths
            times.backward[name].extend([1.0] * count)

    monkeypatch.setattr(run, "interleaved", rounds)
    prepared.time_all(0.0)
    for row in rows:
        assert len(row["rounds"]) == len(row["u_rounds"]) == run.ROUNDS
        assert row["rounds"] == rows[0]["rounds"]
        assert set(row["rounds"]) == {1.0 + k for k in range(8)}


def test_each_problem_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that a library compiles for any size, a small one first, would do for a large one what is best for small.

    And no sweep's rounds have a compilation in them.
    """
    events: list[int | str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        events.append("compiled")
        return graph.forward

    whole = torch.compile(WORKLOADS["clip"].eager, dynamic=True, backend=backend)

    def load(problem: Problem) -> Any:
        def loss(x: Any, y: Any, scale: Any) -> Any:
            value = whole(x, y, scale)
            events.append(len(x))
            return value

        return loss

    monkeypatch.setattr(run, "REGISTRY", [Implementation("any size", "clip", load)])
    problems = [Problem("clip", n, 24) for n in (16, 48)]
    run.run_suite(suites.Suite([(p, 0.0) for p in problems], [], sweeps=2), QUIET, lambda rows: None)
    compiled = [size for event, size in itertools.pairwise(events) if event == "compiled"]
    assert [size for k, size in enumerate(compiled) if k == 0 or size != compiled[k - 1]] == [16, 48] * 3


def test_sweeps_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is prepared before anything is timed; each sweep adds rounds, and what was timed is kept as it comes."""
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours"), named("siglip", "ours")])
    order: list[str] = []
    interleaved, prepare = run.interleaved, run.prepare

    def prepared(problem: Problem, *arguments: Any) -> Any:
        order.append(f"prepared {problem.loss}")
        return prepare(problem, *arguments)

    def listed(times: Any, *arguments: Any) -> None:
        before = len(times.u)
        interleaved(times, *arguments)
        order.append(f"{len(times.u) - before} rounds after {before}")

    monkeypatch.setattr(run, "interleaved", listed)
    monkeypatch.setattr(run, "prepare", prepared)
    kept: list[int] = []
    suite = suites.Suite([(SMALL["clip"], 0.0), (SMALL["siglip"], 0.0)], [], sweeps=3)
    rows = run.run_suite(suite, QUIET, lambda rows: kept.append(len(rows)))
    assert order[:2] == ["prepared clip", "prepared siglip"]
    assert order[2:] == [f"2 rounds after {before}" for before in (0, 0, 2, 2, 4, 4)]
    assert kept == [0, 1, 2, 2, 2, 2, 2]
    assert [len(row["rounds"]) for row in rows] == [6, 6]
    order.clear()
    monkeypatch.setattr(run, "LONG", 0.0)
    rows = run.run_suite(suite, QUIET, lambda rows: None)
    assert order == ["prepared clip", "4 rounds after 0", "prepared siglip", "4 rounds after 0"]
    assert [len(row["rounds"]) for row in rows] == [4, 4]


def test_exponents() -> None:
    assert growth.exponent([(1024, 3.0), (2048, 12.0), (4096, 48.0)]) == pytest.approx(2.0)
    assert growth.exponent([(1024, 7.0), (2048, 7.0), (8192, 7.0)]) == pytest.approx(0.0)
    assert growth.exponent([(1024, 7.0), (2048, 7.0)]) is None
    rows = [
        {"status": "ok", "loss": "clip", "dtype": "fp32", "d": d, "n": n, "implementation": "ours", **measured}
        for n in (256, 1024, 2048, 4096)
        for d, measured in ((512, {"seconds": n**2.0 if n > 256 else 1e6}), (256, {"extra_bytes": float(n)}))
    ]
    times, memories = growth.fit(rows)
    assert (times.d, times.time, times.memory) == (512, pytest.approx(2.0), None)
    assert (memories.d, memories.time, memories.memory) == (256, None, pytest.approx(1.0))
    assert growth.exponent([(1024, 0.0), (2048, 5e6), (4096, 1e7)]) is None


def test_gradients_are_by_name() -> None:
    leaves = WORKLOADS["clip"].inputs(SMALL["clip"])
    assert list(evaluate(WORKLOADS["clip"].eager, leaves)) == ["loss", "x", "y", "scale"]
