"""The configuration in use: the table's; or, with FUSED_CONTRASTIVE_AUTOTUNE=1, the fastest measured on this GPU.

Each kernel is measured once, for the dtype and D at hand (rounded up to a power of two), on random features. What was
chosen is printed, and cached on disk in $XDG_CACHE_HOME/fused_contrastive, by GPU and version of Triton.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from fused_contrastive.backends.triton import configs
from fused_contrastive.backends.triton.configs import Config, Kernel, Source
from fused_contrastive.core.spec import Forward, Needs, StatsSpec, Upstream

ENABLED = os.environ.get("FUSED_CONTRASTIVE_AUTOTUNE") == "1"
SIZE = 8192  # rows and columns of the problem to measure on

# In the interpreter, which has no speed worth measuring, two are enough to test the rest.
CANDIDATES: dict[str, list[Config]] = {
    "half": [
        Config(m, n, 64, warps, stages)
        for m, n, warps in ((128, 128, 4), (128, 128, 8), (256, 128, 8), (128, 256, 8), (64, 256, 8), (128, 64, 4))
        for stages in (2, 3, 4)
    ],
    "tf32": [Config(m, n, 32, 8, stages) for m, n in ((128, 128), (128, 64), (64, 128)) for stages in (2, 3, 4)],
    "given": [Config(m, n, 32, warps, 1) for m, n, warps in ((64, 64, 4), (32, 128, 4), (128, 64, 8))],
    "interpreter": [Config(64, 64, 32, 4, 1, group=2), Config(32, 64, 32, 4, 1, group=2)],
}


class _Trial(threading.local):
    """The configurations that this thread is measuring."""

    def __init__(self) -> None:
        self.of: dict[Kernel, Config] = {}


_trial = _Trial()


def choose(device: torch.device, source: Source, kernel: Kernel, dtype: torch.dtype, d: int) -> Config:
    """The configuration of a kernel for features of ``dtype`` and D = d."""
    if _trial.of:
        return _trial.of.get(kernel, configs.default(device, source, kernel))
    if not ENABLED:
        return configs.default(device, source, kernel)
    if kernel == "kept":  # its tiles must lie in those of the forward, which kept their exponentials
        forward = choose(device, source, "statistics", dtype, d)
        chosen = _tuned(device, source, kernel, dtype, _bucket(d))
        return chosen._replace(
            block_m=min(chosen.block_m, forward.block_m), block_n=min(chosen.block_n, forward.block_n)
        )
    return _tuned(device, source, kernel, dtype, _bucket(d))


def _bucket(d: int) -> int:
    return max(64, 1 << (d - 1).bit_length())


def cache_file(device: torch.device) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fused_contrastive" / f"{_name(device).replace(' ', '-')}-triton-{triton.__version__}.json"


def _name(device: torch.device) -> str:
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)


@functools.cache
def _tuned(device: torch.device, source: Source, kernel: Kernel, dtype: torch.dtype, d: int) -> Config:
    key = f"{source} {kernel} {str(dtype).removeprefix('torch.')} D={d}"
    path = cache_file(device)
    known = json.loads(path.read_text()) if path.is_file() else {}
    if key in known:
        return Config(**known[key])
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"FUSED_CONTRASTIVE_AUTOTUNE=1: {key} is not tuned yet and cannot be while a CUDA graph is captured; call "
            "the loss once before capturing"
        )
    times = _measure(device, source, kernel, dtype, d)
    best = min(times, key=lambda config: times[config])
    print(
        f"fused_contrastive: tuned {key} on {_name(device)}: {best} in {times[best]:.3f} ms, best of {len(times)}",
        file=sys.stderr,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}  # what another process has written meanwhile
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**known, key: best._asdict()}, indent=1))
    partial.replace(path)
    return best


def _measure(device: torch.device, source: Source, kernel: Kernel, dtype: torch.dtype, d: int) -> dict[Config, float]:
    """Milliseconds of each configuration that the device can run, the table's first."""
    candidates = CANDIDATES["interpreter" if device.type == "cpu" else source]
    default = configs.default(device, source, kernel)
    if kernel == "kept":
        forward = configs.default(device, source, "statistics")
        candidates = [c for c in candidates if c.block_m <= forward.block_m and c.block_n <= forward.block_n]
    times = {}
    for config in dict.fromkeys([default, *candidates]):
        _trial.of = {kernel: config}
        try:
            times[config] = _milliseconds(device, _work(device, kernel, dtype, d))
        except triton.runtime.errors.OutOfResources:
            continue  # too much shared memory, or too many registers, for this device
        finally:
            _trial.of = {}
    return times


def _work(device: torch.device, kernel: Kernel, dtype: torch.dtype, d: int) -> Callable[[], object]:
    """One call of the kernel, on everything it needs."""
    from fused_contrastive.backends.triton import launch

    size = 64 if device.type == "cpu" else SIZE
    generator = torch.Generator(device).manual_seed(0)  # the user's random numbers stay as they are
    features = (torch.randn(size, d, device=device, generator=generator) for _ in range(2))
    x, y = (torch.nn.functional.normalize(t, dim=1).to(dtype) for t in features)
    scale = torch.full((), 20.0, device=device)
    spec = StatsSpec(scale, kept_rows=size if kernel == "kept" else 0)
    if kernel == "sums":
        spec = spec._replace(cols=False, reduction="softplus")
    if kernel in ("statistics", "sums"):
        return lambda: launch.forward(spec, x, y)
    saved: Forward = launch.forward(spec, x, y)
    g = torch.full((size,), 1 / size, dtype=torch.float64, device=device)
    return launch.gradient_of_one_block(spec, x, y, saved, Upstream(None, g, g), Needs(True, True, True, False))


def _milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        return float(triton.testing.do_bench(work, warmup=20, rep=60, return_mode="median"))
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)
