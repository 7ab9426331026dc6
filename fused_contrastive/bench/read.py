"""A report from its file, or what the file is instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fused_contrastive.bench.workloads import problem_of
from fused_contrastive.core.errors import InputError

Report = dict[str, Any]


def load(path: Path) -> Report:
    """A report whose rows can be read.

    Raises: InputError that says what the file is instead.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: got no readable file ({error.strerror}), expected a report of `bench`") from error
    except (RecursionError, ValueError) as error:  # bytes that are no text, too
        raise InputError(f"{path}: got no JSON ({error}), expected a report of `bench`") from error
    try:
        for name, kind in (("command", str), ("provenance", dict), ("rows", list)):
            if not isinstance(report[name], kind):
                raise ValueError(f"{name} {report[name]!r}")
        for row in report["rows"]:
            _check(row)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: got {what}, expected a report of this version's `bench`") from error
    return report  # type: ignore[no-any-return]


def _check(row: Any) -> None:
    """Raises what ``load`` reports where a row is not as `bench` writes it."""
    name, status = row["implementation"], row["status"]
    if not (isinstance(name, str) and name.isprintable() and isinstance(status, str) and type(row["ours"]) is bool):
        raise ValueError(f"row {row!r}")
    if not str(problem_of(row)).isprintable() or not 0 < row["n"] < 1e15 or not 0 < row["d"] < 1e15:
        raise ValueError(f"a problem of {row!r}")
    times = [row[field] for field in ("seconds", "u_seconds") if field in row]
    if "both" in row:
        times.append(row["both"]["median"])
    if "rounds" in row:
        if len(row["rounds"]) != len(row["u_rounds"]):
            raise ValueError(f"{len(row['rounds'])} rounds and {len(row['u_rounds'])} of u")
        times += [*row["rounds"], *row["u_rounds"], row["u_seconds"]]
    for t in times:
        if type(t) not in (int, float) or not 1e-30 < t < 1e30:
            raise ValueError(f"a time of {t!r}")
    if type(row.get("extra_bytes", 0)) is not int:
        raise ValueError(f"extra_bytes {row['extra_bytes']!r}")
