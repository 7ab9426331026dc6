"""After a fork: OpenMP's threads do not survive it, and a child that waits for them hangs, in torch's operators too.

A child cannot find out whether its parent used several threads. It goes on with one, as DataLoader makes its workers
do, unless it asks for several itself after its first call. Only the thread that forked is concerned: OpenMP gives each
thread that begins parallel work workers of its own.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from fused_contrastive.core import warn

P = ParamSpec("P")
R = TypeVar("R")

_forked: int | None = None  # in a forked child, the thread that goes on after the fork; None after its first call


def _note() -> None:
    global _forked
    _forked = threading.get_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def guard() -> None:
    """Goes before the first parallel work of a call. In a compiled function, it runs inside the operators."""
    if _forked is not None and not torch.compiler.is_compiling():
        _go_on_with_one_thread()


def _go_on_with_one_thread() -> None:
    global _forked
    if threading.get_ident() != _forked:
        return
    _forked = None
    if torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)  # before the warning, which may be an error that is caught
    warn.once(
        "forked",
        "fused_contrastive: this process was forked from one that may have used several threads, which it cannot use; "
        "it goes on with one. Call torch.set_num_threads(1) in the child, or start it by 'spawn'",
        RuntimeWarning,
    )


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Calls ``guard`` first in a public function that is not ``collective``, where torch's operators may run first."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        guard()
        return function(*args, **options)

    return wrapper
