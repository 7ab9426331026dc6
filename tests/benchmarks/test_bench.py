"""The benchmarks time what they say, do not time a wrong implementation, and report failures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import check, report, run, suites, timing
from benchmarks.check import Truth
from benchmarks.implementations import Implementation, named
from benchmarks.workloads import WORKLOADS, BenchProblem

pytestmark = pytest.mark.usefixtures("not_interpreted")

SMALL = {loss: BenchProblem(loss, 16 if loss == "max_sim" else 48, 24) for loss in WORKLOADS}
CLIP, SIGLIP = SMALL["clip"], SMALL["siglip"]


def timed(*problems: BenchProblem, say: Callable[[str], None] = lambda text: None) -> list[run.Row]:
    return run.run_suite(suites.Suite([(problem, 0.0) for problem in problems], []), say, lambda rows: None)


def loading(loss: Callable[..., Any], name: str = "broken", **properties: Any) -> Implementation:
    return Implementation(name, "clip", lambda problem: loss, **properties)


def raising(error: Exception) -> Callable[..., Any]:
    def loss(*leaves: Any) -> Any:
        raise error

    return loss


@pytest.mark.parametrize("loss", list(WORKLOADS))
def test_ours_and_eager_agree_with_the_truth(loss: str) -> None:
    """Three independent forms of each workload agree: if one were wrong, so would be every benchmark of it."""
    for name in ("ours", "ours, memory_budget=0", "ours, backend=reference", "eager"):
        assert check.wrong(named(loss, name), SMALL[loss]) is None


@pytest.mark.parametrize("loss", list(WORKLOADS))
@pytest.mark.parametrize("break_", ["value", "gradient", "missing"])
def test_what_is_wrong_is_reported_and_not_timed(loss: str, break_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = WORKLOADS[loss].eager
    wrong: dict[str, Callable[..., Any]] = {
        "value": lambda *leaves: 1.001 * right(*leaves),
        "gradient": lambda x, *rest: right(x, *rest) + 0.01 * (x - x.detach()).sum(),
        "missing": lambda x, *rest: right(x.detach(), *rest) + 0 * torch.ones((), requires_grad=True),
    }
    broken = replace(loading(wrong[break_]), loss=loss)
    monkeypatch.setattr(run, "REGISTRY", [named(loss, "ours"), broken])
    rows = {row["implementation"]: row for row in timed(SMALL[loss])}
    assert rows["ours"]["status"] == "ok"
    assert rows["broken"]["status"].startswith("WRONG: "), rows["broken"]
    assert "both" not in rows["broken"]


def test_a_known_lack_of_a_gradient_is_allowed() -> None:
    peer = loading(lambda x, y, scale: WORKLOADS["clip"].eager(x, y, scale.detach()))
    assert check.wrong(peer, CLIP) == "WRONG: gives the gradient of scale as None"
    assert check.wrong(replace(peer, no_gradient=("scale",)), CLIP) is None


def test_large_problems_are_checked_once_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CHECKED", 48 * 48)
    assert check.small_enough(BenchProblem("clip", 48, 24)) == BenchProblem("clip", 48, 24)
    assert check.small_enough(BenchProblem("clip", 192, 24)) == BenchProblem("clip", 48, 24)
    assert check.small_enough(BenchProblem("max_sim", 16, 24)).n == 1  # 32 x 49 tokens for each pair
    assert check.small_enough(BenchProblem("supcon", 98, 24)).n == 48  # 49 would leave the last one without a positive
    sizes: list[int] = []
    real = Truth.wrong

    def wrong(truth: Truth, *arguments: Any) -> str | None:
        sizes.append(len(truth.leaves["x"]))
        return real(truth, *arguments)

    monkeypatch.setattr(Truth, "wrong", wrong)
    monkeypatch.setattr(run, "REGISTRY", [loading(WORKLOADS["clip"].eager, "once")])
    assert [row["status"] for row in timed(*(BenchProblem("clip", n, 24) for n in (48, 96, 192, 20)))] == ["ok"] * 4
    assert sizes == [48, 20]


def test_timing_counts_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours")])
    (row,) = timed(CLIP)
    assert len(row["rounds"]) == len(row["u_rounds"]) == suites.FEWEST
    assert 0 < row["forward"]["median"] < row["both"]["median"]
    assert row["both"]["q20"] <= row["both"]["median"] <= row["both"]["q80"]
    assert row["seconds"] == pytest.approx(row["both"]["median"] * row["u_seconds"])


def test_each_round_has_another_order() -> None:
    """The order changes, because what ran just before an implementation decides what its caches hold."""
    called: list[str] = []

    def stepping(name: str) -> timing.Step:
        return lambda: (float(called.append(name) or 1), 1.0)

    found = timing.interleaved(lambda: 1e-3, {name: stepping(name) for name in "abc"}, 0.0, 30)
    rounds = ["".join(called[k : k + 3]) for k in range(0, len(called), 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert {len(times) for times in (found.u, *found.times.values())} == {30}


NO_ROOM = "CUDA out of memory. Tried to allocate 8 GiB\nGPU 0 has a total capacity of 4 GiB"


@pytest.mark.parametrize(
    ("loss", "status"),
    [
        (lambda x, y, scale: (x + y).sum() * scale, "WRONG: loss is off by "),
        (raising(RuntimeError("no such kernel\nsecond line")), "failed: RuntimeError: no such kernel"),
        (raising(torch.OutOfMemoryError(NO_ROOM)), "out of memory: OutOfMemoryError: CUDA out of memory. Tried"),
    ],
)
def test_ours_failing_is_a_row_and_the_run_goes_on(
    loss: Callable[..., Any], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "REGISTRY", [loading(loss, ours=True), named("clip", "ours"), named("siglip", "ours")])
    rows = timed(CLIP, SIGLIP)
    assert all("both" in row for row in rows[1:])
    assert "both" not in rows[0]
    assert rows[0]["status"].startswith(status)
    (what,) = run.broken_ours(rows)
    assert what.startswith(f"broken, clip N = 48, D = 24, fp32: {status}")


def test_a_peer_that_cannot_run_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(problem: BenchProblem) -> Any:
        raise ImportError("No module named 'elsewhere'")

    fails = raising(NotImplementedError("no such kernel"))
    others = [loading(fails, "fails"), Implementation("missing", "clip", missing), loading(fails, "big", largest=8)]
    others += [loading(fails, "gpu", devices=("cuda",)), loading(fails, "matrices", matrices=1e12)]
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours"), *others])
    rows = timed(CLIP)
    assert run.broken_ours([{**row, "ours": row["implementation"] != "fails"} for row in rows]) == []
    status = {row["implementation"]: row["status"] for row in rows}
    assert status.pop("matrices").startswith("its N x N tensors would take")
    assert status == {
        "ours": "ok",
        "fails": "failed: NotImplementedError: no such kernel",
        "missing": "cannot be imported: No module named 'elsewhere'",
        "gpu": "needs cuda",
        "big": "not run above N = 8: slow, and there to check by",
    }


def test_a_problem_that_cannot_be_made_or_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors do not fit, or u cannot be measured, as after a GPU is lost. The next problem is still timed."""
    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours"), named("clip", "eager"), named("siglip", "ours")])
    whole, product = WORKLOADS["clip"], run.product
    monkeypatch.setitem(WORKLOADS, "clip", replace(whole, inputs=raising(torch.OutOfMemoryError("no room for x"))))
    statuses = [row["status"] for row in timed(CLIP, SIGLIP)]
    assert statuses == [*["out of memory: OutOfMemoryError: no room for x"] * 2, "ok"]
    monkeypatch.setitem(WORKLOADS, "clip", whole)
    lost = raising(RuntimeError("CUDA error: unspecified launch failure"))
    monkeypatch.setattr(run, "product", lambda problem: lost if problem.loss == "clip" else product(problem))
    statuses = [row["status"] for row in timed(CLIP, SIGLIP)]
    assert statuses == [*["failed: RuntimeError: CUDA error: unspecified launch failure"] * 2, "ok"]


