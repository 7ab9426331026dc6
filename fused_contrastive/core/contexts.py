"""What a block has set for the calls inside it: for its own context, not for other threads or asyncio's other tasks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Entry(Generic[T]):
    """A value, told apart from an equal one of another block."""

    def __init__(self, value: T) -> None:
        self.value = value


class Scoped(Generic[T]):
    """The values of the blocks that this context is in, the innermost last.

    A task copies the context of its creator, and a block may be left in another context than it was entered in, so
    what counts is whether its entry is still open.
    """

    def __init__(self, name: str) -> None:
        # torch.compile cannot trace a ContextVar, but guards on this: whether any context has an entry.
        self.anywhere = False
        self._here: ContextVar[tuple[Entry[T], ...]] = ContextVar(name, default=())
        self._open: set[Entry[T]] = set()
        self._lock = threading.Lock()

    @property
    def entries(self) -> tuple[Entry[T], ...]:
        return tuple(entry for entry in self._here.get() if entry in self._open)

    def __len__(self) -> int:
        """How many there are, in all contexts together."""
        return len(self._open)

    def everywhere(self) -> tuple[T, ...]:
        """The values of the blocks of all contexts together."""
        with self._lock:
            return tuple(entry.value for entry in self._open)

    def add(self, value: T) -> Entry[T]:
        entry = Entry(value)
        with self._lock:
            self._open.add(entry)
            self.anywhere = True
        self._here.set((*self.entries, entry))
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Closes an entry, in whichever contexts it is."""
        with self._lock:
            self._open.discard(entry)
            self.anywhere = bool(self._open)
        self._here.set(self.entries)

    @contextmanager
    def without_last(self) -> Iterator[None]:
        """Hides the innermost entry of this context."""
        token = self._here.set(self.entries[:-1])
        try:
            yield
        finally:
            self._here.reset(token)
