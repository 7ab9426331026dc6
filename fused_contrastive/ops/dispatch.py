"""Chooses a backend. Nothing falls back silently: a backend that cannot run raises and says how to get it.

"auto" without the compiled extension is the reference, after a warning that says the same: results are the same, too.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fused_contrastive.backends import cpp, reference, triton
from fused_contrastive.backends.contract import Backend
from fused_contrastive.core import checks, compiler

BACKENDS: dict[str, Backend] = {"reference": reference, "cpp": cpp, "triton": triton}
_AUTO = {"cpu": "cpp", "cuda": "triton"}  # device types not listed, and dtypes not supported: reference


def available() -> dict[str, Backend]:
    """The backends that can run here."""
    return {name: backend for name, backend in BACKENDS.items() if backend.unavailable() is None}


class Forced:
    """Within ``using``: the backend that every call gets, and how many calls there were."""

    def __init__(self, backend: str) -> None:
        self.backend, self.calls = backend, 0


_forced: list[Forced] = []


@contextmanager
def using(backend: str) -> Iterator[Forced]:
    """Every call in this block, whatever backend it names, takes this one. For verification; not for threads."""
    checks.one_of("backend", backend, tuple(BACKENDS))
    forced = Forced(backend)
    _forced.append(forced)
    try:
        yield forced
    finally:
        _forced.remove(forced)


_warned = False
# Callers in these folders are not who should be told: a module's call comes from torch.
_OURS = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent.parent, Path(torch.__file__).parent))


@compiler.constant
def _warn_once(missing: str) -> None:
    """Once a process, in the name of the line that called this package; under torch.compile, while it traces."""
    global _warned
    if _warned:
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        "fused_contrastive: CPU tensors take the reference backend, which is as exact but slower, because "
        f"backend 'cpp' cannot run here: {missing}. backend='reference' chooses it without this warning.",
        stacklevel=level,
    )
    _warned = True


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that ``name`` ("auto" included) means for features of ``dtype`` on ``device``."""
    checks.one_of("backend", name, ("auto", *BACKENDS))
    if _forced:
        _forced[-1].calls += 1
        name = _forced[-1].backend
    chosen = name
    if name == "auto":
        chosen = _AUTO.get(device.type, "reference")
        if not BACKENDS[chosen].supports(device.type, dtype):
            chosen = "reference"
        elif chosen == "cpp" and (missing := cpp.unavailable()) is not None:
            _warn_once(missing)
            chosen = "reference"
    if (reason := BACKENDS[chosen].unavailable()) is not None:
        raise RuntimeError(f"backend {chosen!r} cannot run here: {reason}. backend='reference' needs torch alone.")
    if not BACKENDS[chosen].supports(device.type, dtype):
        raise ValueError(f"backend: got {chosen!r} for {dtype} features on {device}, which it does not support")
    return chosen
