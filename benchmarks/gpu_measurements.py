"""What `gpu_day.py` measures itself: one step of each loss against float64, and the times of a batch's parts in u."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_contrastive import clip_loss, contrastive_stats, info_nce_loss, siglip_loss
from fused_contrastive.bench import check, memory, timing
from fused_contrastive.bench.implementations import failure, named, reason_not_to
from fused_contrastive.bench.run import release
from fused_contrastive.bench.workloads import DTYPES, WORKLOADS, Problem
from fused_contrastive.core.budget import Deviation
from fused_contrastive.core.memory import total_memory
from fused_contrastive.testing import harness
from fused_contrastive.testing.cases import Case
from fused_contrastive.testing.registry import LOSSES as REGISTRY
from fused_contrastive.testing.registry import Sizes

if TYPE_CHECKING:
    from gpu_day import Entry, Turn

LOSSES = ("clip", "siglip", "info_nce", "nt_xent", "supcon", "max_sim")
SCALE = 14.3
LARGE = 2**50  # a memory budget that keeps everything
ROUNDS, FEWEST, LONG = 15, 5, 3.0  # fewer where they take longer than so many seconds

Results = dict[str, Tensor]
Judge = Callable[[Results], list[Deviation]]


def attempt(turn: Turn, row: str, column: str, work: Callable[[], Entry]) -> Entry:
    """What ``work`` found, or why it did not."""
    entry: Entry = {"row": row, "column": column, "status": "ok"}
    if turn.left() <= 0:
        return entry | {"status": "not started: no time left"}
    try:
        return entry | work()
    except Exception as error:
        entry["status"] = failure(error)
    release()
    return entry


def correctness(turn: Turn) -> Iterator[Entry]:
    """One step of each loss, in each dtype, against float64; twice, with the same bits."""
    for dtype in [turn.part or "bf16"]:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        for loss in LOSSES:
            for kept in (0,) if turn.toy else (0, "auto"):
                problem = functools.partial(checked, turn, loss, dtype, backend="triton", memory_budget=kept)
                yield attempt(turn, f"{loss}, memory_budget={kept}", dtype, problem)


def checked(turn: Turn, loss: str, dtype: str, **how: Any) -> Entry:
    """The largest part of its error budget that a value or gradient uses."""
    kind = of_tokens if loss == "max_sim" else functools.partial(of_case, loss)
    evaluate, judge = kind(turn, dtype.replace("tf32", "fp32"), how)
    results, again = evaluate(), evaluate()
    worst = max(judge(results), key=lambda deviation: deviation.share)
    found = {"value": f"{worst.share:.2f}", "worst": worst.quantity}
    if worst.share > 1:
        wrong = f"{worst.quantity} is off by {worst.error:.1e}, allowed {worst.allowed:.1e}"
        return found | {"status": f"WRONG: {wrong}"}
    if differing := [name for name in results if not torch.equal(results[name], again[name])]:
        return found | {"status": f"WRONG: two runs differ in {', '.join(differing)}"}
    return found


def size(turn: Turn) -> tuple[int, int]:
    return (20, 20) if turn.toy else (2100, 512)


def of_case(loss: str, turn: Turn, dtype: str, how: dict[str, Any]) -> tuple[Callable[[], Results], Judge]:
    n, d = size(turn)
    case = Case(loss, next(iter(REGISTRY[loss].options)), Sizes(n, d, DTYPES[dtype], SCALE), seed=0)
    leaves, options = case.inputs(turn.device)
    return (
        lambda: harness.evaluate(functools.partial(case.member.ours, **how), leaves, options),
        lambda results: harness.expected(case, turn.device).deviations(results),
    )


def of_tokens(turn: Turn, dtype: str, how: dict[str, Any]) -> tuple[Callable[[], Results], Judge]:
    """max_sim, judged as the benchmark does."""
    truth = check.Truth(Problem("max_sim", *((2, 16) if turn.toy else (96, 128)), dtype, turn.device))

    def judge(results: Results) -> list[Deviation]:
        errors = truth.errors(results)
        return [Deviation(name, error, 0.0, truth.allowed[name]) for name, error in errors.items()]

    return lambda: check.evaluate(functools.partial(WORKLOADS["max_sim"].ours, **how), truth.leaves), judge


def table(turn: Turn) -> Iterator[Entry]:
    """bf16: medians of the GPU's own seconds, over those of u, and the memory that a step takes."""
    for n in (20,) if turn.toy else (8192, 32768, 65536):
        for d in (20,) if turn.toy else (512, 768, 1024):
            problem = Problem("clip", n, d, "bf16", turn.device)
            yield from timed(turn, problem)
            for name in ("ours, memory_budget=0", "ours", "eager"):
                extra = functools.partial(extra_memory, name, problem)
                yield attempt(turn, f"extra memory, {name}", f"{n} x {d}", extra)


