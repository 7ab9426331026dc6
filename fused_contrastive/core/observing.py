"""Where a verification listens to the losses that are called. Nothing is done unless one does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Called instead of a loss, with it and its arguments; the last one that was added is, and not for what it calls itself.
Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_observers: list[Observer] = []


def add(observer: Observer) -> None:
    _observers.append(observer)


def remove(observer: Observer) -> None:
    _observers.remove(observer)


def observed(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a public loss one that can be observed."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        if not _observers:
            return function(*args, **options)
        observer = _observers.pop()
        try:
            result: R = observer(function, args, options)
        finally:
            _observers.append(observer)
        return result

    return wrapper
