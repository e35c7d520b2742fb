"""Turns metrics into the points of a curve: in the order of steps, averaged, and few enough to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

Point = tuple[float, float]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Returns a centred moving average over a twentieth of the points, or the points if there are fewer than 40."""
    half = len(points) // 40
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def thinned(points: Sequence[Point], most: int = 400) -> list[Point]:
    """Returns about `most` points at most: the lowest and the highest of every stretch."""
    size = max(1, math.ceil(2 * len(points) / most))
    if size <= 2:
        return list(points)
    stretches = (points[start : start + size] for start in range(0, len(points), size))
    extremes = ((min(part, key=itemgetter(1)), max(part, key=itemgetter(1))) for part in stretches)
    return [point for pair in extremes for point in sorted(set(pair))]


def curve(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Returns the points (step, value) of the metric `key`, in the order of steps.

    If a step has several rows, the last one counts. Values that are not finite numbers are left out.
    """
    values = {row["step"]: row[key] for row in rows if isinstance(row.get("step"), int) and key in row}
    finite = {step: y for step, y in values.items() if isinstance(y, int | float) and abs(y) < math.inf}
    return [(float(step), float(y)) for step, y in sorted(finite.items())]