def test_a_step_that_fails_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported as a row with the reason and without times; the others have all their rounds."""
    calls = itertools.count()

    def weary(*leaves: Any) -> Any:
        if next(calls) == 4:  # the check, the first call and two rounds went well
            raise MemoryError("no room\nsecond line")
        return WORKLOADS["clip"].eager(*leaves)

    monkeypatch.setattr(run, "REGISTRY", [named("clip", "ours"), loading(weary, "weary", ours=True)])
    said: list[str] = []
    ours, failed = timed(CLIP, say=said.append)
    assert (failed["status"], "both" in failed) == ("failed: MemoryError: no room", False)
    assert "    weary: failed: MemoryError: no room" in said
    assert len(ours["rounds"]) == suites.FEWEST
    assert len(run.broken_ours([ours, failed])) == 1


def test_exponents() -> None:
    assert report.exponent([(1024, 3.0), (2048, 12.0), (4096, 48.0)]) == pytest.approx(2.0)
    assert report.exponent([(1024, 7.0), (2048, 7.0)]) is None
    assert report.exponent([(1024, 0.0), (2048, 5e6), (4096, 1e7)]) is None
    rows = [
        {"status": "ok", "loss": "clip", "dtype": "fp32", "d": d, "n": n, "implementation": "ours", **measured}
        for n in (256, 1024, 2048, 4096)
        for d, measured in ((512, {"seconds": n**2.0 if n > 256 else 1e6}), (256, {"extra_bytes": float(n)}))
    ]
    assert report.growth(rows) == [
        ["clip, fp32, D = 512", "ours", "2.00", ""], ["clip, fp32, D = 256", "ours", "", "1.00"]
    ]  # fmt: skip
