"""The page that library_tests.py writes."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from importlib import metadata

from library_results import Row, reason
from library_run import Checkout
from library_suites import SUITES

COLUMNS = (
    "library", "file", "tests", "build ours", "call ours", "pass with theirs", "of these with ours",
    "of these with ours where they cover it", "calls of ours",
)  # fmt: skip


def counts(row: Row) -> list[int]:
    kept, calls = row.passed("theirs"), row.calls
    return [
        len(row.theirs["outcomes"]), len(row.built), len(calls), len(kept), len(kept & row.passed("ours")),
        len(kept & row.passed("covered")), sum(sum(c.values()) for c in calls.values()),
    ]  # fmt: skip


def table(rows: dict[str, list[Row]]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    totals = [0] * (len(COLUMNS) - 2)
    for suite, files in rows.items():
        for row in files:
            numbers = counts(row)
            totals = [a + b for a, b in zip(totals, numbers, strict=True)]
            lines.append(f"| {suite} | {row.file.removeprefix('tests/')} | {' | '.join(map(str, numbers))} |")
    return [*lines, f"| all | | {' | '.join(map(str, totals))} |"]


def only_with_ours(rows: dict[str, list[Row]]) -> list[str]:
    lines = ["| test | error | reason |", "| --- | --- | --- |"]
    for suite, files in rows.items():
        for row in files:
            for test in row.failures:
                why = reason(suite, row, test) or "**unexpected**"
                behind = "; passes where ours cover it" if test in row.passed("covered") else ""
                name = test.removeprefix("tests/").replace("::", " ")
                lines.append(f"| {suite}: {name} | {shortened(row.error(test), 90)} | {why}{behind} |")
    return lines


def not_with_theirs(rows: dict[str, list[Row]]) -> list[str]:
    """What does not pass on the library's own classes, and so says nothing: alike errors together."""
    lines = ["| library | file | tests | |", "| --- | --- | ---: | --- |"]
    for suite, files in rows.items():
        for row in files:
            alike = Counter(
                outcome if outcome == "skipped" else shortened(error, 70)
                for outcome, error in row.theirs["outcomes"].values()
                if outcome != "passed"
            )
            file = row.file.removeprefix("tests/")
            lines += [f"| {suite} | {file} | {count} | {error} |" for error, count in alike.most_common()]
    return lines


def shortened(error: str, length: int) -> str:
    error = re.sub(r" object at 0x[0-9a-f]+| at 0x[0-9a-f]+|\'?/\S+", "", error).replace("|", "/")
    return f"`{error if len(error) <= length else error[:length].rstrip() + ' ...'}`".replace("``", "")


def calls_by_class(rows: list[Row]) -> str:
    total: Counter[str] = Counter()
    for row in rows:
        for calls in row.calls.values():
            total.update(calls)
    return ", ".join(f"{name} {times}" for name, times in total.most_common()) or "none"


def version(checkout: Checkout) -> str:
    suite = SUITES[checkout.suite]
    installed = metadata.version(suite.distribution)
    if suite.sources:
        return f"{checkout.suite}: tests and library of commit {checkout.commit} of {checkout.date}"
    return f"{checkout.suite} {installed}, tests of commit {checkout.commit} of {checkout.date}"


def page(rows: dict[str, list[Row]], checkouts: dict[str, Checkout], seed: int, hub: bool) -> str:
    files = [row for found in rows.values() for row in found]
    numbers = [sum(column) for column in zip(*map(counts, files), strict=True)]
    command = " \\\n      ".join(f"--checkout {c.suite}={c.suite}@{c.commit}" for c in checkouts.values())
    models = "" if hub else (
        "\n\nsentence-transformers' tests load small models from the Hugging Face hub. Here these are BERTs of the "
        "same make with random weights, the same for both classes, which the script writes into a cache; data sets of "
        "the hub are missing."
    )  # fmt: skip
    return "\n".join(
        [
            "# The libraries' own tests",
            "",
            f"{numbers[0]} tests in {len(files)} files of the libraries' own suites. {numbers[3]} pass with the "
            f"library's classes in this environment; of these, {numbers[4]} pass with ours in their place, and "
            f"{numbers[5]} once what the adapter refuses goes to the library. The rest are below, with the reason. "
            f"{numbers[1]} tests build a loss of ours, {numbers[2]} call one, {numbers[6]} times in all.",
            "",
            f"{datetime.date.today()}, torch {metadata.version('torch')} on the CPU, seed {seed} before each test:",
            "",
            f"    python tests/conformance/library_tests.py {command}",
            "",
            *(
                f"- {version(c)}. {SUITES[c.suite].note} Calls: {calls_by_class(rows[c.suite])}."
                for c in checkouts.values()
            ),
            "",
            '"Build ours" and "call ours" count the tests in which a class of ours is made, and computes a loss: the '
            f"others of a file are of something else.{models}",
            "",
            *table(rows),
            "",
            "## Fail only with ours",
            "",
            *only_with_ours(rows),
            "",
            "## Do not pass with theirs",
            "",
            *not_with_theirs(rows),
            "",
        ]
    )
