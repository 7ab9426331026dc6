"""What a mutant is: one place of the sources broken on purpose, and the tests that should notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class StaleMutantError(Exception):
    """The sources have moved on: the text is no longer there, or there more than once."""


@dataclass(frozen=True)
class Mutant:
    """``find`` stands exactly once in ``file``. ``tests`` are what pytest is given, ``only`` its -k."""

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
        """Whether its tests need the libraries that adapters are of."""
        return any(test.startswith("tests/conformance/") for test in self.tests)

    def applied(self, root: Path) -> str:
        """The file's text with the mutation.

        Raises: StaleMutantError; SyntaxError where what comes out is no Python.
        """
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(self.find)) != 1:
            raise StaleMutantError(f"{self.name}: {self.find!r} is {count} times in {self.file}, expected once")
        mutated = text.replace(self.find, self.replace)
        if mutated == text:
            raise StaleMutantError(f"{self.name}: its replacement changes nothing")
        if path.suffix == ".py":  # else a test that starts a process of its own would call that a kill
            compile(mutated, self.file, "exec")
        return mutated


@dataclass(frozen=True)
class Result:
    """What became of a mutant: "killed", "survived" or "error", and by which test or why."""

    mutant: Mutant
    verdict: str
    by: str
    seconds: float
