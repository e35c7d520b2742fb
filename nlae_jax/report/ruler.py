"""The page's chart of a few figures: each is a dot on a common scale, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from nlae_jax.report.table import html_text, is_shown, number, tidy


class Mark(NamedTuple):
    """One line of the chart: a name, a value and its interval. `kind` is "main", "part", "zero" or empty.

    `control` is the value of a control, which is drawn as a ring on the same line.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    kind: str = ""
    control: float | None = None


def interval_of(pair: Any) -> tuple[float, float] | None:
    """Reads an interval from a file's value. Returns None if the value is not a list of two numbers."""
    good = isinstance(pair, list) and len(pair) == 2 and all(map(is_shown, pair))
    return (float(pair[0]), float(pair[1])) if good else None


def interval_text(interval: Sequence[float] | None, digits: int = 3) -> str:
    """Writes an interval as `[low, high]`. The text is empty without an interval."""
    return "" if interval is None else f"[{number(interval[0], digits)}, {number(interval[1], digits)}]"


def ruler(marks: Sequence[Mark], low: float, high: float) -> str:
    """Draws the marks, as HTML, on a scale that reaches at least from `low` to `high`."""
    controls = [mark.control for mark in marks if mark.control is not None]
    ends = [*controls, *(end for mark in marks for end in (mark.value, *(mark.interval or ())))]
    low, high = min([low, *ends]), max([high, *ends])
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)

    def at(value: float) -> float:
        return round((value - low) / (high - low) * 100, 2)

    lines = []
    for mark in marks:
        whisker = ""
        if mark.interval is not None:
            width = round(at(mark.interval[1]) - at(mark.interval[0]), 2)
            whisker = f'<s style="left:{at(mark.interval[0])}%;width:{width}%"></s>'
        if mark.control is not None:
            whisker += f'<b style="left:{at(mark.control)}%"></b>'
        lines.append(
            f'<div class="{mark.kind}"><span>{html_text(mark.name)}</span><span class="track">'
            f'<u style="left:{at(0)}%"></u>{whisker}<i style="left:{at(mark.value)}%"></i></span>'
            f"<span>{number(round(mark.value, 2) + 0.0, 2)}</span></div>"  # no minus before a 0
        )
    shown = ticks(low, high)
    scale = "".join(f'<em style="left:{at(tick)}%">{tick_text(tick, shown)}</em>' for tick in shown)
    lines.append(f'<div class="scale"><span></span><span class="track">{scale}</span><span></span></div>')
    return f'<div class="ruler">{"".join(lines)}</div>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Writes a tick's label with the fewest decimals that distinguish the ticks."""
    for decimals in range(5):
        if all(abs(round(tick, decimals) - tick) <= 1e-6 * abs(tick) for tick in ticks):
            return tidy(f"{value:,.{decimals}f}")
    return tidy(f"{value:.3g}")
