"""How time and memory grow with N: the exponent of the power law through each implementation's measurements."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

LEAST = 1024  # rows: below, a call's overhead is part of the time


class Growth(NamedTuple):
    """Of one implementation on one loss; None where fewer than three sizes were measured."""

    loss: str
    d: int
    dtype: str
    implementation: str
    time: float | None
    memory: float | None


def exponent(points: list[tuple[float, float]]) -> float | None:
    """Slope of log y over log x, by least squares."""
    if len(points) < 3:
        return None
    logs = [(math.log(x), math.log(max(y, 1.0e-9))) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope: float = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return slope


def fit(rows: list[dict[str, Any]]) -> list[Growth]:
    points: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    dims: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["status"] == "ok" and row["n"] >= LEAST:
            key = (row["loss"], row["dtype"], row["implementation"])
            for quantity in ("seconds", "extra_bytes"):
                if quantity in row:
                    points[key][f"{quantity} {row['d']}"].append((row["n"], row[quantity]))
                    dims[key] = row["d"]
    found = []
    for key, quantities in points.items():
        best = {
            kind: max((v for k, v in quantities.items() if k.startswith(kind)), key=len, default=[])
            for kind in ("seconds", "extra_bytes")
        }
        time, memory = exponent(best["seconds"]), exponent(best["extra_bytes"])
        if time is not None or memory is not None:
            found.append(Growth(key[0], dims[key], key[1], key[2], time, memory))
    return found
