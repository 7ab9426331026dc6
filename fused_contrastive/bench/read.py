"""A report from its file, or what the file is instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fused_contrastive.core.errors import InputError

LARGEST = 1e30  # of what a report's number may be
FIELDS = {
    "loss": str, "dtype": str, "d": int, "n": int, "device": str, "implementation": str, "ours": bool, "status": str,
}  # fmt: skip
Report = dict[str, Any]
Row = dict[str, Any]


def load(path: Path) -> Report:
    """A report that can be shown and compared.

    Raises: InputError that says what the file is instead.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: got no readable file ({error.strerror}), expected a report of `bench`") from error
    except (RecursionError, ValueError) as error:  # of bytes that are no text, too
        raise InputError(f"{path}: got no JSON ({error}), expected a report of `bench`") from error
    if (wrong := _wrong(report)) is not None:
        raise InputError(f"{path}: got {wrong}, expected a report of this version's `bench`")
    return report  # type: ignore[no-any-return]


def _wrong(report: Any) -> str | None:
    """What is not as `bench` writes it."""
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        return "JSON without rows"
    for name, kind in (("command", str), ("provenance", dict)):
        if not isinstance(report.get(name), kind):
            return f"{name} {report[name]!r}" if name in report else f"no {name!r}"
    return next((wrong for row in report["rows"] if (wrong := _wrong_row(row)) is not None), None)


def _wrong_row(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"no row, but {row!r}"
    for name, kind in FIELDS.items():
        if name not in row:
            return f"no {name!r}"
        if type(row[name]) is not kind or (kind is int and not 0 < row[name] < LARGEST):
            return f"{name} {row[name]!r}"
        if kind is str and name != "status" and not row[name].isprintable():
            return f"{name} {row[name]!r}"
    both = row.get("both", {"median": 1})
    right = {
        "both": isinstance(both, dict) and _is_time(both.get("median")),
        "seconds": _is_time(row.get("seconds", 1)),
        "extra_bytes": type(row.get("extra_bytes", 0)) is int and abs(row.get("extra_bytes", 0)) < LARGEST,
    }
    for name, is_right in right.items():
        if not is_right:
            return f"{name} {row[name]!r}"
    return _wrong_rounds(row) if "rounds" in row else None


def _wrong_rounds(row: Row) -> str | None:
    """What is wrong with a row's times, round by round, and those of u."""
    for name in ("u_rounds", "u_seconds"):
        if name not in row:
            return f"rounds without {name!r}"
    for name in ("rounds", "u_rounds"):
        if not isinstance(row[name], list):
            return f"{name} {row[name]!r}"
    if len(row["u_rounds"]) != len(row["rounds"]):
        return f"{len(row['rounds'])} rounds and {len(row['u_rounds'])} of u"
    wrong = [t for t in (*row["rounds"], *row["u_rounds"], row["u_seconds"]) if not _is_time(t)]
    return f"a time of {wrong[0]!r}" if wrong else None


def _is_time(value: object) -> bool:
    """Of seconds, or in u; ratios of products of such are finite."""
    return type(value) in (int, float) and 1 / LARGEST < value < LARGEST  # type: ignore[operator]
