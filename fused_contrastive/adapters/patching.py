"""Replacing a library's classes or functions in place, and putting them back."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

# For each place that is patched: what was there before, and what each patch put there, the last one on top.
_originals: dict[tuple[Any, str], Any] = {}
_layers: dict[tuple[Any, str], list[tuple[Patch, Any]]] = {}


class Patch(AbstractContextManager["Patch"]):
    """Replacements in other modules, until ``undo()`` or the end of a ``with`` block puts the originals back.

    If several patches replace the same name, the last one holds; they can be undone in any order.
    """

    def __init__(self) -> None:
        self._places: list[tuple[Any, str]] = []
        self._everywhere: list[tuple[str, dict[Any, Any]]] = []

    def replace(self, owner: Any, name: str, new: Any) -> None:
        """Sets ``owner.name = new`` and remembers what was there. ``owner`` is a module or a class."""
        place = owner, name
        _originals.setdefault(place, vars(owner)[name])
        _layers.setdefault(place, []).append((self, new))
        self._places.append(place)
        setattr(owner, name, new)

    def replace_everywhere(self, package: str, originals: dict[Any, Any]) -> None:
        """In every loaded module of ``package``, replaces each class that is a key by its value.

        All modules are searched because ``from .loss import ClipLoss`` gives a module a name of its own for the class.
        Keys are the library's classes, never classes that a patch has put there.
        """
        self._everywhere.append((package, originals))
        for module, name, value in _classes_of(package):
            if value in originals:
                self.replace(module, name, originals[value])
            elif value in originals.values():  # patched already
                self.replace(module, name, value)

    def undo(self) -> None:
        """Puts the originals back. A second call does nothing."""
        while self._places:
            place = self._places.pop()
            layers = _layers[place] = [layer for layer in _layers[place] if layer[0] is not self]
            original = layers[-1][1] if layers else _originals[place]
            if not layers:
                del _layers[place], _originals[place]
            setattr(*place, original)
        while self._everywhere:  # modules imported since then took our classes from patched ones
            package, originals = self._everywhere.pop()
            back = {new: original for original, new in originals.items()}
            for module, name, value in _classes_of(package):
                if value in back and (module, name) not in _layers:
                    setattr(module, name, back[value])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _classes_of(package: str) -> list[tuple[Any, str, type]]:
    """(module, name, class) for the classes in the package's loaded modules; a module under two names counts once."""
    modules = {
        id(module): module
        for module_name, module in list(sys.modules.items())
        if module is not None and module_name.partition(".")[0] == package
    }
    return [
        (module, name, value)
        for module in modules.values()
        for name, value in list(vars(module).items())
        if isinstance(value, type)
    ]
