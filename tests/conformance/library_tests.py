"""The libraries' own loss tests, with their classes and with ours.

    python tests/conformance/library_tests.py --checkout lightly=clone@REF --checkout open_clip=clone@REF ...

NAME=PATH@REF is a clone, bare or not, and a commit of it (HEAD without @REF): PyPI's source distributions leave these
tests out. Only ``tests`` is taken from it, so that the installed library is tested, and the library's sources where
SUITES says so. Each file runs in a pytest of its own, three times at most: with the library's classes; with ours, by
``patch_*()`` before the test modules are imported; and, where ours raised NotImplementedError, with ours for what they
cover and the library's for the rest, so that the assertions behind it are reached.

Exit code 1: a test passes with theirs, fails with ours and is not in EXPECTED, or is there for a NotImplementedError
and fails even so in the third run; or a file built none of our classes, or a library called none.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from pathlib import Path

from library_page import counts, page
from library_results import Row, complaints
from library_run import check_out, hub_stand_in, run_file
from library_suites import SUITES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", action="append", required=True, metavar="NAME=PATH[@REF]", help=", ".join(SUITES))
    parser.add_argument("--seed", type=int, default=0, help="before each test (default 0)")
    parser.add_argument(
        "--hub", action="store_true", help="models of the Hugging Face hub, not random ones in their place"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="files whose path matches")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="writes the page there too")
    args = parser.parse_args()
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {c.suite: c for c in (check_out(spec, Path(folder)) for spec in args.checkout)}
        home = None
        if "sentence-transformers" in checkouts and not args.hub:
            home = Path(folder) / "huggingface"
            home.mkdir()
            hub_stand_in(home)
        for suite, checkout in checkouts.items():
            rows[suite] = []
            for file in fnmatch.filter(SUITES[suite].files, args.only):
                rows[suite].append(run_file(checkout, file, args.seed, home))
                print(suite, file, *counts(rows[suite][-1]), file=sys.stderr, flush=True)
    text = page(rows, checkouts, args.seed, args.hub)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    found = complaints(rows)
    print("\n".join(found) or "Nothing unexpected.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
