"""A copy of the sources in which mutants are applied, its extension, and runs of pytest in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutant import Mutant, Result, StaleMutantError

HERE = Path(__file__).parent
PARTS = ("csrc", "fused_contrastive", "tests", "docs", "examples", "benchmarks", "tools")
FILES = ("setup.py", "pyproject.toml", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
MADE = {"__pycache__", ".so", ".pyc", ".pyd"}  # names and endings of files that are not sources
BUILD_LIMIT = 1800.0
# -O1 follows setup.py's -O3 and overrides it: it compiles faster, and mutants are as wrong without optimisation.
FLAGS = "-O1 -w"


@dataclass(frozen=True)
class Run:
    """How one run of pytest ended."""

    code: int | None  # exit status; None: out of time; negative: a signal
    when: str = ""  # of the first failure
    test: str = ""
    output: str = ""

    @property
    def verdict(self) -> tuple[str, str]:
        """ "killed", "survived" or "error", and the test or reason.

        Only a test that ran and failed, a crash or a hang is a kill. Code that cannot be imported, or a fixture that
        cannot be set up, shows nothing about the tests.
        """
        if self.code is None:
            return "killed", "time-out"
        if self.code < 0:
            return "killed", f"crash ({signal.Signals(-self.code).name})"
        if self.code == 0:
            return "survived", ""
        if self.code == 1 and self.when in ("call", "teardown"):
            return "killed", self.test
        last = self.output.strip().splitlines()[-1:] or [""]
        return "error", f"pytest exited with {self.code} ({self.when or 'before any test'} {self.test}): {last[0]}"


class Tree:
    """A copy of ``source`` in ``folder``, for one Python interpreter. Only files that differ are copied again."""

    def __init__(self, source: Path, folder: Path, python: str, seed: int, limit: float) -> None:
        self.source, self.root, self.python, self.limit = source, folder, python, limit
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(folder), str(HERE))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FUSED_CONTRASTIVE_TEST_SEED": str(seed),
            "FUSED_CONTRASTIVE_CFLAGS": FLAGS,
            "MUTANTS_REPORT": str(folder / "first_failure.txt"),
        }
        self._sync()

    def _sync(self) -> None:
        wanted = {path.relative_to(self.source): path for path in _sources(self.source)}
        for path in list(_sources(self.root)):
            if path.relative_to(self.root) not in wanted:
                path.unlink()
        for name, path in wanted.items():
            copy = self.root / name
            if not copy.is_file() or copy.read_bytes() != path.read_bytes():  # ninja rebuilds by modification time
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())

    def build(self) -> None:
        """Builds the extension. Raises: RuntimeError with the end of the compiler's output."""
        code, output = self._call([self.python, "setup.py", "-q", "build_ext", "--inplace"], BUILD_LIMIT)
        if code:
            raise RuntimeError(f"setup.py build_ext exited with {code}:\n" + "\n".join(output.splitlines()[-30:]))

    def take_extension(self) -> bool:
        """Copies the extension that is built beside the sources; False where there is none."""
        found = list((self.source / "fused_contrastive").glob("_C*.so"))
        for path in found:
            shutil.copy2(path, self.root / "fused_contrastive" / path.name)
        return bool(found)

    def check_import(self) -> None:
        """Raises: RuntimeError if Python here imports another copy of the package than this one."""
        code, output = self._call(
            [self.python, "-c", "import fused_contrastive; print(fused_contrastive.__file__)"], self.limit
        )
        if code or not Path(output.strip().splitlines()[-1]).is_relative_to(self.root):
            raise RuntimeError(f"importing fused_contrastive in {self.root} gave: {output.strip()[-500:]}")

    def test(self, tests: Sequence[str], only: str, limit: float | None = None) -> Run:
        report = Path(self.environment["MUTANTS_REPORT"])
        report.unlink(missing_ok=True)
        command = [
            self.python,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-p",
            "first_failure",
        ]
        command += ["-k", only] if only else []
        code, output = self._call([*command, *tests], limit or self.limit)
        when, _, test = report.read_text().partition("\t") if report.exists() else ("", "", "")
        return Run(code, when, test, output)

    def try_out(self, mutant: Mutant) -> Result:
        """Applies a mutant, runs its tests and restores the file."""
        start = time.monotonic()
        try:
            with self._mutated(mutant):
                if mutant.compiled:
                    self.build()
                verdict, by = self.test(mutant.tests, mutant.only).verdict
        except (StaleMutantError, SyntaxError, RuntimeError) as error:
            verdict, by = "error", str(error)
        return Result(mutant, verdict, by, time.monotonic() - start)

    @contextlib.contextmanager
    def _mutated(self, mutant: Mutant) -> Iterator[None]:
        path = self.root / mutant.file
        text = mutant.applied(self.root)
        original = path.read_text()
        path.write_text(text)
        try:
            yield
        finally:
            path.write_text(original)

    def _call(self, command: list[str], limit: float) -> tuple[int | None, str]:
        """Exit status (None at the time limit) and output. Kills processes that the command started and left."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return code, output.read()


def _sources(root: Path) -> Iterator[Path]:
    for part in PARTS:
        for path in (root / part).rglob("*"):
            if path.is_file() and path.suffix not in MADE and not MADE & set(path.parts):
                yield path
    yield from (root / name for name in FILES if (root / name).is_file())
