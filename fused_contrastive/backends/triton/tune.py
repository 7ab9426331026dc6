"""The configuration in use: the table's; or, with FUSED_CONTRASTIVE_AUTOTUNE=1, the fastest measured on this GPU.

Each kernel is measured once for each dtype and D (rounded up to a power of two) that it meets, on random features. The
choice is printed, and cached on disk in $XDG_CACHE_HOME/fused_contrastive by GPU and version of Triton. A cache file
that is damaged or cannot be written is named in one warning per process, and the kernels are measured again.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fused_contrastive.backends.triton import configs
from fused_contrastive.backends.triton.configs import Config, Kernel, Source
from fused_contrastive.backends.triton.device import Device
from fused_contrastive.core import warn

ENABLED = os.environ.get("FUSED_CONTRASTIVE_AUTOTUNE") == "1"
# Two are enough for the interpreter, whose speed is not worth measuring: they test the tuning itself.
CANDIDATES: dict[str, list[Config]] = {
    "half": [
        Config(m, n, 64, warps, stages)
        for m, n, warps in ((128, 128, 4), (128, 128, 8), (256, 128, 8), (128, 256, 8), (64, 256, 8), (128, 64, 4))
        for stages in (2, 3, 4)
    ],
    "tf32": [Config(m, n, 32, 8, stages) for m, n in ((128, 128), (128, 64), (64, 128)) for stages in (2, 3, 4)],
    "gemm": [Config(m, n, 32, warps, 1) for m, n, warps in ((64, 64, 4), (32, 128, 4), (128, 64, 8))],
    "interpreter": [Config(64, 32, 32, 4, 1, group=2), Config(32, 32, 32, 4, 1, group=2)],
}


class Trial(NamedTuple):
    """One thing to tune: a kernel for features of ``dtype`` and D = ``d``, on a device."""

    device: Device
    source: Source
    kernel: Kernel
    dtype: torch.dtype
    d: int

    def __str__(self) -> str:
        return f"{self.source} {self.kernel} {str(self.dtype).removeprefix('torch.')} D={self.d}"

    @property
    def candidates(self) -> list[Config]:
        """The table's configuration, then others. For statistics, all have the strip length of the table's."""
        table = configs.default(self.device, self.source, self.kernel)
        listed = CANDIDATES["interpreter" if self.device.interpreted else self.source]
        if self.kernel == "statistics":
            folds = [c.warps if table.fold and c.block_m >= 16 * c.warps else 0 for c in listed]
            listed = [c._replace(strip=table.strip, fold=fold) for c, fold in zip(listed, folds, strict=True)]
        if self.kernel == "kept":  # its tiles must lie in those of the forward, which kept their exponentials
            forward = configs.default(self.device, self.source, "statistics")
            listed = [c for c in listed if c.block_m <= forward.block_m and c.block_n <= forward.block_n]
        return list(dict.fromkeys([table, *listed]))


Work = Callable[[Trial], Callable[[], object]]
"""Makes, for a trial, a function that runs the kernel once on random features; it is called repeatedly."""


class _Trial(threading.local):
    """The configurations that this thread is measuring."""

    def __init__(self) -> None:
        self.of: dict[Kernel, Config] = {}


_trial = _Trial()
_writing = threading.Lock()


def choose(device: Device, source: Source, kernel: Kernel, dtype: torch.dtype, d: int, work: Work) -> Config:
    """The configuration of a kernel for features of ``dtype`` and D = d."""
    table = configs.default(device, source, kernel)
    if _trial.of:
        return _trial.of.get(kernel, table)
    if not ENABLED:
        return table
    chosen = _tuned(Trial(device, source, kernel, dtype, _bucket(d)), work)
    if kernel == "kept":  # as in Trial.candidates, with the configuration that the forward has chosen
        forward = choose(device, source, "statistics", dtype, d, work)
        chosen = chosen._replace(
            block_m=min(chosen.block_m, forward.block_m), block_n=min(chosen.block_n, forward.block_n)
        )
    return chosen


def _bucket(d: int) -> int:
    return max(64, 1 << (d - 1).bit_length())


def cache_file(device: Device) -> Path | None:
    """Where the choices for a device are remembered; None where there is no home folder."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        _without_cache("XDG_CACHE_HOME", "got none, and there is no home folder", "choices are not remembered")
        return None
    return Path(root, "fused_contrastive", f"{device.name.replace(' ', '-')}-triton-{triton.__version__}.json")


