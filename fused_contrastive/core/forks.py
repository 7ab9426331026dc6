"""After a fork: OpenMP's threads do not survive it, and a child that waits for them hangs, in torch's operators too.

Whether the parent had used several threads, here or in torch, cannot be asked. A child goes on with one, as DataLoader
makes its workers do, unless it asks for several itself after its first call.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_forked = False


def _note() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def guard() -> None:
    """Before the first parallel work of a call."""
    if _forked:
        _go_on_with_one_thread()


def _go_on_with_one_thread() -> None:
    global _forked
    _forked = False
    if torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)  # before the warning, which may be an error that is caught
    warnings.warn(
        "fused_contrastive: this process was forked from one that may have used several threads, which it cannot use; "
        "it goes on with one, torch.set_num_threads(1). Say so in the child, or start it by 'spawn'",
        RuntimeWarning,
        stacklevel=4,
    )


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Of a public function that is not ``collective``: torch's own operators may come first in it."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        guard()
        return function(*args, **options)

    return wrapper
