"""Replacing a library's classes or functions in place, and putting them back."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any


class Patch(AbstractContextManager["Patch"]):
    """What was replaced. ``undo()`` puts it back, and so does leaving a ``with`` block."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """``owner.name = new``, remembered. ``owner`` is a module or a class."""
        self._replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, new)

    def replace_everywhere(self, package: str, originals: dict[Any, Any]) -> None:
        """In every loaded module of ``package``, whatever is bound to a key becomes its value.

        Modules that did ``from .loss import ClipLoss`` hold the class under a name of their own.
        """
        for module_name, module in list(sys.modules.items()):
            if module is None or module_name.partition(".")[0] != package:
                continue
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in originals:
                    self.replace(module, name, originals[value])

    def undo(self) -> None:
        """Puts everything back. Doing it twice does nothing more."""
        while self._replaced:
            owner, name, original = self._replaced.pop()
            setattr(owner, name, original)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
