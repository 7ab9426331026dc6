"""Chooses a backend. Nothing falls back silently: a backend that cannot run raises and says how to get it.

"auto" without the compiled extension is the reference, after a warning that says the same: results are the same, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fused_contrastive.backends import cpp, reference, triton
from fused_contrastive.backends.contract import Backend
from fused_contrastive.core import checks, warn

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
            warn.once(
                "no extension",
                "fused_contrastive: CPU tensors take the reference backend, which is as exact but slower, because "
                f"backend 'cpp' cannot run here: {missing}. backend='reference' chooses it without this warning.",
            )
            chosen = "reference"
    check(chosen, device, dtype)
    return chosen


def check(chosen: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises where a backend, by its own name, cannot run here or does not take such features."""
    checks.one_of("backend", chosen, tuple(BACKENDS))
    if (reason := BACKENDS[chosen].unavailable()) is not None:
        raise RuntimeError(f"backend {chosen!r} cannot run here: {reason}. backend='reference' needs torch alone.")
    if not BACKENDS[chosen].supports(device.type, dtype):
        raise ValueError(f"backend: got {chosen!r} for {dtype} features on {device}, which it does not support")
