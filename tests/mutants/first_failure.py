"""A pytest plugin: writes the first failure to the file named by MUTANTS_REPORT, as "when<tab>test".

``when`` is "collect", "setup", "call" or "teardown". It is written at once, because a signal may end the process later.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPORT = Path(os.environ["MUTANTS_REPORT"])


def write(when: str, test: str) -> None:
    if not REPORT.exists():
        REPORT.write_text(f"{when}\t{test}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        write(report.when or "call", report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        write("collect", report.nodeid)
