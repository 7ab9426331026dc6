"""Builds of the package outside the tree, in build/, with other flags or another compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARNINGS = "-Wextra -Wconversion -Werror"  # beside setup.py's -Wall


def build(name: str, variables: dict[str, str]) -> Path:
    """Builds into build/NAME, with these environment variables, and returns that folder."""
    built = ROOT / "build" / name
    shutil.rmtree(built, ignore_errors=True)  # the objects, in build/NAME-objects, are kept
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={built}-objects", f"--build-lib={built}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)
    return built


def importing(built: Path) -> dict[str, str]:
    """The environment of a Python that imports what was built there."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(built), str(ROOT / "tests")]),  # tests start others that import its modules
        "PYTHONSAFEPATH": "1",  # the tree's own package and extension stay out
        "PYTHONDONTWRITEBYTECODE": "1",
    }