def extra_memory(name: str, problem: Problem) -> Entry:
    implementation = named("clip", name)
    if why := reason_not_to(implementation, problem) or memory.cannot_measure(problem.device):
        return {"status": why}
    extra = memory.extra_bytes(implementation, problem)
    return {"value": f"{extra / 2**20:.0f} MB", "extra_bytes": extra}


def timed(turn: Turn, problem: Problem) -> Iterator[Entry]:
    column = f"{problem.n} x {problem.d}"
    release()
    runs = quantities(problem)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started, rounds = time.monotonic(), 0

    def over() -> bool:
        """Whether to make do with what was timed."""
        return rounds > 1 and turn.left() <= 0

    # In turns, so that all meet the same clock of the GPU; the first round compiles, and does not count.
    while runs and rounds <= (1 if turn.toy else ROUNDS):
        if over() or (rounds > FEWEST and time.monotonic() - started > LONG):
            break
        for name, run in list(runs.items()):
            if over():
                break
            entry = attempt(turn, name, column, lambda run=run: {"seconds": run()})  # type: ignore[misc]
            if entry["status"] == "ok":
                seconds[name].append(entry["seconds"])
            else:
                del runs[name], seconds[name]
                yield entry
        rounds += 1
        if rounds == 1:
            started = time.monotonic()
    medians = {name: statistics.median(some[1:]) for name, some in seconds.items() if some[1:]}
    u = medians.pop("u", None)
    if u is not None:
        value = f"{1e3 * u:.2f} ms, {2 * problem.n**2 * problem.d / u / 1e12:.0f} TFLOP/s"
        yield {"row": "u", "column": column, "status": "ok", "value": value, "seconds": u, "rounds": rounds - 1}
    for name, median in medians.items():
        value = f"{median / u:.2f}" if u else f"{1e3 * median:.2f} ms"
        yield {"row": name, "column": column, "status": "ok", "value": value, "seconds": median}


def quantities(problem: Problem) -> dict[str, Callable[[], float]]:
    """Seconds of one call of each thing that is timed. u is one N x N x D product of the vendor's."""
    leaves = WORKLOADS["clip"].inputs(problem)

    def forward(grad: bool, kept: int) -> float:
        watch = timing.Watch(problem.device)
        with torch.set_grad_enabled(grad):
            watch.start()
            contrastive_stats(*leaves.values(), memory_budget=kept, backend="triton")
            return watch.stop()[0]

    def step(loss: Callable[..., Tensor], **options: Any) -> Callable[[], float]:
        run = timing.step(functools.partial(loss, **options), leaves, problem.device)
        return lambda: sum(run())

    def info_nce(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
        return info_nce_loss(x, y, logit_scale=scale, **options)

    def siglip(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
        return siglip_loss(x, y, scale, -10.0, **options)

    found: dict[str, Callable[[], float]] = {
        "u": timing.product(problem),
        "forward": functools.partial(forward, False, 0),
    }
    budgets: dict[str, Any] = {"nothing kept": 0, "auto": "auto"}
    if 2 * problem.n**2 <= total_memory(problem.device, None) / 4:
        found["forward, everything kept"] = functools.partial(forward, True, LARGE)
        found["clip step, everything kept"] = step(clip_loss, memory_budget=LARGE, backend="triton")
    for name, loss in (("clip", clip_loss), ("siglip", siglip), ("info_nce", info_nce)):
        for how, kept in budgets.items():
            found[f"{name} step, {how}"] = step(loss, memory_budget=kept, backend="triton")
    if reason_not_to(named("clip", "eager"), problem) is None:
        found["clip step, eager"] = step(WORKLOADS["clip"].eager)
    return found
