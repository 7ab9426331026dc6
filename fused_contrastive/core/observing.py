"""Lets a verification observe the losses that its own context calls; without one, losses are called directly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from fused_contrastive.core import compiler
from fused_contrastive.core.contexts import Entry, Scoped

P = ParamSpec("P")
R = TypeVar("R")

# An observer is called instead of a loss, with the loss and its arguments. Only the innermost one is called, and not
# for losses that it calls itself.
Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_observers: Scoped[Observer] = Scoped("fused_contrastive observers")
_of_eager: Scoped[Observer] = Scoped("fused_contrastive observers of eager calls")


def add(observer: Observer, compiled: bool = True) -> Entry[Observer]:
    """Adds an observer to this context and to the copies of it that tasks take, until it is removed.

    With ``compiled``, losses that torch.compile traces are observed too, and their graphs break there.
    """
    return (_observers if compiled else _of_eager).add(observer)


def remove(entry: Entry[Observer]) -> None:
    """Removes an observer, in whichever context it was added."""
    for observers in (_observers, _of_eager):
        observers.remove(entry)


def here() -> tuple[Entry[Observer], ...]:
    """The observers of this context, in the order they were added."""
    return _observers.entries


def observed(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a public loss one that can be observed."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        if not (_observers.anywhere or (_of_eager.anywhere and not torch.compiler.is_compiling())):
            return function(*args, **options)
        result: R = _call(function, args, options)
        return result

    return wrapper


@compiler.outside(
    "verify or verify_against_reference is active in this process and calls losses outside of graphs; compile without "
    "fullgraph=True to verify"
)
def _call(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    for observers in (_of_eager, _observers):
        if entries := observers.entries:
            with observers.without_last():
                return entries[-1].value(function, args, options)
    return function(*args, **options)
