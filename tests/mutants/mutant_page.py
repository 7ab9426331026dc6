"""The results as a table for the terminal, and as a page."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from mutant import Result

HEAD = """# Mutants: what the tests notice

`make mutants` breaks the sources in one place at a time, in a copy, and runs the tests that should notice. A mutant is
*killed* if one of them fails, crashes or hangs, and has *survived* if all pass. One that cannot be compiled or imported
is an error, not a kill. The list is in `tests/mutants/`, whose own test says which of them are stale.
"""


def table(results: Sequence[Result]) -> str:
    """One line per mutant."""
    width = max(len(r.mutant.name) for r in results)
    return "\n".join(f"{r.mutant.name:{width}}  {r.mutant.file}: {r.mutant.what}  {r.verdict} {r.by}" for r in results)


def page(results: Sequence[Result], arguments: str, seed: object) -> str:
    """The results in Markdown."""
    killed = sum(r.verdict == "killed" for r in results)
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "pytest"))
    head = (
        f"{killed} of {len(results)} were killed, {datetime.date.today().isoformat()}, Python "
        f"{platform.python_version()}, {versions}, seed {seed}, by `python tests/mutants {arguments}`.\n"
    )
    rows = ["| mutant | what is broken | file | killed by |", "| --- | --- | --- | --- |"]
    for r in results:
        by = f"`{_short(r.by)}`" if "::" in r.by else r.by or r.verdict
        by = by if r.verdict == "killed" else f"**{r.verdict}** {by}"
        rows.append(f"| {r.mutant.name} | {r.mutant.what} | `{r.mutant.file}` | {by} |")
    return "\n".join((HEAD, head, *rows)) + "\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _short(test: str) -> str:
    """A test's id without the folder; a bar would end the table's cell."""
    return test.removeprefix("tests/").replace("|", "/")
