"""Breaks kernels and formulas on purpose and shows that the tests notice: ``python tests/mutants``.

Each mutant breaks one place in a copy of the sources, in which the few tests that should notice are run. The sources
themselves are never changed. Exits with 1 if a mutant survives or cannot be tried, with 2 if the run cannot begin.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutant import Mutant, Result, StaleMutantError
from mutant_lists import MUTANTS
from mutant_tree import Tree

ROOT = Path(__file__).parents[2]
WHOLE_LIMIT = 1800.0  # seconds for one pytest of all tests on unbroken sources


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names, or parts of them")
    parser.add_argument(
        "--with-conformance", metavar="PYTHON", help="try the adapters' mutants too, by a Python that has the libraries"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for a mutant's tests (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of the tests' inputs; default: new each run, printed")
    parser.add_argument("--work", type=Path, help="keep the copy and what was built in this folder, for the next run")
    parser.add_argument("--list", action="store_true", help="list the mutants and try none")
    return parser.parse_args(arguments)


def chosen(patterns: Sequence[str]) -> list[Mutant]:
    """The mutants whose name or file matches, in the order of the list: those of one file follow each other."""
    whole = [pattern if any(c in pattern for c in "*?[") else f"*{pattern}*" for pattern in patterns]
    return [m for m in MUTANTS if any(fnmatch.fnmatch(f"{m.file} {m.name}", p) for p in whole)]


def table(results: Sequence[Result]) -> str:
    """One line per mutant."""
    width = max(len(r.mutant.name) for r in results)
    return "\n".join(f"{r.mutant.name:{width}}  {r.mutant.file}: {r.mutant.what}  {r.verdict} {r.by}" for r in results)


def prepare(tree: Tree, mutants: Sequence[Mutant], build: bool) -> str | None:
    """Builds, and runs all tests on unbroken sources. Returns why the mutants cannot be tried, or None."""
    try:
        for mutant in mutants:
            mutant.applied(tree.root)
        if build or any(m.compiled for m in mutants) or not tree.take_extension():
            print("building the extension", flush=True)
            tree.build()
        tree.check_import()
    except (StaleMutantError, SyntaxError, RuntimeError) as error:
        return str(error)
    groups: dict[str, dict[str, None]] = {}
    for mutant in mutants:
        groups.setdefault(mutant.only, {}).update(dict.fromkeys(mutant.tests))
    for only, tests in groups.items():
        print(f"nothing broken: {len(tests)} tests or files{f', -k {only!r}' if only else ''}", flush=True)
        run = tree.test(list(tests), only, WHOLE_LIMIT)
        if run.code != 0:
            return f"with nothing broken, {run.test or 'pytest'} failed already:\n{run.output[-3000:]}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    mutants = chosen(options.only)
    left_out = [] if options.with_conformance else [m for m in mutants if m.of_adapter]
    if not mutants:
        print(f"--only: {' '.join(options.only)} matches none of the mutants")
        return 2
    if options.list:
        print(table([Result(m, "", "", 0.0) for m in mutants]))
        return 0
    mutants = [m for m in mutants if m not in left_out]
    if not mutants:
        print(f"--only: {' '.join(options.only)} matches {len(left_out)} of adapters, which need --with-conformance")
        return 2
    seed = random.randrange(2**31) if options.seed is None else options.seed
    print(f"{len(mutants)} mutants, seed {seed}", flush=True)
    results: list[Result] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folder = (options.work or Path(temporary)).resolve()
        for name, python in (("tests", sys.executable), ("conformance", options.with_conformance)):
            some = [m for m in mutants if m.of_adapter == (name == "conformance")]
            if not some:
                continue
            tree = Tree(ROOT, folder / name, python, seed, options.timeout)
            if why := prepare(tree, some, build=python != sys.executable):
                print(why)
                return 2
            for mutant in some:
                results.append(tree.try_out(mutant))
                print(f"{results[-1].verdict:>8}  {mutant.name}  {results[-1].by}", flush=True)
    print("\n" + table(results))
    counts = ", ".join(f"{sum(r.verdict == v for r in results)} {v}" for v in ("killed", "survived", "error"))
    print(f"{counts} of {len(results)} in {time.monotonic() - start:.0f} s")
    if left_out:
        print(f"{len(left_out)} of the adapters left out: --with-conformance tries them")
    return 0 if all(r.verdict == "killed" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
