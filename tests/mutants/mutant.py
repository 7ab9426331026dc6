"""A mutant: one place of the sources that is broken on purpose, and the tests that should notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class StaleMutantError(Exception):
    """The sources have changed: the text does not stand exactly once in its file, or the replacement equals it."""


@dataclass(frozen=True)
class Mutant:
    """``find`` occurs exactly once in ``file``. ``tests`` are pytest's arguments, ``only`` is its -k."""

    name: str
    what: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    only: str = ""

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def of_adapter(self) -> bool:
        """Whether its tests need the libraries that adapters are for."""
        return any(test.startswith("tests/conformance/") for test in self.tests)

    def applied(self, root: Path) -> str:
        """The file's text with the mutation.

        Raises: StaleMutantError; SyntaxError if the result is not valid Python.
        """
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(self.find)) != 1:
            raise StaleMutantError(f"{self.name}: {self.find!r} is {count} times in {self.file}, expected once")
        mutated = text.replace(self.find, self.replace)
        if mutated == text:
            raise StaleMutantError(f"{self.name}: its replacement changes nothing")
        if path.suffix == ".py":  # a SyntaxError in a test's own process would count as a kill
            compile(mutated, self.file, "exec")
        return mutated


@dataclass(frozen=True)
class Result:
    """The outcome of a mutant: "killed" (and by which test), "survived", or "error" (and why)."""

    mutant: Mutant
    verdict: str
    by: str
    seconds: float
