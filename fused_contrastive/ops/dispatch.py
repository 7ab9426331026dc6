"""Chooses a backend. Nothing falls back silently: a backend that cannot run raises and says how to get it.

Without the compiled extension, "auto" takes the reference for CPU tensors, after a warning: it is as exact but slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from fused_contrastive.backends import cpp, reference, triton
from fused_contrastive.backends.contract import Backend
from fused_contrastive.core import checks, warn
from fused_contrastive.core.contexts import Scoped
from fused_contrastive.core.spec import BackendName

BACKENDS: dict[str, Backend] = {"reference": reference.BACKEND, "cpp": cpp.BACKEND, "triton": triton.BACKEND}
_AUTO = {"cpu": "cpp", "cuda": "triton"}  # device types not listed, and dtypes not supported: reference


def available() -> dict[str, Backend]:
    """The backends that can run here."""
    return {name: backend for name, backend in BACKENDS.items() if backend.unavailable() is None}


class Forced:
    """A ``using`` block: the backend that its calls get, how many calls got it, and whether a call missed it.

    A call misses it if another thread makes it in a context of its own, even if the block started that thread.
    """

    def __init__(self, backend: str) -> None:
        self.backend, self.calls, self.missed = backend, 0, False


_forced: Scoped[Forced] = Scoped("fused_contrastive forced backends")


@contextmanager
def using(backend: str) -> Iterator[Forced]:
    """In this block, every call of this context uses this backend, whichever it names. For verification."""
    checks.one_of("backend", backend, tuple(BACKENDS))
    entry = _forced.add(Forced(backend))
    try:
        yield entry.value
    finally:
        _forced.remove(entry)


def forced() -> str | None:
    """The backend of this context's innermost ``using`` block, which counts the call.

    None outside of any such block; blocks of other contexts then note that a call missed them.
    """
    if not (entries := _forced.entries):
        for other in _forced.everywhere():
            other.missed = True
        return None
    entries[-1].value.calls += 1
    return entries[-1].value.backend


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> BackendName:
    """The backend that ``name`` ("auto" included) means for features of ``dtype`` on ``device``."""
    checks.one_of("backend", name, ("auto", *BACKENDS))
    if torch.compiler.is_compiling():  # a trace takes the newest block of any context
        if (newest := _forced.newest) is not None:
            newest.calls += 1
            name = newest.backend
    elif _forced.anywhere:
        name = forced() or name
    chosen = name
    if name == "auto":
        chosen = _AUTO.get(device.type, "reference")
        if not BACKENDS[chosen].supports(device.type, dtype):
            chosen = "reference"
        elif chosen == "cpp" and (missing := cpp.BACKEND.unavailable()) is not None:
            warn.once(
                "no extension",
                "fused_contrastive: CPU tensors take the reference backend, which is as exact but slower, because "
                f"backend 'cpp' cannot run here: {missing}. backend='reference' chooses it without this warning.",
            )
            chosen = "reference"
    check(chosen, device, dtype)
    return cast(BackendName, chosen)


def check(chosen: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises unless the named backend can run here and takes such features."""
    checks.one_of("backend", chosen, tuple(BACKENDS))
    if (reason := BACKENDS[chosen].unavailable()) is not None:
        raise RuntimeError(f"backend {chosen!r} cannot run here: {reason}. backend='reference' needs torch alone.")
    if not BACKENDS[chosen].supports(device.type, dtype):
        raise ValueError(f"backend: got {chosen!r} for {dtype} features on {device}, which it does not support")
