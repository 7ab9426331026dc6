"""Makes Triton's interpreter, which takes most of the tests' time, twice as fast."""

from __future__ import annotations

import types
from collections.abc import Callable


def patch_once() -> None:
    """Triton's interpreter patches triton.language whenever a kernel, or a function of a kernel, is called.

    That takes as long as the kernels themselves. Here triton.language stays patched after the first call, because
    nothing in this process compiles a kernel.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def patch_lang(fn: Callable[..., object]) -> object:
        modules = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules not in done:
            done.add(modules)
            patch(fn)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_lang
