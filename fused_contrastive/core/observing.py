"""Lets a ``with`` block observe the losses that its own context calls; without one, losses are called directly."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from typing_extensions import Self

from fused_contrastive.core import compiler
from fused_contrastive.core.contexts import Entry, Scoped

P = ParamSpec("P")
R = TypeVar("R")

# An observer is called instead of a loss, with the loss and its arguments. Only the innermost one is called, and not
# for losses that it calls itself; by ``call`` it passes the call on to the next one outwards.
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


def observed(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a public loss one that can be observed."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        if not (_observers.anywhere or (_of_eager.anywhere and not torch.compiler.is_compiling())):
            return function(*args, **options)
        result: R = call(function, args, options)
        return result

    return wrapper


@compiler.outside(
    "verify, verify_against_reference or monitor(compiled=True) is active in this process and calls losses outside of "
    "graphs; compile without fullgraph=True"
)
def call(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Calls the innermost observer of this context, or else the loss."""
    for observers in (_of_eager, _observers):
        if entries := observers.entries:
            with observers.without_last():
                return entries[-1].value(function, args, options)
    return function(*args, **options)


class Observing(AbstractContextManager[Any]):
    """A ``with`` block in which ``_observe`` is called instead of each loss; the same object may be entered again.

    Attributes:
        compiled: see ``add``.
    """

    compiled = True

    def __init__(self) -> None:
        self._entries: list[Entry[Observer]] = []
        self._lock = threading.Lock()

    def _observe(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._entries.append(add(self._observe, self.compiled))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if not self._entries:
                raise RuntimeError(
                    f"{type(self).__name__}: got an exit from a block that has been left already, expected one for "
                    "each time that it is entered"
                )
            here = [entry for entry in (*_of_eager.entries, *_observers.entries) if entry in self._entries]
            entry = (here or self._entries)[-1]  # an entry of this context, or else one that another context made
            self._entries.remove(entry)
        remove(entry)