def _without_cache(where: Path | str, why: str, then: str) -> None:
    warn.once("autotune cache", f"fused_contrastive: FUSED_CONTRASTIVE_AUTOTUNE=1: {where}: {why}; {then}")


def _read(path: Path) -> dict[str, dict[str, int]]:
    """The remembered choices; an unreadable file or a malformed entry is ignored after a warning."""
    again = "configurations are measured again, and the file is replaced"
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        _without_cache(path, f"got no readable file ({error.strerror})", "configurations are measured again")
        return {}
    except (RecursionError, ValueError) as error:  # also raised for bytes that are not text
        _without_cache(path, f"got no JSON ({error}), expected configurations by kernel", again)
        return {}
    if not isinstance(known, dict):
        _without_cache(path, f"got a JSON {type(known).__name__}, expected configurations by kernel", again)
        return {}
    for key in [key for key, entry in known.items() if not _well_formed(entry)]:
        del known[key]
        _without_cache(path, f"{key[:99]!r}: expected the integers {', '.join(Config._fields)}, got others", again)
    return known


def _well_formed(entry: object) -> bool:
    integers = isinstance(entry, dict) and all(type(value) is int for value in entry.values())
    return integers and set(entry) == set(Config._fields)  # type: ignore[call-overload]


def _remembered(trial: Trial, path: Path) -> Config | None:
    """The remembered choice, if it is a candidate; another could compute wrong values."""
    if (entry := _read(path).get(str(trial))) is None:
        return None
    if (config := Config(**entry)) in trial.candidates:
        return config
    why = f"got {config} for {trial}, expected one of the {len(trial.candidates)} configurations that are measured"
    _without_cache(path, why, "they are measured again, and the entry is replaced")
    return None


def _remember(trial: Trial, best: Config, path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with _writing:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = _read(path)  # what another thread or process has written meanwhile
            try:
                partial.write_text(json.dumps({**known, str(trial): best._asdict()}, indent=1))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            _without_cache(path, why, "what is chosen is not remembered for other processes")


@functools.cache
def _tuned(trial: Trial, work: Work) -> Config:
    path = cache_file(trial.device)
    key = str(trial)
    if path is not None and (known := _remembered(trial, path)) is not None:
        return known
    if trial.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"FUSED_CONTRASTIVE_AUTOTUNE=1: {key} is not tuned yet and cannot be while a CUDA graph is captured; call "
            "the loss once before capturing"
        )
    times = _measure(trial, work)
    best = min(times, key=lambda config: times[config])
    print(
        f"fused_contrastive: tuned {key} on {trial.device.name}: {best} in {times[best]:.3f} ms, best of {len(times)}",
        file=sys.stderr,
    )
    if path is not None:
        _remember(trial, best, path)
    return best


def _measure(trial: Trial, work: Work) -> dict[Config, float]:
    """Milliseconds of each configuration that the device can run, the table's first."""
    times = {}
    for config in trial.candidates:
        _trial.of = {trial.kernel: config}
        try:
            times[config] = _milliseconds(trial.device, work(trial))
        except triton.runtime.errors.OutOfResources:
            continue  # too much shared memory, or too many registers, for this device
        finally:
            _trial.of = {}
    return times


def _milliseconds(device: Device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        return float(triton.testing.do_bench(work, warmup=20, rep=60, return_mode="median"))
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)
