"""The CLIP loss on a GPU: correct first, then time in ms, in u and TFLOP/s, and peak extra memory. One JSON, one PNG.

    python benchmarks/gpu.py                          # everything: bf16, fp16, fp32; N to 131072; D to 1152
    python benchmarks/gpu.py --million                # one batch of 1,048,576, D = 512, bf16, nothing kept
    TRITON_INTERPRET=1 python benchmarks/gpu.py --toy # the same code on a CPU, at sizes its interpreter can do
    python benchmarks/gpu.py --plot results/x.json    # the PNG again

u is the time of one N x N x D torch.mm of the same dtype, measured between the others in the same process; by some
rows at a time where the N x N result would not fit. No speed is printed for an implementation whose loss or gradients
are wrong: ours stops the run; another's is reported with the reason. The error allowed, against the float64 reference,
is twice eager's and 4 roundings of the dtype.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import peers
from common import SCALE, eager, features, provenance, quantile
from fused_contrastive import clip_loss

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = [4096, 8192, 16384, 32768, 65536, 131072]
DIMS = [256, 512, 768, 1024, 1152]
CHECKED = 8192  # correctness at most at this N: the float64 reference needs its time too
FITS = 16 * 2**30  # bytes of an N x N product that u is measured on in one piece
MEMORY_FULL = 0.7  # of the device: an implementation that would need more for its N x N matrices is not run

OURS: dict[str, peers.Loss] = {
    "ours, recompute": lambda x, y, scale: clip_loss(x, y, scale, memory_budget=0, backend="triton"),
    "ours, kept": lambda x, y, scale: clip_loss(x, y, scale, memory_budget=10**15, backend="triton"),
}
N_BY_N = {"eager": 5, "torch.compile": 3, "ours, kept": 1}  # N x N matrices held, at least


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


AHEAD = 4_000_000  # clocks that the device waits, about 2 ms, while the host queues what is timed


def elapsed(run: Callable[[], object]) -> float:
    """Seconds on the device, the host ahead of it: else a small problem's time would be that of its launches."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def gradients(loss: peers.Loss, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    value = loss(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-300))


def errors(loss: peers.Loss, leaves: tuple[Tensor, ...], truth: list[Tensor]) -> list[float]:
    return [relative(a, b) for a, b in zip(gradients(loss, leaves), truth, strict=True)]


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def wrong(name: str, loss: peers.Loss, leaves: tuple[Tensor, ...], truth: list[Tensor], allowed: list[float]) -> str:
    """What is wrong with an implementation, or ""."""
    try:
        found = errors(loss, leaves, truth)
    except Exception as error:
        return f"cannot run: {described(error)}"
    for what, error, limit in zip(("loss", "dx", "dy", "dscale"), found, allowed, strict=True):
        if what == "dscale" and name == "memeff":
            continue  # it has none
        if not error <= limit:
            return f"WRONG: {what} is off by {error:.1e}, allowed {limit:.1e}"
    return ""


