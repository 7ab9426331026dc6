"""What the libraries' tests did with their classes and with ours, and what of it is unexpected."""

from __future__ import annotations

import fnmatch
import re
from typing import Any, NamedTuple

from library_suites import EXPECTED

Result = dict[str, Any]  # "outcomes": {test: [outcome, error]}, "calls": {test: {class: times}}, "built": [test]


class Row(NamedTuple):
    """One file's tests in every mode."""

    file: str
    theirs: Result
    ours: Result
    covered: Result | None  # where ours raised NotImplementedError

    def passed(self, mode: str) -> set[str]:
        result = getattr(self, mode) or self.ours
        return {test for test, (outcome, _) in result["outcomes"].items() if outcome == "passed"}

    @property
    def failures(self) -> list[str]:
        """Tests that pass with theirs only."""
        return sorted(self.passed("theirs") - self.passed("ours"))

    def error(self, test: str) -> str:
        return str(self.ours["outcomes"].get(test, ("missing", "not collected with ours"))[1])

    @property
    def built(self) -> set[str]:
        return {test for result in (self.ours, self.covered) if result for test in result["built"] if test}

    @property
    def calls(self) -> dict[str, dict[str, int]]:
        """By test: how often ours did the work, in the run where they did more of it: a test ends where it fails."""
        found: dict[str, dict[str, int]] = dict(self.ours["calls"])
        for test, calls in (self.covered or {"calls": {}})["calls"].items():
            found[test] = max(found.get(test, {}), calls, key=lambda c: sum(c.values()))
        return found


def reason(suite: str, row: Row, test: str) -> str | None:
    """Why a test rightly fails only with ours."""
    error = row.error(test)
    found = [e for e in EXPECTED if e.suite == suite and fnmatch.fnmatch(test, e.test) and re.search(e.error, error)]
    if not found or ("NotImplementedError" in error and test not in row.passed("covered")):
        return None
    return found[0].reason


def complaints(rows: dict[str, list[Row]]) -> list[str]:
    """What makes the exit code 1."""
    found = []
    for suite, files in rows.items():
        for row in files:
            found += [
                f"{suite} {test}: fails only with ours: {row.error(test)}"
                for test in row.failures
                if reason(suite, row, test) is None
            ]
            if not row.built:
                found.append(f"{suite} {row.file}: no class of ours was built")
        if not any(row.calls for row in files):
            found.append(f"{suite}: no class of ours was called")
    return found
