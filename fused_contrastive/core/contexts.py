"""Values that a ``with`` block sets for the calls inside it, but not for other threads or other asyncio tasks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Entry(Generic[T]):
    """A block's value, with an identity: equal values of two blocks are different entries."""

    def __init__(self, value: T) -> None:
        self.value = value


class Scoped(Generic[T]):
    """The values of the blocks that this context is in, the innermost last.

    A task copies its creator's context, and a block may be left in another context than it was entered in. Therefore
    an entry in a context counts only while it is open, that is until ``remove`` is called anywhere.
    """

    def __init__(self, name: str) -> None:
        # torch.compile cannot trace a ContextVar, but guards on these: whether any context has an entry, and the value
        # of the newest one.
        self.anywhere = False
        self.newest: T | None = None
        self._here: ContextVar[tuple[Entry[T], ...]] = ContextVar(name, default=())
        self._open: dict[Entry[T], None] = {}  # in the order of their beginnings
        self._lock = threading.Lock()

    @property
    def entries(self) -> tuple[Entry[T], ...]:
        return tuple(entry for entry in self._here.get() if entry in self._open)

    def __len__(self) -> int:
        """How many entries are open in all contexts together."""
        return len(self._open)

    def everywhere(self) -> tuple[T, ...]:
        """The values of the blocks of all contexts together."""
        with self._lock:
            return tuple(entry.value for entry in self._open)

    def add(self, value: T) -> Entry[T]:
        entry = Entry(value)
        with self._lock:
            self._open[entry] = None
            self._note()
        self._here.set((*self.entries, entry))
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Closes an entry, in whichever contexts it is."""
        with self._lock:
            self._open.pop(entry, None)
            self._note()
        self._here.set(self.entries)

    def _note(self) -> None:
        self.anywhere = bool(self._open)
        self.newest = next(reversed(self._open)).value if self._open else None

    @contextmanager
    def without_last(self) -> Iterator[None]:
        """Hides the innermost entry of this context, and others of the same value."""
        *outer, last = self.entries
        token = self._here.set(tuple(entry for entry in outer if entry.value != last.value))
        try:
            yield
        finally:
            self._here.reset(token)
