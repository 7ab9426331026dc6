"""How time and memory grow with N: the exponent of the power law through each implementation's measurements."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

LEAST = 1024  # rows: below, a call's overhead is part of the time


class Growth(NamedTuple):
    """Of one implementation on one loss and D; None where fewer than three sizes were measured."""

    loss: str
    dtype: str
    d: int
    implementation: str
    time: float | None
    memory: float | None


def exponent(points: list[tuple[float, float]]) -> float | None:
    """Slope of log y over log x, by least squares; of points whose y is above 0."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 3:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    slope: float = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return slope


def fit(rows: list[dict[str, Any]]) -> list[Growth]:
    points: dict[tuple[str, str, int, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["n"] >= LEAST:
            found = points.setdefault((row["loss"], row["dtype"], row["d"], row["implementation"]), {})
            for quantity in ("seconds", "extra_bytes"):
                if quantity in row:
                    found.setdefault(quantity, []).append((row["n"], row[quantity]))
    fits = [
        Growth(*key, exponent(p.get("seconds", [])), exponent(p.get("extra_bytes", []))) for key, p in points.items()
    ]
    return [growth for growth in fits if growth.time is not None or growth.memory is not None]