def check(losses: dict[str, peers.Loss], n: int, d: int, dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with each implementation."""
    leaves = features(n, d, dtype, device())
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    truth = gradients(lambda x, y, scale: clip_loss(x, y, scale, backend="reference"), exact)
    allowed = [2 * e + 4 * torch.finfo(dtype).eps for e in errors(eager, leaves, truth)]
    return {name: why for name, loss in losses.items() if (why := wrong(name, loss, leaves, truth, allowed))}


def gemm(n: int, d: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A product of rows of N x N x D, and how many of it make the whole."""
    parts = max(1, -(-n * n * dtype.itemsize // FITS))
    x, y = (torch.randn(rows, d, device=device()).to(dtype) for rows in (-(-n // parts), n))
    return lambda: torch.mm(x, y.T), parts


def measure(loss: peers.Loss, n: int, d: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Forward, backward and u in turns; then the peak of memory above inputs, gradients and loss."""
    leaves = features(n, d, dtype, device())
    product, parts = gemm(n, d, dtype)
    times: dict[str, list[float]] = {"u": [], "forward": [], "backward": [], "both": []}
    for warm_up in (True, False):
        stop = time.perf_counter() + (0 if warm_up else seconds)
        while len(times["u"]) < 3 or time.perf_counter() < stop:
            times["u"].append(parts * elapsed(product))
            held: list[Tensor] = []
            times["forward"].append(elapsed(lambda held=held: held.append(loss(*leaves))))
            times["backward"].append(elapsed(lambda held=held: torch.autograd.grad(held[0], leaves, allow_unused=True)))
            del held
            times["both"].append(elapsed(lambda: gradients(loss, leaves)))
        if warm_up:
            times = {name: [] for name in times}
    row: dict[str, Any] = {}
    u = statistics.median(times["u"])
    for name, values in times.items():
        row[f"{name}_ms"] = 1e3 * statistics.median(values)
        row[f"{name}_ms_20_80"] = [1e3 * quantile(values, 0.2), 1e3 * quantile(values, 0.8)]
        row[f"{name}_u"] = statistics.median(values) / u
    row["gemm_tflops"] = 2 * n * n * d / u / 1e12
    # The products that forward and backward need at least: 3.
    row["tflops"] = 3 * 2 * n * n * d / statistics.median(times["both"]) / 1e12
    row["percent_of_gemm"] = 100 * row["tflops"] / row["gemm_tflops"]
    row["extra_bytes"] = extra_memory(loss, leaves)
    return row


def extra_memory(loss: peers.Loss, leaves: tuple[Tensor, ...]) -> int | None:
    if not torch.cuda.is_available():
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = gradients(loss, leaves)
    wait()
    return torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.itemsize for t in results)


def fits(name: str, n: int, dtype: torch.dtype) -> bool:
    if not torch.cuda.is_available():
        return True
    total = torch.cuda.get_device_properties(0).total_memory
    return N_BY_N.get(name, 0) * n * n * dtype.itemsize < MEMORY_FULL * total


def sweep(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each implementation, dtype and size."""
    others, missing = peers.available()
    if options.no_compile:
        del others["torch.compile"]
    for name, why in missing.items():
        print(f"not here: {name}: {why}")
    losses = {**OURS, **others}
    for dtype_name, d in itertools.product(options.dtypes, options.dims):
        dtype, checked = DTYPES[dtype_name], {}
        for n in options.sizes:
            torch._dynamo.reset()  # after 8 shapes of one function it would run uncompiled, and say nothing
            if min(n, CHECKED) not in checked:
                checked[min(n, CHECKED)] = check(losses, min(n, CHECKED), d, dtype)
            broken = checked[min(n, CHECKED)]
            for name in OURS:
                if name in broken:
                    raise SystemExit(f"{name}, {dtype_name}, N = {n}, D = {d}: {broken[name]}; nothing is timed")
            for name, loss in losses.items():
                row = {"implementation": name, "dtype": dtype_name, "n": n, "d": d}
                if name in broken:
                    row["failed"] = broken[name]
                elif not fits(name, n, dtype):
                    row["failed"] = "would not fit in memory"
                else:
                    try:
                        row |= measure(loss, n, d, dtype, options.seconds)
                    except torch.OutOfMemoryError:
                        row["failed"] = "out of memory"
                    except Exception as error:
                        if name in OURS:
                            raise
                        row["failed"] = described(error)
                yield row
                print(line(row), flush=True)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    head = f"{row['dtype']} N={row['n']:<7} D={row['d']:<5} {row['implementation']:<28}"
    if "both_ms" not in row:
        return f"{head} {row['failed']}"
    memory = "" if row["extra_bytes"] is None else f", {row['extra_bytes'] / 2**20:.0f} MiB extra"
    return (
        f"{head} {row['both_ms']:9.3f} ms = {row['both_u']:.2f} u (forward {row['forward_u']:.2f}, backward "
        f"{row['backward_u']:.2f}), {row['percent_of_gemm']:.0f}% of {row['gemm_tflops']:.0f} TFLOP/s{memory}"
    )


def million(n: int, d: int) -> Iterator[dict[str, Any]]:
    """One step at a batch no N x N matrix of which would fit anywhere."""
    leaves = features(n, d, torch.bfloat16, device())
    loss = OURS["ours, recompute"]
    # Compiles all that the whole needs: several blocks, and long vectors.
    gradients(loss, tuple(t[:65536].detach().requires_grad_() if t.dim() else t for t in leaves))
    seconds = elapsed(lambda: gradients(loss, leaves))
    row = {"implementation": "ours, recompute", "dtype": "bf16", "n": n, "d": d, "both_ms": 1e3 * seconds}
    row["extra_bytes"] = extra_memory(loss, leaves)
    row["loss"] = float(loss(*leaves).detach())
    print(row)
    yield row


def plot(path: Path) -> None:
    """Forward + backward in u against N, one panel per dtype and D."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[tuple[str, int], dict[str, list[tuple[int, float]]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if "both_u" in row:
            panel = curves.setdefault((row["dtype"], row["d"]), {})
            panel.setdefault(row["implementation"], []).append((row["n"], row["both_u"]))
    columns = max(1, len({d for _, d in curves}))
    down = max(1, -(-len(curves) // columns))
    figure, axes = pyplot.subplots(down, columns, figsize=(3.4 * columns, 3 * down), squeeze=False)
    for axis, ((dtype, d), panel) in zip(axes.flat, sorted(curves.items()), strict=False):
        for name, points in panel.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        axis.set(title=f"{dtype}, D = {d}", xscale="log", ylim=(0, 14), xlabel="N", ylabel="forward + backward, u")
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring for each row")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--toy", action="store_true", help="sizes for Triton's interpreter")
    parser.add_argument("--million", action="store_true", help="one batch of 1,048,576 alone")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/<device>-<date>.json")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw its PNG and do nothing else")
    options = parser.parse_args()
    if options.plot:
        plot(options.plot)
        return
    if options.toy:
        options.sizes, options.dims, options.seconds, options.no_compile = [65], [20, 33], 0.0, True
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    head = f"{name}, {provenance()}, triton {triton.__version__}, scale {SCALE}"
    print(head)
    rows = million(257 if options.toy else 1_048_576, 16 if options.toy else 512) if options.million else sweep(options)
    stem = f"{name.replace(' ', '-').lower()}-{time.strftime('%Y-%m-%d')}{'-million' if options.million else ''}"
    out = options.out or RESULTS / f"{stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    for row in rows:  # written after each, so that a run cut short has lost nothing
        done.append(row)
        out.write_text(json.dumps({"provenance": head, "rows": done}, indent=1))
    print(out)
    if not options.million:
        try:
            plot(out)
        except ImportError as error:
            print(f"no PNG: {error}; draw it elsewhere with --plot {out}")


if __name__ == "__main__":
    main()
